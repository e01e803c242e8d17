# SPDX-License-Identifier: Apache-2.0
"""The gradient of the bias for GPUs: sums over pairs at the same distance, without atomics.

Distances below the last bucket boundary, each with a gradient to sum, lie in a band along the
diagonal. All tiles at the same place relative to their block of queries hold the same distances, so
a program sums such tiles elementwise; the few sums are added along their diagonals outside. Only
the work grows with length, not the memory.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash_triton import backward
from t5x_lite.kernels.flash_triton import tile as tiles
from t5x_lite.kernels.flash_triton.backward import KeyBlock, TritonQueryResiduals
from t5x_lite.kernels.flash_triton.tile import HeadContext, TritonFlashConfig, TritonFlashOperands

# Two programs for each of an H100's 132 processors.
PROGRAMS = 264


@dataclass(frozen=True)
class BiasBand:
    """Tiles beside each block of queries that hold every distance below the last boundary.

    Attributes:
      before: tiles before the block's first index.
      after: tiles from it on.
      splits: programs that share the blocks of queries.
    """

    before: int
    after: int
    splits: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.before + self.after


def make_band(
    config: TritonFlashConfig, index: int, last_boundary: int, rows: int, heads: int
) -> BiasBand:
    """Returns the band of a source.

    Args:
      config: sizes.
      index: of the source.
      last_boundary: distance from which on the bias no longer changes.
      rows: rows of the batch.
      heads: query heads.
    """
    queries, keys = config.block_sizes
    spec = config.sources[index]
    past_only = spec.causal and not spec.prefix
    before = pl.cdiv(last_boundary - 1, keys)
    after = pl.cdiv(queries if past_only else last_boundary - 1 + queries, keys)
    splits = PROGRAMS // (heads * (before + after))
    return BiasBand(before, after, max(1, min(splits, rows * config.query_blocks)))


def backward_bias(
    config: TritonFlashConfig,
    index: int,
    queries: TritonQueryResiduals,
    source: TritonFlashOperands,
    far_dbias: Float[Array, "b n 2 m"],
) -> Float[Array, "n d"]:
    """Returns the gradient of a source's bias.

    Args:
      config: sizes.
      index: of the source.
      queries: what the forward pass kept, and the gradient of its result.
      source: for programs of keys.
      far_dbias: [b n 2 m], the gradient of far distances by block of queries.
    """
    last = source.last_boundary
    b, heads, _ = queries.log_z.shape
    band = make_band(config, index, last, b, heads)
    leaves = jax.tree.leaves((queries, source))
    sizes = config.block_sizes
    shape = (heads, band.splits, sizes.query, band.tiles * sizes.key)
    sums = pl.pallas_call(
        functools.partial(backward_bias_kernel, config, index, band),
        grid=(band.tiles, band.splits, heads),
        out_shape=output_shape(shape, jnp.float32, *leaves),
        compiler_params=config.compiler_params(queries.q.dtype),
        interpret=config.backend.interpret,
        name="flash_attention_backward_bias",
    )(queries, source)
    near = sum_diagonals(jnp.sum(sums, axis=1))
    # The first row begins band.before tiles before it, and rows come the last one first.
    origin = sizes.query - 1 + band.before * sizes.key
    near = jnp.pad(near, ((0, 0), (0, last)))[:, origin - last + 1 : origin + last]
    behind, ahead = jnp.split(jnp.sum(far_dbias, axis=(0, 3)), 2, axis=1)
    return jnp.concatenate([behind, near, ahead], axis=1)


def sum_diagonals(x: Float[Array, "n r c"]) -> Float[Array, "n d"]:
    """Returns sums along diagonals: value d is that of column minus row equal to d - (r - 1)."""
    n, r, c = x.shape
    # In rows of r + c - 1 instead of r + c elements each begins one place later than the one above.
    padded = jnp.pad(x[:, ::-1], ((0, 0), (0, 0), (0, r))).reshape(n, -1)
    return jnp.sum(padded[:, : r * (r + c - 1)].reshape(n, r, r + c - 1), axis=1)


def backward_bias_kernel(
    config: TritonFlashConfig,
    source_index: int,
    band: BiasBand,
    queries,
    source: TritonFlashOperands,
    sums,
) -> None:
    """The sum of the tiles at one place of the band, over a share of all blocks of queries.

    Args:
      config: sizes.
      source_index: index of the source.
      band: its band.
      queries: references to whole arrays.
      source: references to whole arrays.
      sums: output, [n splits r c].
    """
    place, split, head_index = (pl.program_id(axis) for axis in range(3))
    rows, columns = config.block_sizes
    blocks = config.query_blocks

    def add(turn, total):
        item = split + turn * band.splits
        batch, block = jax.lax.div(item, blocks), jax.lax.rem(item, blocks)
        head = tiles.query_head(config, batch, head_index)
        index = tiles.index_range(block * rows, rows)
        query_tokens = tiles.load_tokens(source.query_ids, batch, index).as_rows
        begin = block * rows + source.offsets[0] + (place - band.before) * columns
        key_index = tiles.index_range(begin, columns)
        key_tokens = tiles.load_tokens(source.key_ids, batch, key_index).as_columns
        k, v = (tiles.load_keys(config, x, head, key_index) for x in (source.k, source.v))
        queries_block = backward.load_query_block(config, queries, head, index)
        context = HeadContext(config, config.sources[source_index], source, head)
        gradients = backward.tile_gradients(
            context, queries_block._replace(tokens=query_tokens), KeyBlock(k, v, key_tokens)
        )
        return total + gradients.dbias

    turns = jax.lax.div(queries.q.shape[0] * blocks - split + band.splits - 1, band.splits)
    total = jax.lax.fori_loop(0, turns, add, jnp.zeros((rows, columns), jnp.float32))
    row = jnp.arange(rows)[:, None]
    sums[head_index, split, row, place * columns + jnp.arange(columns)[None, :]] = total
