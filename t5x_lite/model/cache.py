# SPDX-License-Identifier: Apache-2.0
"""Key-value cache of decoding: immutable values that every step takes and returns.

The cache of a model is a tuple of stores, one for each layer, which need not be alike; of stacked
weights it is one store with a first axis of layers.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import api as kernels
from t5x_lite.model.cache_slots import (
    Slots,
    encode_block,
    read_slots,
    take_slots,
    write_rows,
    write_slots,
)


class TokenBlock(NamedTuple):
    """Tokens to decode in one forward pass: a chain, or a tree of draft tokens.

    Attributes:
      tokens: [b w] token ids.
      index: [b] cache slot of the first token of each row.
      depth: [w] position of each token relative to index; None for 0, 1, ... w - 1.
      ancestors: [w w] True if token i attends to token j of the block; None for j <= i. All tokens
        attend to the slots before index.
      prefix: [b] length of the bidirectional prefix, in the prefill of a prefix-LM; None otherwise.
    """

    tokens: Int[Array, "b w"]
    index: Int[Array, " b"]
    depth: Int[Array, " w"] | None = None
    ancestors: Bool[Array, "w w"] | None = None
    prefix: Int[Array, " b"] | None = None


class CacheStore(Protocol):
    """Keys and values of one layer, as attention reads and decoding writes them.

    A store is a tree of arrays whose first axis is the row, which is all that batches, beams and
    pools of rows need. It rolls back by length: tokens from some length on are forgotten when the
    next block is appended there.
    """

    @property
    def layout(self) -> Hashable:
        """Sizes on which the mask depends, equal for stores that share it."""

    def append(
        self, k: Float[Array, "b k w h"], v: Float[Array, "b k w h"], index: Int[Array, " b"]
    ) -> "CacheStore":
        """Writes a block; all tokens from `index` on that were there are forgotten.

        Args:
          k: [b k w h] new keys.
          v: [b k w h] new values.
          index: [b] number of tokens before the block.
        """

    def read(self, block: TokenBlock, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values [b k s h] for the queries of a block, which is in the store."""

    def mask(self, block: TokenBlock) -> kernels.CacheMask | kernels.DenseMask:
        """Returns the mask of the queries of a block over the keys of `read`."""

    def log_counts(self, width: int) -> Float[Array, " s"] | None:
        """Returns log of the number of tokens that each key of `read` stands for; None for 1."""

    def compact(self, index: Int[Array, " b"], path: Int[Array, "b D"]) -> "CacheStore":
        """Moves the tokens index + path of a tree to index, index + 1, ..., as of a chain."""

    def take(self, places: Int[Array, "b n"]) -> "Cache":
        """Returns the tokens of each row at these positions; others than it holds are arbitrary."""

    def load(self, store: "CacheStore", length: Int[Array, " b"]) -> "CacheStore":
        """Takes over the first length[b] tokens of another store, as far as either holds them."""


