# SPDX-License-Identifier: Apache-2.0
"""Ids that are not words of a text: its end, padding, sentinels, and names of one id each."""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from t5x_lite.config.checked import MOST_SENTINELS, require

# Name of the k-th sentinel in a text.
SENTINEL = "<extra_id_{}>"


def until_end(ids: Sequence[int] | np.ndarray, stops: Sequence[int], pad: int) -> list[int]:
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
    """The last ids [count] of a vocabulary from the top down.

    Raises:
      ValueError: more sentinels than any vocabulary has.
    """
    require(
        count <= MOST_SENTINELS,
        f"extra_ids is {count:,}; it is at most {MOST_SENTINELS:,} in any vocabulary",
    )
    return np.arange(size - 1, size - 1 - count, -1, dtype=np.int32)


def find_sentinels(token: Callable[[str], int | None], pattern: str = SENTINEL) -> np.ndarray:
    """Ids [k] of the pieces that the pattern names from 0 on, wherever they stand.

    Args:
      token: returns the id of a piece; None for a name that is none.
      pattern: their name, with {} for the number.
    """
    tokens = (token(pattern.replace("{}", str(k))) for k in range(MOST_SENTINELS))
    return np.array(list(itertools.takewhile(lambda each: each is not None, tokens)), np.int32)


def find_piece(processor: Any, name: str) -> int | None:
    """Id of a piece of a SentencePiece model; None for a name that is none.

    A sentinel's piece may begin with the model's sign of a space.
    """
    spellings = (name, f"▁{name}") if name.startswith("<extra_id_") else (name,)
    tokens = {spelled: processor.piece_to_id(spelled) for spelled in spellings}
    known = (t for spelled, t in tokens.items() if processor.id_to_piece(t) == spelled)
    return next(known, None)


def sentinel_names(ids: np.ndarray, pattern: str = SENTINEL) -> dict[str, int]:
    """The id of each sentinel [k] by its name in a text."""
    return {pattern.replace("{}", str(k)): int(token) for k, token in enumerate(ids)}


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
      known: number of ids, which belong to the pieces by name; None for those of the model itself.
    """

    named: Mapping[str, int] = field(default_factory=dict)
    prefix_once: bool = False
    known: int | None = None


def join_numbered(parts: Mapping[str, str]) -> list[str]:
    """The alternatives of an expression, those of <extra_id_0>, <extra_id_1>, ... in one.

    To compile 100,000 of them took seconds.

    Args:
      parts: expression of each name, the longest name first.
    """
    zero, one = (SENTINEL.replace("{}", str(k)) for k in range(2))
    if not {zero, one} <= parts.keys():
        return [*parts.values()]
    around = parts[zero].partition(re.escape(zero))
    count = 0
    while (name := SENTINEL.replace("{}", str(count))) in parts:
        if parts[name] != f"{around[0]}{re.escape(name)}{around[2]}":
            break
        count += 1
    sentinels = {SENTINEL.replace("{}", str(k)) for k in range(count)}
    numbered = re.escape(SENTINEL).replace(re.escape("{}"), f"(?:{number_expression(count)})")
    other = {name: part for name, part in parts.items() if name not in sentinels}
    # A name that has a sentinel's in it is longer than that.
    longer = [name for name in other if re.search(numbered, name)]
    return [
        *(other.pop(name) for name in longer),
        f"{around[0]}{numbered}{around[2]}",
        *other.values(),
    ]


def number_expression(count: int) -> str:
    """Expression of the decimal numbers from 0 to `count` - 1."""
    last = str(count - 1)
    parts = [last, *(f"[1-9][0-9]{{{size - 1}}}" for size in range(2, len(last)))]
    parts += ["[0-9]"] if len(last) > 1 else []
    for place, digit in enumerate(last):
        least = 1 if place == 0 and len(last) > 1 else 0
        if int(digit) > least:
            more = len(last) - place - 1
            parts.append(f"{last[:place]}[{least}-{int(digit) - 1}][0-9]{{{more}}}")
    return "|".join(parts)


class NamedTokens:
    """Names such as <s> or <|user|> that a text may contain, each of them one id.

    Spaces around the names in `bare` belong to them, and one space before those in `spaced`.
    """

    def __init__(
        self, ids: Mapping[str, int], bare: Sequence[str] = (), spaced: Collection[str] = ()
    ):
        self.ids = dict(ids)
        self.names = {token: name for name, token in self.ids.items()}
        spaced = frozenset(spaced)

        def expression(name: str) -> str:
            if name in bare:
                return rf"\s*{re.escape(name)}\s*"
            return (" ?" if name in spaced else "") + re.escape(name)

        # The longest name that fits wins: <|user|>s before <|user|>.
        longest = sorted(self.ids, key=len, reverse=True)
        parts = {name: expression(name) for name in longest}
        # Without names nothing matches.
        self.pattern = re.compile(f"({'|'.join(join_numbered(parts)) or '(?!)'})")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The pieces of a text in order, each with its id, or None if it is plain text."""
        for number, piece in enumerate(self.pattern.split(text)):
            if number % 2:
                yield piece, self.ids[piece] if piece in self.ids else self.ids[piece.strip()]
            elif piece:
                yield piece, None

    def occurs_in(self, text: str) -> bool:
        """True if a text contains a name."""
        return self.pattern.search(text) is not None
