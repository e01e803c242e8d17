# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, said in numbers per token: linear in length, never an array of pairs."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_segments",
        "key_segments",
        "query_prefix",
        "key_prefix",
        "reach",
        "offset",
    ],
    meta_fields=["causal"],
)
@dataclass(frozen=True)
class Sight:
    """A query sees the keys of its own segment, as far as causality and reach let it.

    Segments number the texts of a row from 1 on, one after the other; 0 is padding, seen by nobody
    and seeing nothing. Query i stands at index i + offset among the keys (offset None: 0), key j at
    index j. With `causal` no query sees a key after it, unless both are in the prefix. reach is
    (behind, ahead): a key is seen only if -ahead <= query index - key index <= behind, inside a
    prefix too; None: however far. Causality and reach are meant for queries and keys of one row;
    over another text (cross-attention) only segments count.
    """

    query_segments: Int[Array, "b t"]
    key_segments: Int[Array, "b s"]
    causal: bool = False
    query_prefix: Bool[Array, "b t"] | None = None
    key_prefix: Bool[Array, "b s"] | None = None
    reach: Int[Array, " 2"] | None = None
    offset: Int[Array, ""] | None = None

    def mask(self) -> Bool[Array, "b t s"]:
        """The pairs themselves, for attention that can afford to hold them."""
        keys = self.key_segments[:, None, :]
        seen = (self.query_segments[:, :, None] == keys) & (keys > 0)
        distance = self.distance()
        if self.causal:
            past = distance >= 0
            if self.query_prefix is not None:
                past = past | (self.query_prefix[:, :, None] & self.key_prefix[:, None, :])
            seen = seen & past
        if self.reach is not None:
            behind, ahead = self.reach
            seen = seen & (distance <= behind) & (distance >= -ahead)
        return seen

    def distance(self) -> Int[Array, "t s"]:
        """Query index minus key index."""
        queries = jnp.arange(self.query_segments.shape[1])
        if self.offset is not None:
            queries = queries + self.offset
        return queries[:, None] - jnp.arange(self.key_segments.shape[1])[None, :]

    def within(self, reach: Int[Array, " 2"] | None) -> "Sight":
        """The same sight, as far as reach."""
        return replace(self, reach=reach)

    def later(self, count: Int[Array, ""]) -> "Sight":
        """The same sight of queries that stand count places later among the keys."""
        return replace(self, offset=count if self.offset is None else self.offset + count)