class Cache(NamedTuple):
    """Store with a slot for every token of a row: keys and values [b k s h], or quantized.

    The axis of heads is before that of slots: the other way round, batch 8 decodes 1.5 to 2.7 times
    slower on CPU.
    """

    keys: Slots
    values: Slots

    @property
    def slots(self) -> int:
        """Number of tokens that a row has room for."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    @property
    def layout(self) -> Hashable:
        return self.slots

    def append(self, k, v, index) -> "Cache":
        """Writes a block.

        Args:
          k: [b k w h] new keys.
          v: [b k w h] new values.
          index: [b] slot of the first.
        """
        return Cache(write_slots(self.keys, k, index), write_slots(self.values, v, index))

    def read(self, block: TokenBlock | None, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return read_slots(self.keys, dtype), read_slots(self.values, dtype)

    def mask(self, block: TokenBlock) -> kernels.CacheMask:
        return kernels.CacheMask(
            block.index,
            block.tokens.shape[1],
            self.slots,
            block.depth,
            block.ancestors,
            prefix=block.prefix,
        )

    def log_counts(self, width: int) -> None:
        return None

    def compact(self, index, path) -> "Cache":
        def compact_row(x, start, nodes):
            moved = jnp.take(x, start + nodes, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, moved, start, axis=1)

        return jax.tree.map(lambda x: jax.vmap(compact_row)(x, index, path), self)

    def take(self, places) -> "Cache":
        # Beyond the end too, for the room that `load` finds in a smaller cache.
        return take_slots(self, jnp.clip(places, 0, self.slots - 1))

    def load(self, store: CacheStore, length) -> "Cache":
        assert isinstance(store, Cache)
        start = jnp.zeros_like(length)
        return jax.tree.map(lambda x, filled: write_rows(x, filled, start), self, store)

    def widen(self, added: int) -> "Cache":
        """Returns the cache with room for so many more tokens."""
        pads = ((0, 0), (0, 0), (0, added), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, pads), self)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["window"]
)
@dataclass(frozen=True)
class RingCache:
    """Store of a layer with a window: the token at position i has slot i modulo the slots.

    With a slot for every token of a row it never wraps. A block reads the tokens in reach alone, in
    the order of positions, so that sums are the same bits with any number of slots.

    Attributes:
      keys: [b k s h], or quantized.
      values: like keys.
      window: number of tokens before itself that a query attends to.
    """

    keys: Slots
    values: Slots
    window: int

    @property
    def slots(self) -> int:
        """Number of tokens that a row holds: the window, and room for a block."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    @property
    def layout(self) -> Hashable:
        return "ring", self.slots, self.window

    def append(self, k, v, index) -> "RingCache":
        """Writes a block over the oldest tokens.

        Args:
          k: [b k w h] new keys.
          v: [b k w h] new values.
          index: [b] position of the first.
        """
        return self.write(Cache(encode_block(self.keys, k), encode_block(self.values, v)), index)

    def write(self, block: Cache, index) -> "RingCache":
        """Writes a block that has the form of the slots, from position index[b] on."""
        width, slots = block.slots, self.slots
        if width == 1:
            start = index % slots
            written = jax.tree.map(lambda x, new: write_rows(x, new, start), self.pair, block)
        else:
            # For every slot, the token of the block that it gets.
            token = (jnp.arange(slots) - index[:, None]) % slots
            is_new = (token < width)[:, None, :, None]
            spread = take_slots(block, jnp.minimum(token, width - 1))
            written = jax.tree.map(lambda x, new: jnp.where(is_new, new, x), self.pair, spread)
        return replace(self, keys=written.keys, values=written.values)

    @property
    def pair(self) -> Cache:
        """Keys and values by slot."""
        return Cache(self.keys, self.values)

    def start(self, index: Int[Array, " b"]) -> Int[Array, " b"]:
        """Returns the first position that a block at `index` reads."""
        return jnp.maximum(index - self.window, 0)

    def count(self, width: int) -> int:
        """Returns the number of tokens that a block of that width reads."""
        return min(self.window + width, self.slots)

    def read(self, block: TokenBlock, dtype: Any) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(self.count(block.tokens.shape[1]))
        return self.take(self.start(block.index)[:, None] + places).read(None, dtype)

    def mask(self, block: TokenBlock) -> kernels.CacheMask:
        start, width = self.start(block.index), block.tokens.shape[1]
        return kernels.CacheMask(
            block.index - start,
            width,
            self.count(width),
            block.depth,
            block.ancestors,
            prefix=None if block.prefix is None else block.prefix - start,
        )

    def log_counts(self, width: int) -> None:
        return None

    def compact(self, index, path) -> "RingCache":
        return self.write(self.take(index[:, None] + path), index)

    def take(self, places) -> Cache:
        return take_slots(self.pair, places % self.slots)

    def load(self, store: CacheStore, length) -> "RingCache":
        # The last position of each slot among the first `length`.
        last = length[:, None] - 1 - jnp.arange(self.slots)
        pair = store.take(jnp.arange(self.slots) + last // self.slots * self.slots)
        return replace(self, keys=pair.keys, values=pair.values)


class EncoderMemory(NamedTuple):
    """Encoder output as the decoder attends to it.

    cross_kv has the cross-attention keys and values of every layer, as a Cache each or stacked as
    the weights are; input_mask [b s] is False for padding. Both are None for a lone decoder.
    """

    cross_kv: Any = None
    input_mask: Bool[Array, "b s"] | None = None
