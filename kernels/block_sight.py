# SPDX-License-Identifier: Apache-2.0
"""What a block of new tokens sees of a cache, and where both stand: numbers per token and row."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "depth", "ancestors", "prefix", "reach"],
    meta_fields=["width", "slots"],
)
@dataclass(frozen=True)
class BlockSight:
    """`width` tokens stand in the slots of a cache from index[b] on, in each row b.

    Token i has position index + depth[i] (None: i; never negative) and sees the slots before index
    and the tokens j of the block with ancestors[i, j] (None: j <= i): a chain, or a tree of drafts.
    Slot and position are the same, except for the tokens of a tree: those of one depth share a
    position. The positions before prefix[b] see one another's slots. reach is (behind, ahead): a
    key is seen only if -ahead <= query position - key position <= behind; None: however far.
    """

    index: Int[Array, " b"]
    width: int
    slots: int
    depth: Int[Array, " w"] | None = None
    ancestors: Bool[Array, "w w"] | None = None
    prefix: Int[Array, " b"] | None = None
    reach: Int[Array, " 2"] | None = None

    def depths(self) -> Int[Array, " w"]:
        """How far each token stands behind index."""
        return jnp.arange(self.width) if self.depth is None else self.depth

    def offsets(self) -> Int[Array, "b s"]:
        """How far each slot lies behind index."""
        return jnp.arange(self.slots)[None, :] - self.index[:, None]

    def query_positions(self) -> Int[Array, "b w"]:
        return self.index[:, None] + self.depths()

    def key_positions(self) -> Int[Array, "b s"]:
        if self.ancestors is None:
            return jnp.broadcast_to(jnp.arange(self.slots)[None, :], self.offsets().shape)
        token = self.tokens()
        deep = jnp.sum(jnp.where(token, self.depths(), 0), axis=-1)
        # Of offsets, not of slots [1 s]: for a single row those look like rows placed otherwise.
        return self.index[:, None] + jnp.where(jnp.any(token, axis=-1), deep, self.offsets())

    def mask(self) -> Bool[Array, "b w s"]:
        """The pairs themselves, for attention that can afford to hold them."""
        offset = self.offsets()
        if self.ancestors is None:
            seen = offset[:, None, :] <= jnp.arange(self.width)[:, None]
        else:
            # A product of zeros and ones: exact at any precision, and placed as index is.
            token = self.tokens().astype(jnp.float32)
            own = jnp.einsum("ij,bsj->bis", self.ancestors.astype(jnp.float32), token)
            seen = (offset < 0)[:, None, :] | (own > 0)
        where = self.query_positions()
        if self.prefix is not None:
            inside = jnp.arange(self.slots) < self.prefix[:, None]
            seen = seen | (inside[:, None, :] & (where < self.prefix[:, None])[:, :, None])
        if self.reach is not None:
            distance = where[:, :, None] - self.key_positions()[:, None, :]
            behind, ahead = self.reach
            seen = seen & (distance <= behind) & (distance >= -ahead)
        return seen

    def tokens(self) -> Bool[Array, "b s w"]:
        """Which token of the block, if any, stands in each slot."""
        return self.offsets()[:, :, None] == jnp.arange(self.width)

    def within(self, reach: Int[Array, " 2"] | None) -> "BlockSight":
        """The same sight, as far as reach."""
        return replace(self, reach=reach)
