# SPDX-License-Identifier: Apache-2.0
"""Tiles of scores in the TPU kernels: masks, heads in lanes, and the loop over tiles to visit.

Axes: r rows and c columns of a tile, w lanes of a block of heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.flash import toeplitz
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.flash.config import FlashConfig, FlashScalars, SourceSpec
from t5x_lite.kernels.tile_math import LANES


class Tile(NamedTuple):
    """A tile of scores to visit.

    Attributes:
      source: index of its source.
      query: index of its first query.
      key: index of its first key.
      direction: 1 where keys are along columns, -1 where queries are.
      masked: False if nothing of it is masked.
    """

    source: int
    query: Int[Array, ""]
    key: Int[Array, ""]
    direction: int
    masked: bool = True

    def toeplitz_start(self, origin: Int[Array, ""]) -> Int[Array, ""]:
        """Returns where the tile begins in a vector by column minus row that begins at origin."""
        return self.direction * (self.key - self.query) - origin


def lanes_to_sublanes(row: Float[Array, "1 r"]) -> Float[Array, "r 128"]:
    """Returns a row as a column, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def sublanes_to_lanes(column: Float[Array, "r 128"]) -> Float[Array, "1 r"]:
    """Inverse of `lanes_to_sublanes`."""
    return column.T[:1]


def visible_pairs(
    spec: SourceSpec,
    tile: Tile,
    scalars: FlashScalars,
    row_ids: Int[Array, "r 1"],
    column_ids: Int[Array, "1 c"],
) -> Bool[Array, "r c"]:
    """Returns True where the query of a pair attends to its key.

    Args:
      spec: which rules there are.
      tile: where it is.
      scalars: offset and window.
      row_ids: [r 1], segment ids along rows.
      column_ids: [1 c], segment ids along columns.
    """
    same = (row_ids ^ column_ids) & -2 == 0 if spec.prefix else row_ids == column_ids
    if not (spec.causal or spec.window):
        return same
    offset, left, right = (scalars.offsets[i] for i in range(3))

    def index(axis: int):
        return jax.lax.broadcasted_iota(jnp.int32, same.shape, axis)

    # Key minus query, both counted from the tile's first; equal to `diagonal` at distance 0.
    distance = index(1) - index(0) if tile.direction > 0 else index(0) - index(1)
    diagonal = tile.query + offset - tile.key
    if spec.causal:
        past = distance <= diagonal
        if spec.prefix:
            past = past | (row_ids & column_ids & 1 != 0)
        same = same & past
    if spec.window:
        same = same & (distance >= diagonal - left) & (distance <= diagonal + right)
    return same


def is_unmasked(
    spec: SourceSpec, tile: Tile, scalars: FlashScalars, sizes: BlockSizes
) -> Bool[Array, ""]:
    """Returns True if causality and window mask nothing of the tile.

    Args:
      spec: which rules there are.
      tile: where it is.
      scalars: offset and window.
      sizes: queries and keys of a tile.
    """
    offset, left, right = (scalars.offsets[i] for i in range(3))
    most = tile.key + sizes.key - 1 - (tile.query + offset)
    least = tile.key - (tile.query + offset + sizes.query - 1)
    unmasked = most <= (0 if spec.causal else most)
    return unmasked & (least >= -left) & (most <= right) if spec.window else unmasked


def floor_divide(x, divisor: int):
    """Returns x // divisor for x >= 0: Mosaic has no division that rounds down."""
    return x if divisor == 1 else jax.lax.div(x, jnp.int32(divisor))


