# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Triton flash kernels: operands, loads and stores, masks and biases.

A tile has queries along one axis and keys along the other, either way round: indices and segment
ids of tokens come as [r 1] or [1 c], so that the same lines say which query attends to which key.
Axes: r rows, c columns, h head size; the head size is padded to a power of two in a kernel, as
Triton requires.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.flash import block_mask
from t5x_lite.kernels.flash.block_mask import PADDING_ID, BlockSizes
from t5x_lite.kernels.flash.config import FlashBaseConfig, SourceSpec
from t5x_lite.kernels.mask import Mask

# Least size of either side of a product in Triton.
MIN_SIZE = 16


@dataclass(frozen=True)
class TritonFlashConfig(FlashBaseConfig):
    """Sizes of a kernel call on a GPU.

    Attributes:
      head_size: size of a head.
    """

    head_size: int

    @property
    def padded_size(self) -> int:
        """Size of a head in a kernel, a power of two."""
        return max(MIN_SIZE, pl.next_power_of_2(self.head_size))

    def compiler_params(self, dtype) -> plgpu.CompilerParams:
        """Returns warps and stages: two stages hold two blocks of each operand; of float32 that is
        too much memory."""
        stages = 2 if dtype.itemsize < 4 else 1
        warps = 4 if self.padded_size <= 128 else 8
        return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


# For heads up to 64, 128 and more, by the bytes of an element. Triton 3.9 and ptxas make of these,
# with all parts of one source, programs for compute capability 8.0, 9.0, 10.0 that spill at most 8
# bytes of registers and take up to 74 KB of shared memory (the bias's gradient, on 9.0: 106).
# Float32 is multiplied exactly, outside of tensor cores: tiles of 64 by 64 spill 33 KB. Not timed.
LARGEST_BLOCKS = {
    2: (BlockSizes(64, 64), BlockSizes(64, 32), BlockSizes(32, 32)),
    4: (BlockSizes(32, 32), BlockSizes(32, 16), BlockSizes(16, 16)),
}


def largest_blocks(size: int, dtype) -> BlockSizes:
    """Returns the largest blocks for heads of this size."""
    return LARGEST_BLOCKS[dtype.itemsize][0 if size <= 64 else 1 if size <= 128 else 2]


class TritonFlashOperands(NamedTuple):
    """A source, or the references to its arrays.

    Attributes:
      k: [b k s h], keys.
      v: [b k s h], values.
      query_ids: [b t2], segment ids of the queries, padded to blocks.
      key_ids: [b s2], segment ids of the keys, padded to blocks.
      bias: [n d], by key index minus query index, from -last_boundary to last_boundary; or None.
      offsets: [3], index of the first query among the keys, window to the left and to the right.
      first: [m], for every block of one side the first block of the other side that it visits.
      count: [m], how many it visits.
    """

    k: Any
    v: Any
    query_ids: Any
    key_ids: Any
    bias: Any
    offsets: Any
    first: Any
    count: Any

    @property
    def last_boundary(self) -> int:
        """Distance from which on the bias no longer changes."""
        return self.bias.shape[1] // 2


def make_operands(
    k, v, bias, mask: Mask, sizes: BlockSizes
) -> tuple[TritonFlashOperands, TritonFlashOperands]:
    """Returns a source for kernels whose programs have a block of queries, and for those of keys.

    Args:
      k: [b k s h], keys.
      v: [b k s h], values.
      bias: [n d], by distance, or None.
      mask: of whole rows.
      sizes: queries and keys of a block.
    """
    segment_ids = block_mask.make_segment_ids(mask, sizes)
    needed = block_mask.needed_blocks(mask, segment_ids, sizes)
    offsets = jnp.stack([jnp.int32(x) for x in mask.index_scalars()])
    query_ids, key_ids = segment_ids.query[:, 0], segment_ids.key[:, 0]
    transposed = jnp.swapaxes(needed, 1, 2)
    by_query, by_key = (
        TritonFlashOperands(k, v, query_ids, key_ids, bias, offsets, *block_mask.block_runs(blocks))
        for blocks in (needed, transposed)
    )
    return by_query, by_key


class QueryHead(NamedTuple):
    """A query head of one row of the batch.

    Attributes:
      batch: row of the batch.
      key_head: its key head.
      member: its place among the query heads of the key head.
    """

    batch: Int[Array, ""]
    key_head: Int[Array, ""]
    member: Int[Array, ""]


def query_head(config: TritonFlashConfig, batch, head) -> QueryHead:
    """Returns a query head by its index.

    Args:
      config: sizes.
      batch: row of the batch.
      head: index of the query head.
    """
    group = jnp.int32(config.group)
    return QueryHead(batch, jax.lax.div(head, group), jax.lax.rem(head, group))


class HeadContext(NamedTuple):
    """One query head over one source.

    Attributes:
      config: sizes.
      spec: static features of the source.
      source: references to its arrays.
      head: the query head.
    """

    config: TritonFlashConfig
    spec: SourceSpec
    source: TritonFlashOperands
    head: QueryHead


class TileTokens(NamedTuple):
    """Queries or keys of a tile, along rows or along columns.

    Attributes:
      index: of each token.
      segment_id: of each token.
    """

    index: Int[Array, " #r #c"]
    segment_id: Int[Array, " #r #c"]

    @property
    def as_rows(self) -> "TileTokens":
        """The tokens along rows, [r 1]."""
        return TileTokens(self.index[:, None], self.segment_id[:, None])

    @property
    def as_columns(self) -> "TileTokens":
        """The tokens along columns, [1 c]."""
        return TileTokens(self.index[None, :], self.segment_id[None, :])


