# SPDX-License-Identifier: Apache-2.0
"""Ids that are not words of a text: its end, padding, sentinels, and names of one id each."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The largest vocabularies have some hundred thousand.
MAX_IDS = 10**7
# T5 has 100; adding ten million to a SentencePiece model took minutes.
MAX_SENTINELS = 10**5


def tokenizer_size(tokenizer: Any) -> int:
    """One more than the highest id of a tokenizer of the tokenizers library.

    Raises:
      ValueError: no vocabulary has this size. When it writes such a tokenizer, the library would
        allocate a place for each id below it, and end the process where memory does not suffice.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > MAX_IDS:
        raise ValueError(f"a token has id {size - 1:,}; no vocabulary has {MAX_IDS:,} ids")
    return size


def until_end(ids: Sequence[int], stops: Sequence[int], pad: int) -> list[int]:
    """The ids of a text before its end.

    Args:
      ids: ids that a model wrote.
      stops: ids that end a text.
      pad: id of padding, which is left out.
    """
    before = itertools.takewhile(lambda token: token not in stops, map(int, ids))
    return [token for token in before if token != pad]


def sentinel_name(size: int, token: int) -> str:
    """Name of a sentinel at the top of a vocabulary of `size` ids."""
    return f"<extra_id_{size - 1 - token}>"


def top_ids(size: int, count: int) -> np.ndarray:
    """The last ids [count] of a vocabulary from the top down."""
    return np.arange(size - 1, size - 1 - count, -1, dtype=np.int32)


def count_sentinels(size: int, piece: Callable[[int], str | None]) -> int:
    """Number of the last pieces named <extra_id_0>, <extra_id_1> ... from the top down."""
    count = 0
    while count < size and (piece(size - 1 - count) or "").strip("▁") == f"<extra_id_{count}>":
        count += 1
    return count


@dataclass(frozen=True)
class SpecialIds:
    """Special ids of a vocabulary beside its model.

    Attributes:
      eos: ends a text; None for the model's own.
      pad: padding; None for the model's own.
      bos: begins an encoder's input; None for nothing.
      stops: ids of which any ends what a model writes; () for eos alone.
    """

    eos: int | None = None
    pad: int | None = None
    bos: int | None = None
    stops: Sequence[int] = ()


@dataclass(frozen=True)
class SentencePieceIds(SpecialIds):
    """Special ids of a SentencePiece model, whose names of special tokens stand beside it.

    Attributes:
      named: ids by their names in a text; the text between names is encoded run by run.
      prefix_once: only the first run begins with the model's own space.
    """

    named: Mapping[str, int] = field(default_factory=dict)
    prefix_once: bool = False


class NamedTokens:
    """Names such as <s> or <|user|> that a text may contain, each of them one id.

    Spaces around the names in `bare` belong to them.
    """

    def __init__(self, ids: Mapping[str, int], bare: Sequence[str] = ()):
        self.ids = dict(ids)
        self.names = {token: name for name, token in self.ids.items()}
        # The longest name that fits wins: <|user|>s before <|user|>.
        longest = sorted(self.ids, key=len, reverse=True)
        escaped = [
            rf"\s*{re.escape(name)}\s*" if name in bare else re.escape(name) for name in longest
        ]
        # Without names nothing matches.
        self.pattern = re.compile(f"({'|'.join(escaped) or '(?!)'})")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The pieces of a text in order, each with its id, or None if it is plain text."""
        for number, piece in enumerate(self.pattern.split(text)):
            if number % 2:
                yield piece, self.ids[piece] if piece in self.ids else self.ids[piece.strip()]
            elif piece:
                yield piece, None
