# SPDX-License-Identifier: Apache-2.0
"""Vocabularies extended by added tokens and by sentinels, their old ids unchanged."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.tokenizers.special_tokens import (
    SENTINEL,
    NamedTokens,
    find_sentinels,
    sentinel_names,
    top_ids,
    until_end,
)
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.text_lines import check_unicode


class ExtendedVocabulary:
    """A vocabulary with added tokens: `inner`'s ids, one id for each name, then sentinels.

    The k-th sentinel is size - 1 - k and written <extra_id_k>. Names and sentinels in a text are
    one id each, the longest that fits.
    """

    def __init__(
        self,
        inner: TextVocabulary,
        names: Sequence[str] = (),
        extra_ids: int = 0,
        pattern: str | None = None,
        ends: bool | None = None,
    ):
        """Extends a vocabulary.

        Args:
          inner: the vocabulary.
          names: texts of one id each.
          extra_ids: number of new sentinels.
          pattern: name of pieces of `inner` that serve as sentinels instead of new ones, with {}
            for the number.
          ends: sequences finish with eos; None as in `inner`.

        Raises:
          ValueError: a name is empty or a sentinel.
        """
        self.inner, self.names = inner, list(names)
        self.extra_ids, self.pattern = extra_ids, pattern
        self.ends = inner.ends if ends is None else ends
        self.size = inner.size + len(self.names) + extra_ids
        if extra_ids:
            self.sentinel_ids = top_ids(self.size, extra_ids)
        else:
            self.sentinel_ids = inner_sentinels(inner, pattern)
        self.sentinels = len(self.sentinel_ids)
        sentinels = sentinel_names(self.sentinel_ids, pattern or SENTINEL)
        added = {name: token for token, name in enumerate(self.names, inner.size)}
        refused = [name for name in added if name in sentinels or not name]
        if refused:
            raise ValueError(f"Vocabulary.names has {refused[0]!r}, which is empty or a sentinel")
        self.named = NamedTokens(added | sentinels)

    # Tokens that begin, end and fill its sequences are the inner vocabulary's.
    eos = property(lambda self: self.inner.eos)
    stops = property(lambda self: self.inner.stops)
    pad = property(lambda self: self.inner.pad)
    bos = property(lambda self: self.inner.bos)

    def token(self, name: str) -> int | None:
        token = self.named.ids.get(name)
        return self.inner.token(name) if token is None else token

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            check_unicode(text)
        split = [list(self.named.split(text)) for text in texts]
        plain = [piece for pieces in split for piece, token in pieces if token is None]
        encoded = iter(self.inner.encode_all(plain))
        empty = np.zeros(0, np.int32)

        def ids(token: int | None) -> np.ndarray:
            return next(encoded) if token is None else np.array([token], np.int32)

        return [np.concatenate([empty, *(ids(token) for _, token in pieces)]) for pieces in split]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The inner vocabulary's text, with names and sentinels where their ids stand."""
        known = self.named.names
        tokens = until_end(ids, self.stops, self.pad)
        parts, decode_later = [], self.later_decoder()
        for special, run in itertools.groupby(tokens, lambda token: token in known):
            if special:
                parts += [known[token] for token in run]
            else:
                # Ids between the inner vocabulary's and the model's own size have no text.
                inside = [token for token in run if token < self.inner.size]
                parts.append(decode_later(inside) if parts else self.inner.decode(inside))
        return "".join(parts)

    def later_decoder(self) -> Callable[[Sequence[int]], str]:
        """Decoder of a run that is not the first: many tokenizers drop a leading space, but not one
        after another character."""
        before = self.inner.encode("a")
        if self.inner.decode(before) != "a":
            return self.inner.decode
        return lambda ids: self.inner.decode([*before, *ids]).removeprefix("a")

    def description(self) -> dict:
        return {
            "kind": "grown",
            "inner": self.inner.description(),
            "names": self.names,
            "extra_ids": self.extra_ids,
            "pattern": self.pattern,
            "ends": self.ends,
        }

    def model_bytes(self) -> bytes | None:
        return self.inner.model_bytes()


def inner_sentinels(inner: TextVocabulary, pattern: str | None) -> np.ndarray:
    """Ids [k] of the pieces that the pattern names from 0 on; without one, `inner`'s sentinels.

    Raises:
      ValueError: there is no such piece.
    """
    if pattern is None:
        return inner.sentinel_ids
    ids = find_sentinels(inner.token, pattern)
    if not len(ids):
        raise ValueError(
            f"Vocabulary.sentinels = {pattern!r}: the vocabulary has no piece "
            f"{pattern.replace('{}', '0')!r}; bind Vocabulary.extra_ids to add sentinels"
        )
    return ids


def missing_sentinels(vocabulary: TextVocabulary, extra_ids: int) -> int:
    """Number of sentinels to add so that there are `extra_ids`; 0 where it has them by name.

    Raises:
      ValueError: it has some, but fewer.
    """
    if not vocabulary.sentinels:
        return extra_ids
    if extra_ids > vocabulary.sentinels:
        raise ValueError(
            f"Vocabulary.extra_ids = {extra_ids}: the vocabulary has {vocabulary.sentinels} "
            "sentinels, and new ones would go by the same names. Leave extra_ids out, and bind "
            'SpanCorruption.overflow = "cap" where spans are more'
        )
    return 0


def extend_vocabulary(
    inner: TextVocabulary,
    names: Sequence[str] = (),
    extra_ids: int = 0,
    pattern: str | None = None,
) -> TextVocabulary:
    """Adds tokens to a vocabulary; those that it has already are not added.

    Args:
      inner: the vocabulary.
      names: texts of one id each.
      extra_ids: number of sentinels.
      pattern: name of pieces that serve as sentinels, with {} for the number; None for new ones.

    Returns:
      The extended vocabulary; `inner` itself if it has all of them.

    Raises:
      ValueError: it has sentinels, but fewer than `extra_ids`, or the pattern names none.
    """
    # A piece that merges would not reach is not a name yet.
    missing = [name for name in names if inner.encode(name) != [inner.token(name)]]
    more = missing_sentinels(inner, extra_ids)
    if not missing and not more and pattern is None:
        return inner
    return ExtendedVocabulary(inner, missing, more, pattern)