def index_range(first, length: int) -> Int[Array, " r"]:
    """Returns the indices from first on."""
    return first + jnp.arange(length)


def load_tokens(segment_ids, batch, index) -> TileTokens:
    """Returns tokens by their indices; those past either end are padding.

    Args:
      segment_ids: reference, [b t2].
      batch: row of the batch.
      index: [r], indices.
    """
    inside = (index >= 0) & (index < segment_ids.shape[1])
    at = segment_ids.at[batch, index]
    return TileTokens(index, plgpu.load(at, mask=inside, other=PADDING_ID))


def block_columns(
    config: TritonFlashConfig, x, index, axis: int
) -> tuple[Int[Array, "1 h"], Bool[Array, "r h"]]:
    """Returns the columns of a block of x, and which of its elements exist.

    Args:
      config: sizes.
      x: reference, for its shape.
      index: [r], indices along the axis of tokens.
      axis: that axis of x.
    """
    column = jnp.arange(config.padded_size)[None, :]
    exists = (index >= 0) & (index < x.shape[axis])
    return column, exists[:, None] & (column < config.head_size)


def load_queries(config: TritonFlashConfig, x, head: QueryHead, index) -> Float[Array, "r h"]:
    """Returns rows of x, 0 where they do not exist.

    Args:
      config: sizes.
      x: reference, [b t k g h].
      head: a query head.
      index: [r], indices of queries.
    """
    column, exists = block_columns(config, x, index, 1)
    at = x.at[head.batch, index[:, None], head.key_head, head.member, column]
    return plgpu.load(at, mask=exists, other=0.0)


def store_queries(config: TritonFlashConfig, x, head: QueryHead, index, value) -> None:
    """Writes rows of x.

    Args:
      config: sizes.
      x: reference, [b t k g h].
      head: a query head.
      index: [r], indices of queries.
      value: [r h], what to write.
    """
    column, exists = block_columns(config, x, index, 1)
    at = x.at[head.batch, index[:, None], head.key_head, head.member, column]
    plgpu.store(at, value.astype(x.dtype), mask=exists)


def load_keys(config: TritonFlashConfig, x, head: QueryHead, index) -> Float[Array, "r h"]:
    """Returns rows of x, 0 where they do not exist.

    Args:
      config: sizes.
      x: reference, [b k s h].
      head: a query head, for its key head.
      index: [r], indices of keys.
    """
    column, exists = block_columns(config, x, index, 2)
    at = x.at[head.batch, head.key_head, index[:, None], column]
    return plgpu.load(at, mask=exists, other=0.0)


def store_keys(config: TritonFlashConfig, x, head: QueryHead, index, value) -> None:
    """Writes rows of x.

    Args:
      config: sizes.
      x: reference, [b k s h].
      head: a query head, for its key head.
      index: [r], indices of keys.
      value: [r h], what to write.
    """
    column, exists = block_columns(config, x, index, 2)
    at = x.at[head.batch, head.key_head, index[:, None], column]
    plgpu.store(at, value.astype(x.dtype), mask=exists)


def statistics_at(config: TritonFlashConfig, x, head: QueryHead, index):
    """Returns references to statistics of queries in x, and which of them exist.

    Args:
      config: sizes.
      x: reference, [b n t].
      head: a query head.
      index: [r], indices of queries.
    """
    inside = (index >= 0) & (index < x.shape[2])
    return x.at[head.batch, head.key_head * config.group + head.member, index], inside


def load_statistics(config: TritonFlashConfig, x, head: QueryHead, index) -> Float[Array, " r"]:
    """Returns statistics of queries, 0 where they do not exist.

    Args:
      config: sizes.
      x: reference, [b n t].
      head: a query head.
      index: [r], indices of queries.
    """
    at, inside = statistics_at(config, x, head, index)
    return plgpu.load(at, mask=inside, other=0.0)


def visible_pairs(
    spec: SourceSpec, source: TritonFlashOperands, queries: TileTokens, keys: TileTokens
) -> Bool[Array, "r c"]:
    """Returns True where the query of a pair attends to its key.

    Args:
      spec: which rules there are.
      source: for offset and window.
      queries: of the tile.
      keys: of the tile.
    """
    if spec.prefix:
        same = ((queries.segment_id ^ keys.segment_id) & -2) == 0
    else:
        same = queries.segment_id == keys.segment_id
    if not (spec.causal or spec.window):
        return same
    distance = distances(source, queries, keys)
    if spec.causal:
        past = distance <= 0
        if spec.prefix:
            past = past | ((queries.segment_id & keys.segment_id & 1) != 0)
        same &= past
    if spec.window:
        same &= (distance >= -source.offsets[1]) & (distance <= source.offsets[2])
    return same


def distances(
    source: TritonFlashOperands, queries: TileTokens, keys: TileTokens
) -> Int[Array, "r c"]:
    """Returns key index minus query index, both among the keys.

    Args:
      source: for the offset of the queries.
      queries: of the tile.
      keys: of the tile.
    """
    return keys.index - queries.index - source.offsets[0]


def load_bias(context: HeadContext, distance: Int[Array, "r c"]) -> Float[Array, "r c"] | None:
    """Returns the bias of every pair, by key index minus query index; None without a bias.

    The vector has a few hundred elements, so it is read from the GPU's cache.
    """
    source, head = context.source, context.head
    if source.bias is None:
        return None
    last = source.last_boundary
    column = jnp.clip(distance, -last, last) + last
    return plgpu.load(source.bias.at[head.key_head * context.config.group + head.member, column])
