# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Mosaic GPU kernels: sizes, products, masks, and the bias as whole tiles.

Axes: n query heads, k key heads, b batch, t queries, s keys (padded to blocks), h head size,
r rows and c columns of a tile. A program is one warpgroup with a block of one head; arrays are
head by head, the rows of the batch one after the other.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.kernels.tile_math import MASK_VALUE

# Queries and keys of a tile: what one warpgroup multiplies at a time.
BLOCK = 64
SIZES = BlockSizes(BLOCK, BLOCK)
# Tiles of two steps are in shared memory: one is loaded while the other is multiplied.
STEPS = 2


@dataclass(frozen=True)
class MosaicFlashConfig:
    """Static sizes of a call.

    Attributes:
      group: query heads of a key head.
      head_size: size of a head, 64 or 128.
      query_blocks: blocks of queries in a row.
      key_blocks: blocks of keys in a row.
      reach: blocks from a block's own on whose bias still changes.
      causal: no query attends to a later key.
      interpret: kernels run in the interpreter.
    """

    group: int
    head_size: int
    query_blocks: int
    key_blocks: int
    reach: int
    causal: bool
    interpret: bool

    def kernel(self, body, out_type, grid, scratch_types):
        """Returns a function of arrays that runs a kernel for every program of a grid.

        Args:
          body: the kernel.
          out_type: shapes of its results.
          grid: names and sizes of the axes.
          scratch_types: its shared memory and barriers.
        """
        return make_kernel(body, out_type, grid, scratch_types, self.interpret)

    def operand(self, dtype) -> Any:
        """Returns the type of a block of queries or keys in shared memory."""
        return plgpu.SMEM((BLOCK, self.head_size), dtype, transforms=transforms())

    def bias_tile(self, row_block, column_block) -> jax.Array:
        """Returns the index of a pair of blocks' bias among the tiles of a head."""
        return jnp.clip(column_block - row_block, -self.reach, self.reach) + self.reach


def make_kernel(body, out_type, grid, scratch_types, interpret: bool):
    """Returns a function of arrays that runs a kernel for every program of a grid.

    Args:
      body: the kernel.
      out_type: shapes of its results.
      grid: names and sizes of the axes.
      scratch_types: its shared memory and barriers.
      interpret: runs it in the interpreter, which raises for a race.
    """
    names, sizes = zip(*grid, strict=True)
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=sizes,
        grid_names=names,
        scratch_types=scratch_types,
        **options,
    )


def transforms() -> tuple:
    """Returns the layout of shared memory from which 16-bit operands are multiplied."""
    # Jax's types leave a method of these abstract.
    mosaic: Any = plgpu
    return mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)


def bias_reach(bias: RelativePositionBias) -> int:
    """Returns the number of blocks from which on all pairs of a tile have the same bias."""
    return -(-(bias.last_boundary + BLOCK - 1) // BLOCK)


def bias_values(bias: RelativePositionBias) -> Float[Array, "n d"]:
    """Returns the bias by key index minus query index that all tiles of a head are made of."""
    reach = bias_reach(bias)
    return bias.by_distance(1 - (reach + 1) * BLOCK, (2 * reach + 2) * BLOCK)


class MosaicProgram(NamedTuple):
    """Block of one head that a program computes.

    Attributes:
      head: query head.
      key_head: its key head.
      block: index of the block in its row.
      batch: row of the batch.
      run: index of the block in all rows.
      rows: slice of its tokens in all rows.
    """

    head: jax.Array
    key_head: jax.Array
    block: jax.Array
    batch: jax.Array
    run: jax.Array
    rows: Any


def block_program(config: MosaicFlashConfig, blocks: int) -> MosaicProgram:
    """Returns the block of this program in a grid of heads, blocks of a row and rows."""
    head, block, batch = (jax.lax.axis_index(axis) for axis in ("head", "block", "batch"))
    key_head = jax.lax.div(head, jnp.int32(config.group))
    run = batch * blocks + block
    return MosaicProgram(head, key_head, block, batch, run, pl.ds(run * BLOCK, BLOCK))


def load_tiles(pairs, loaded) -> None:
    """Copies arrays to shared memory, and waits for all of them.

    Args:
      pairs: references to an array and to where it goes in shared memory.
      loaded: barrier of so many arrivals.
    """
    for reference, tile in pairs:
        plgpu.copy_gmem_to_smem(reference, tile, loaded)
    plgpu.barrier_wait(loaded)


def store_tiles(*results) -> None:
    """Writes values to arrays, and waits until they are there.

    Args:
      *results: value, reference to shared memory, and reference to where it goes.
    """
    for value, tile, _ in results:
        tile[...] = value.astype(tile.dtype)
    plgpu.commit_smem()
    for _, tile, reference in results:
        plgpu.copy_smem_to_gmem(tile, reference)
    plgpu.wait_smem_to_gmem(0)


class MosaicTokens(NamedTuple):
    """Queries or keys of a tile.

    Attributes:
      ids: [r] or [c], their segment ids.
      axis: 0 where they are along rows, 1 along columns.
      first: index of the first.
    """

    ids: Any
    axis: int
    first: Any


def statistics_layout(axis: int):
    """Returns the layout of one value for each row (axis 0) or column (axis 1) of a tile."""
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def load_tokens(ids, axis: int, first) -> MosaicTokens:
    """Returns the tokens of a tile.

    Args:
      ids: reference to their ids in shared memory.
      axis: of the tile.
      first: index of the first.
    """
    return MosaicTokens(plgpu.load(ids, layout=statistics_layout(axis)), axis, first)


def spread(x: jax.Array, axis: int, columns: int = BLOCK) -> jax.Array:
    """Returns one value for each row or column in all elements of a tile.

    Args:
      x: [r] or [c].
      axis: 0 where they are of rows, 1 of columns.
      columns: of the tile.
    """
    return jax.lax.broadcast_in_dim(x, (BLOCK, columns), [axis])


def visible_pairs(
    config: MosaicFlashConfig, queries: MosaicTokens, keys: MosaicTokens
) -> jax.Array:
    """Returns True where the query of a pair attends to its key.

    Args:
      config: causal or not.
      queries: along either axis.
      keys: along the other axis.
    """
    same = spread(queries.ids, queries.axis) == spread(keys.ids, keys.axis)
    if not config.causal:
        return same
    query, key = (
        plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), tokens.axis, layout=plgpu.Layout.WGMMA)
        + tokens.first
        for tokens in (queries, keys)
    )
    return same & (key <= query)


