# SPDX-License-Identifier: Apache-2.0
"""A vocabulary grown by names of one id each and by sentinels, its old ids unchanged."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.data.special_tokens import Named, top_ids, until_end
from t5x_lite.data.vocabularies import Vocabulary


class Grown:
    """`inner`'s ids, then one id for each of `names`, then `extra_ids` sentinels.

    The k-th sentinel is size - 1 - k and written <extra_id_k>. Instead of new ones, pieces of the
    inner vocabulary may serve: `sentinels` is their name with {} for the number. Names and
    sentinels in a text are one id each, the longest that fits; ends are those of `inner`.
    """

    def __init__(
        self,
        inner: Vocabulary,
        names: Sequence[str] = (),
        extra_ids: int = 0,
        pattern: str | None = None,
        ends: bool | None = None,
    ):
        self.inner, self.names, self.extra_ids, self.pattern = (
            inner,
            list(names),
            extra_ids,
            pattern,
        )
        self.ends = inner.ends if ends is None else ends
        self.size = inner.size + len(self.names) + extra_ids
        if extra_ids:
            self.sentinel_ids = top_ids(self.size, extra_ids)
        else:
            self.sentinel_ids = named_sentinels(inner, pattern)
        self.sentinels = len(self.sentinel_ids)
        form = pattern or "<extra_id_{}>"
        marks = {
            form.replace("{}", str(k)): int(token) for k, token in enumerate(self.sentinel_ids)
        }
        own = {name: token for token, name in enumerate(self.names, inner.size)}
        twice = [name for name in own if name in marks or not name]
        if twice:
            raise ValueError(f"Vocabulary.names has {twice[0]!r}, which is empty or a sentinel")
        self.named = Named(own | marks)

    # What begins, ends and fills its sequences is the inner vocabulary's.
    eos = property(lambda self: self.inner.eos)
    stops = property(lambda self: self.inner.stops)
    pad = property(lambda self: self.inner.pad)
    bos = property(lambda self: self.inner.bos)

    def token(self, name: str) -> int | None:
        found = self.named.ids.get(name)
        return self.inner.token(name) if found is None else found

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        split = [list(self.named.split(text)) for text in texts]
        plain = [piece for pieces in split for piece, token in pieces if token is None]
        coded = iter(self.inner.encode_all(plain))
        none = np.zeros(0, np.int32)
        ids = lambda token: next(coded) if token is None else np.array([token], np.int32)
        return [np.concatenate([none, *(ids(token) for _, token in pieces)]) for pieces in split]

    def decode(self, ids: Sequence[int]) -> str:
        """The inner vocabulary's text, with names and sentinels where their ids stand."""
        known = self.named.names
        tokens = until_end(ids, self.stops, self.pad)
        parts, continued = [], self.continued()
        for special, run in itertools.groupby(tokens, lambda token: token in known):
            if special:
                parts += [known[token] for token in run]
            else:
                # Ids between the inner vocabulary's and the model's own size are nothing's name.
                inside = [token for token in run if token < self.inner.size]
                parts.append(continued(inside) if parts else self.inner.decode(inside))
        return "".join(parts)

    def continued(self) -> Callable[[Sequence[int]], str]:
        """What decodes a run that is not the first: many tokenizers drop a blank at a beginning,
        but not after another letter."""
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

    def model(self) -> bytes | None:
        return self.inner.model()


def named_sentinels(inner: Vocabulary, pattern: str | None) -> np.ndarray:
    """Ids [k] of the pieces that the pattern names from 0 on; without one, the sentinels there are.

    Raises ValueError if there is none.
    """
    if pattern is None:
        return inner.sentinel_ids
    found = (inner.token(pattern.replace("{}", str(k))) for k in itertools.count())
    ids = np.array(list(itertools.takewhile(lambda token: token is not None, found)), np.int32)
    if not len(ids):
        raise ValueError(
            f"Vocabulary.sentinels = {pattern!r}: the vocabulary has no piece "
            f"{pattern.replace('{}', '0')!r}; bind Vocabulary.extra_ids to add sentinels"
        )
    return ids


def grow(
    inner: Vocabulary,
    names: Sequence[str] = (),
    extra_ids: int = 0,
    pattern: str | None = None,
) -> Vocabulary:
    """The vocabulary with these names and sentinels; those that it has already are not added.

    Raises ValueError if it has sentinels, but fewer than `extra_ids`, or the pattern names none.
    """
    # A piece that merges would not reach is no name yet.
    missing = [name for name in names if inner.encode(name) != [inner.token(name)]]
    more = 0 if 0 < extra_ids <= inner.sentinels else extra_ids
    if more and inner.sentinels:
        raise ValueError(
            f"Vocabulary.extra_ids = {extra_ids}: the vocabulary has {inner.sentinels} sentinels, "
            "and new ones would go by the same names. Leave extra_ids out, and bind "
            'SpanCorruption.overflow = "cap" where spans are more'
        )
    if not missing and not more and pattern is None:
        return inner
    return Grown(inner, missing, more, pattern)
