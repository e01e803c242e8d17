# SPDX-License-Identifier: Apache-2.0
"""Ids that are no part of a text: its end, padding, sentinels, and names in a text that stand for
one id each."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The largest vocabularies have some hundred thousand.
MOST_IDS = 10**7
# T5 has 100; adding ten million to a SentencePiece model took minutes.
MOST_SENTINELS = 10**5


def size_of(tokenizer: Any) -> int:
    """One more than the highest id of a tokenizer of the tokenizers library.

    Raises ValueError for a size that no vocabulary has: written, the library would hold a place for
    each id below it, and end the process where there is no memory for them.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > MOST_IDS:
        raise ValueError(f"a token has id {size - 1:,}; no vocabulary has {MOST_IDS:,} ids")
    return size


@contextlib.contextmanager
def panics_told() -> Iterator[None]:
    """A panic of the tokenizers library as a ValueError: what Rust raises is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library fails on it: {str(error)[:200]}") from error


def until_end(ids: Sequence[int], stops: Sequence[int], pad: int) -> list[int]:
    """The ids before the first of stops, without padding."""
    before = itertools.takewhile(lambda token: token not in stops, map(int, ids))
    return [token for token in before if token != pad]


def sentinel_name(size: int, token: int) -> str:
    return f"<extra_id_{size - 1 - token}>"


def top_ids(size: int, count: int) -> np.ndarray:
    """The last ids [count] of a vocabulary from the top down."""
    return np.arange(size - 1, size - 1 - count, -1, dtype=np.int32)


def count_sentinels(size: int, piece) -> int:
    """How many of the last pieces are named <extra_id_0>, <extra_id_1> ... from the top down."""
    count = 0
    while count < size and (piece(size - 1 - count) or "").strip("▁") == f"<extra_id_{count}>":
        count += 1
    return count


@dataclass(frozen=True)
class Marks:
    """The ids that a vocabulary is told apart from its model; None where it finds them itself.

    `bos` begins what an encoder reads; `stops` end what is written, eos alone unless given.
    """

    eos: int | None = None
    pad: int | None = None
    bos: int | None = None
    stops: Sequence[int] = ()


@dataclass(frozen=True)
class PieceMarks(Marks):
    """Marks of a SentencePiece model, whose names of special tokens stand beside it.

    `named` are names in a text that stand for one id each; what is between them is encoded piece by
    piece, the first alone beginning with the model's own blank if `prefix_once`.
    """

    named: Mapping[str, int] = field(default_factory=dict)
    prefix_once: bool = False


class Named:
    """Names such as <s> or <|user|> that a text may contain, each of them one id.

    Blanks around the names in `bare` belong to them.
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
