# SPDX-License-Identifier: Apache-2.0
"""Cache store that compresses: recent tokens as they are, one key and value for an older segment.

As SCOUT (arXiv 2509.00935) attends to recent tokens and to checkpoints of segments, without its
training: a checkpoint is the mean of its segment, and counts for as many tokens.
"""

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import api as kernels
from t5x_lite.model.cache import Cache, CacheStore, RingCache, TokenBlock
from t5x_lite.model.cache_slots import encode_block, write_rows
from t5x_lite.sharding import spec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ring", "checkpoints"],
    meta_fields=["recent", "segment"],
)
@dataclass(frozen=True)
class CheckpointCache:
    """Store of recent tokens and of checkpoints.

    A query at position t attends to a segment as one checkpoint if all of it is `recent` tokens
    or more before it, whatever block it is in: texts are the same with any drafter. Segments of
    tokens that are not rolled back are complete by then, as no block is wider than `recent`.

    Attributes:
      ring: the last tokens: `recent`, two segments and a block.
      checkpoints: means of segments, that of segment c in slot c + `spare`.
      recent: number of tokens that a query attends to one by one, or up to a segment more.
      segment: number of tokens of a segment.
    """

    ring: RingCache
    checkpoints: Cache
    recent: int
    segment: int

    @property
    def spare(self) -> int:
        """Number of segments that one block may complete; as many slots stand for no segment."""
        block = self.ring.slots - self.recent - 2 * self.segment
        return -(-block // self.segment) + 1

    @property
    def layout(self) -> Hashable:
        return self.recent, self.segment, self.ring.slots, self.checkpoints.slots

    def append(self, k, v, index) -> "CheckpointCache":
        """Writes a block, and the checkpoints of the segments that end before it.

        Args:
          k: [b k w h] new keys.
          v: [b k w h] new values.
          index: [b] position of the first.
        """
        store = replace(self, ring=self.ring.append(k, v, index))
        first = index // self.segment - self.spare
        places = jnp.arange(self.spare * self.segment)
        tokens = store.ring.take(first[:, None] * self.segment + places)
        return store.write(tokens, first + self.spare)

    def write(self, tokens: Cache, slot: Int[Array, " b"]) -> "CheckpointCache":
        """Writes checkpoints of whole segments of tokens, from a slot on."""

        def mean(x: Float[Array, "b k s h"]) -> Float[Array, "b k c h"]:
            b, k, _, h = x.shape
            placed = spec("batch kv_heads length whole head_dim")
            shape = (b, k, -1, self.segment, h)
            return jnp.mean(jnp.reshape(x, shape, out_sharding=placed), axis=3)

        pair = zip(self.checkpoints, tokens.read(None, jnp.float32), strict=True)
        block = Cache(*(encode_block(slots, mean(x)) for slots, x in pair))
        written = jax.tree.map(lambda x, new: write_rows(x, new, slot), self.checkpoints, block)
        return replace(self, checkpoints=written)

    def start(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the first position that a query at `index` attends to by itself."""
        return jnp.maximum(index - self.recent + 1, 0) // self.segment * self.segment

    def count(self, width: int) -> int:
        """Returns the number of tokens that a block of that width reads one by one."""
        return min(self.recent + self.segment + width, self.ring.slots)

    def read(self, block: TokenBlock, dtype: Any) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(self.count(block.tokens.shape[1]))
        tokens = self.ring.take(self.start(block.index)[:, None] + places)
        pairs = zip(self.checkpoints.read(None, dtype), tokens.read(None, dtype), strict=True)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in pairs)
        return keys, values

    def mask(self, block: TokenBlock) -> kernels.DenseMask:
        start, width = self.start(block.index), block.tokens.shape[1]
        index, size = block.index - start, self.count(width)
        near = kernels.CacheMask(index, width, size, block.depth, block.ancestors)
        queries = start[:, None] + near.query_positions()
        exact = self.start(queries)[:, :, None]
        tokens = start[:, None] + near.key_positions()
        number = jnp.arange(self.checkpoints.slots) - self.spare
        segments = start[:, None] * 0 + number * self.segment
        visible = [
            (segments >= 0)[:, None] & (segments[:, None] < exact),
            near.materialize() & ((start[:, None] + jnp.arange(size))[:, None] >= exact),
        ]
        positions = jnp.concatenate([segments + self.segment // 2, tokens], axis=1)
        distance = queries[:, :, None] - positions[:, None]
        return kernels.DenseMask(jnp.concatenate(visible, axis=2), distance)

    def log_counts(self, width: int) -> Float[Array, " s"]:
        counts = [self.segment] * self.checkpoints.slots + [1] * self.count(width)
        return jnp.array([math.log(count) for count in counts], jnp.float32)

    def compact(self, index, path) -> "CheckpointCache":
        return replace(self, ring=self.ring.compact(index, path))

    def take(self, places) -> Cache:
        return self.ring.take(places)

    def load(self, store: CacheStore, length) -> "CheckpointCache":
        start = jnp.zeros_like(length)
        if isinstance(store, CheckpointCache):
            loaded = replace(self, ring=self.ring.load(store.ring, length))
            slot = start + self.spare - store.spare
            copied = jax.tree.map(
                lambda x, old: write_rows(x, old, slot), self.checkpoints, store.checkpoints
            )
            return replace(loaded, checkpoints=copied)
        loaded = replace(self, ring=self.ring.load(store, length))
        places = jnp.arange((self.checkpoints.slots - self.spare) * self.segment)
        return loaded.write(store.take(start[:, None] + places), start + self.spare)
