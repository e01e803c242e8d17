# SPDX-License-Identifier: Apache-2.0
"""Key-value cache of decoding: immutable values that every step takes and returns.

The cache of a model is a tuple of stores, one for each layer, which need not be alike; of stacked
weights it is one store with a first axis of layers.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.kernels import api as kernels
from t5x_lite.model.cache_slots import (
    AXES,
    Slots,
    empty_slots,
    quantize_slots,
    read_slots,
    write_rows,
    write_slots,
)
from t5x_lite.utils.not_none import not_none


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

    def mask(self, block: TokenBlock) -> kernels.CacheMask:
        """Returns the mask of the queries of a block over the keys of `read`."""

    def compact(self, index: Int[Array, " b"], path: Int[Array, "b D"]) -> "CacheStore":
        """Moves the tokens index + path of a tree to index, index + 1, ..., as of a chain."""

    def load(self, cache: "Cache", length: Int[Array, " b"]) -> "CacheStore":
        """Takes over the first length[b] tokens of a cache that holds whole rows."""

    def widen(self, added: int) -> "CacheStore":
        """Returns the store with room for so many more tokens."""


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

    def compact(self, index, path) -> "Cache":
        def compact_row(x, start, nodes):
            moved = jnp.take(x, start + nodes, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, moved, start, axis=1)

        return jax.tree.map(lambda x: jax.vmap(compact_row)(x, index, path), self)

    def load(self, cache: "Cache", length) -> "Cache":
        start = jnp.zeros_like(length)
        return jax.tree.map(lambda x, filled: write_rows(x, filled, start), self, cache)

    def widen(self, added: int) -> "Cache":
        pads = ((0, 0), (0, 0), (0, added), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, pads), self)


class EncoderMemory(NamedTuple):
    """Encoder output as the decoder attends to it.

    cross_kv has the cross-attention keys and values of every layer, as a Cache each or stacked as
    the weights are; input_mask [b s] is False for padding. Both are None for a lone decoder.
    """

    cross_kv: Any = None
    input_mask: Bool[Array, "b s"] | None = None


class CacheFormat(NamedTuple):
    """Form in which caches hold keys and values, of the decoder and of cross-attention.

    Attributes:
      key_bits: bits of a number of the keys, 8 or 4; None for the dtype of computation.
      value_bits: of the values.
    """

    key_bits: int | None = None
    value_bits: int | None = None

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of keys and of values."""
        return self.key_bits, self.value_bits

    def quantize(self, cache: Cache) -> Cache:
        """Returns the keys and values of an encoder's output in this format."""
        pairs = zip(cache, self.bits, strict=True)
        return Cache(*(x if bits is None else quantize_slots(x, bits) for x, bits in pairs))


WHOLE = CacheFormat()


def empty_cache(
    cfg: config.Model, rows: int, length: int, scan: bool = True, form: CacheFormat = WHOLE
) -> Any:
    """Returns a decoder cache of zeros.

    Args:
      cfg: architecture of the model.
      rows: number of rows.
      length: slots per row.
      scan: one store for stacked layers; False for a tuple of stores, for the weights of `unstack`.
      form: form of keys and values.
    """
    stack = not_none(cfg.decoder)
    shape = (rows, stack.key_heads, length, stack.head_dim)
    if scan:
        stacked, axes = (stack.layers, *shape), f"layers {AXES}"
        return Cache(*(empty_slots(stacked, cfg.dtype, bits, axes) for bits in form.bits))

    def store():
        return Cache(*(empty_slots(shape, cfg.dtype, bits) for bits in form.bits))

    return tuple(store() for _ in range(stack.layers))
