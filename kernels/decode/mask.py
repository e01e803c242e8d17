# SPDX-License-Identifier: Apache-2.0
"""Mask of new tokens over a cache, chains and trees of drafts: a few integers per token and row."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "depth", "ancestors", "prefix", "window_size"],
    meta_fields=["width", "slots"],
)
@dataclass(frozen=True)
class CacheMask:
    """Mask of `width` new tokens that a cache holds from slot index[b] on, in each row b.

    Each of them attends to the slots before index[b] and to its ancestors among the new tokens:
    those before it in a chain, or those on its path to the root of a tree of drafts (the tree mask
    of SpecInfer, Miao et al., 2024). Slot and position are the same, except for the tokens of a
    tree: those of one depth share a position.

    Attributes:
      index: [b], slot of the first new token.
      width: number of new tokens.
      slots: number of slots of the cache.
      depth: [w], position of each new token minus index, never negative; None is 0, 1, 2, ...
      ancestors: [w w], True where token i attends to token j; None is j <= i, a chain.
      prefix: [b], slots before it attend to one another; None without a prefix.
      window_size: (left, right): a query attends to a key only if
        -right <= query position - key position <= left; None is no window.
    """

    index: Int[Array, " b"]
    width: int
    slots: int
    depth: Int[Array, " w"] | None = None
    ancestors: Bool[Array, "w w"] | None = None
    prefix: Int[Array, " b"] | None = None
    window_size: Int[Array, " 2"] | None = None

    def depths(self) -> Int[Array, " w"]:
        """Returns the position of each new token minus index."""
        return jnp.arange(self.width) if self.depth is None else self.depth

    def offsets(self) -> Int[Array, "b s"]:
        """Returns each slot minus index."""
        return jnp.arange(self.slots)[None, :] - self.index[:, None]

    def query_positions(self) -> Int[Array, "b w"]:
        """Returns the positions of the new tokens."""
        return self.index[:, None] + self.depths()

    def key_positions(self) -> Int[Array, "b s"]:
        """Returns the positions of the tokens in all slots."""
        if self.ancestors is None:
            return jnp.broadcast_to(jnp.arange(self.slots)[None, :], self.offsets().shape)
        is_token = self.slot_tokens()
        depth = jnp.sum(jnp.where(is_token, self.depths(), 0), axis=-1)
        # Of offsets, not of slots [1 s]: for a single row those look like rows sharded otherwise.
        return self.index[:, None] + jnp.where(jnp.any(is_token, axis=-1), depth, self.offsets())

    def materialize(self) -> Bool[Array, "b w s"]:
        """Returns the mask as an array over all pairs, True where a query attends to a slot."""
        offset = self.offsets()
        if self.ancestors is None:
            visible = offset[:, None, :] <= jnp.arange(self.width)[:, None]
        else:
            # A product of zeros and ones: exact at any precision, and sharded as index is.
            is_token = self.slot_tokens().astype(jnp.float32)
            in_tree = jnp.einsum("ij,bsj->bis", self.ancestors.astype(jnp.float32), is_token)
            visible = (offset < 0)[:, None, :] | (in_tree > 0)
        positions = self.query_positions()
        if self.prefix is not None:
            keys_inside = jnp.arange(self.slots) < self.prefix[:, None]
            queries_inside = positions < self.prefix[:, None]
            visible = visible | (keys_inside[:, None, :] & queries_inside[:, :, None])
        if self.window_size is not None:
            distance = positions[:, :, None] - self.key_positions()[:, None, :]
            left, right = self.window_size
            visible = visible & (distance <= left) & (distance >= -right)
        return visible

    def slot_tokens(self) -> Bool[Array, "b s w"]:
        """Returns True where a slot holds a new token."""
        return self.offsets()[:, :, None] == jnp.arange(self.width)

    def with_window(self, window_size: Int[Array, " 2"] | None) -> "CacheMask":
        """Returns the same mask with another window."""
        return replace(self, window_size=window_size)