def lane_heads(config: FlashConfig, x) -> Int[Array, "r w"]:
    """Returns the packed head of every lane of x."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return lane >> (config.head_lanes.bit_length() - 1)


def head_shift(config: FlashConfig, block, head: int) -> Int[Array, ""]:
    """Returns the lanes from a query head to its key head.

    Args:
      config: sizes.
      block: index of the block of query heads.
      head: index of the head inside it.
    """
    last = config.block_heads - 1  # block_heads is a power of two
    key_head = floor_divide(block * config.block_heads + head, config.group) & last
    return ((key_head - head) & last) * config.head_lanes


def select_head(config: FlashConfig, x: Float[Array, "r w"], block, head: int):
    """Returns one query head of x, in the lanes of its key head, with 0 in the others.

    Args:
      config: sizes.
      x: [r w], a block of query heads.
      block: its index.
      head: index of the head inside it.
    """
    if config.block_heads == 1:
        return x
    alone = jnp.where(lane_heads(config, x) == head, x.astype(jnp.float32), 0)
    if config.group > 1:
        alone = pltpu.roll(alone, head_shift(config, block, head), 1)
    return alone.astype(x.dtype)


def restore_head(config: FlashConfig, x: Float[Array, "r w"], block, head: int):
    """Returns the lanes of a key head back at those of a query head, with 0 in the others: the
    inverse of `select_head`.

    Args:
      config: sizes.
      x: [r w], in the lanes of the key head.
      block: index of the block of query heads.
      head: index of the head inside it.
    """
    if config.block_heads == 1:
        return x
    if config.group > 1:
        x = pltpu.roll(x, -head_shift(config, block, head) & (config.block_lanes - 1), 1)
    return jnp.where(lane_heads(config, x) == head, x, 0)


def zero_past_end(x: Float[Array, "r w"], first, length: int, block: int):
    """Returns x with 0 in rows past the end, where memory holds anything.

    Args:
      x: [r w], a block of rows.
      first: index of its first row.
      length: number of rows that exist.
      block: rows of a block.
    """
    if length % block == 0:
        return x
    index = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(index < length, x.astype(jnp.float32), 0).astype(x.dtype)


def expand_bias(vectors, scratch) -> None:
    """Writes every head's vector [1 p d], expanded along diagonals, into scratch [p 128 d]."""
    for head in range(scratch.shape[0]):
        scratch[head] = toeplitz.expand_vector(vectors[0, head : head + 1])


def key_block_index(
    config: FlashConfig, scalars: tuple[FlashScalars, ...], source: int, grid_step: tuple
) -> Int[Array, ""]:
    """Returns the block of keys of a source at a grid step.

    Blocks of the sources come one after the other. Before its first and after its last one the
    nearest is named, so that nothing is fetched.

    Args:
      config: sizes.
      scalars: of all sources.
      source: index of the source.
      grid_step: block of heads, row, block of queries, step.
    """
    _, row, block, step = grid_step
    index = row * config.query_blocks + block
    counts = [each.block_mask.count[index] for each in scalars[: source + 1]]
    place = jnp.clip(step - sum(counts[:-1]), 0, jnp.maximum(counts[-1] - 1, 0))
    return scalars[source].block_mask.first[index] + place


def visit_tiles(config: FlashConfig, scalars: tuple[FlashScalars, ...], visit: Callable) -> None:
    """Calls visit(tile) if this grid step has a tile.

    Args:
      config: sizes.
      scalars: of all sources.
      visit: takes the Tile.
    """
    grid_step = tuple(pl.program_id(axis) for axis in range(4))
    _, row, block, step = grid_step
    index = row * config.query_blocks + block
    begin = 0
    for source, (spec, each) in enumerate(zip(config.sources, scalars, strict=True)):
        count = each.block_mask.count[index]
        active = (step >= begin) & (step < begin + count)
        key = key_block_index(config, scalars, source, grid_step)
        sizes = config.block_sizes
        tile = Tile(source, block * sizes.query, key * sizes.key, direction=1)
        key_segment = each.block_mask.other_segment[row * config.key_blocks(source) + key]
        unmasked = each.block_mask.segment[index] == key_segment
        unmasked = unmasked & is_unmasked(spec, tile, each, sizes)
        pl.when(active & unmasked)(functools.partial(visit, tile._replace(masked=False)))
        pl.when(active & ~unmasked)(functools.partial(visit, tile))
        begin = begin + count