def multiply(config: MosaicFlashConfig, left, right) -> Float[Array, "r c"]:
    """Returns a product in float32.

    On the device a left operand may be in registers; the interpreter of jax 0.12 knows shared
    memory alone, so there it is stored first.

    Args:
      config: interpreted or not.
      left: [r h], reference to shared memory, or a value.
      right: [h c], reference to shared memory.
    """

    def product(operand, acc):
        plgpu.wgmma(acc, operand, right)
        return acc[...]

    def multiply_stored(stored):
        stored[...] = left
        plgpu.commit_smem()
        return pl.run_scoped(functools.partial(product, stored), acc)

    acc = plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32)
    if isinstance(left, jax.Array) and config.interpret:
        shared = plgpu.SMEM(left.shape, left.dtype, transforms=transforms())
        return pl.run_scoped(multiply_stored, shared)
    return pl.run_scoped(functools.partial(product, left), acc)


def zeros(*shape: int) -> jax.Array:
    """Returns float32 zeros, of a tile or of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else statistics_layout(0)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def masked_scores(config: MosaicFlashConfig, left, right, bias, visible) -> Float[Array, "r c"]:
    """Returns the scores of a tile with their bias, MASK_VALUE where masked.

    Args:
      config: sizes.
      left: queries or keys, along rows.
      right: the others.
      bias: reference to the tile's bias.
      visible: True where a query attends to a key.
    """
    scores = multiply(config, left, right.transpose((1, 0)))
    scores = scores + plgpu.load(bias, layout=plgpu.Layout.WGMMA)
    return jnp.where(visible, scores, MASK_VALUE)


def exponential(visible, scores, log_z) -> Float[Array, "r c"]:
    """Returns the probabilities of a tile, 0 where masked.

    Args:
      visible: True where a query attends to a key.
      scores: of the tile.
      log_z: log(Z) of the queries, spread over the tile.
    """
    return jnp.where(visible, jnp.exp(scores - log_z), 0.0)


def token_blocks(config: MosaicFlashConfig, index_of) -> plgpu.BlockSpec:
    """Returns the blocks of [bt h] or [bs h] that the steps of a pipeline read."""
    return plgpu.BlockSpec(
        (BLOCK, config.head_size), lambda step: (index_of(step), 0), transforms=transforms()
    )


def row_blocks(index_of) -> plgpu.BlockSpec:
    """Returns the blocks of [bt] or [bs] that the steps of a pipeline read."""
    return plgpu.BlockSpec((BLOCK,), lambda step: (index_of(step),))


def key_specs(config: MosaicFlashConfig, program: MosaicProgram, first) -> list:
    """Returns the blocks of k, v, key_ids and bias that a block of queries visits.

    Args:
      config: sizes.
      program: the block of queries.
      first: its first block of keys.
    """

    def key_block(step):
        return program.batch * config.key_blocks + first + step

    tokens = token_blocks(config, key_block)
    bias = bias_blocks(lambda step: config.bias_tile(program.block, first + step))
    return [tokens, tokens, row_blocks(key_block), bias]


def bias_blocks(index_of) -> plgpu.BlockSpec:
    """Returns the tiles of [r d] that the steps of a pipeline read."""
    return plgpu.BlockSpec((BLOCK, BLOCK), lambda step: (0, index_of(step)))
