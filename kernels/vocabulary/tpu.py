# SPDX-License-Identifier: Apache-2.0
"""Cross entropy forward on TPU: a tile of rows by a tile of the vocabulary at a time.

The numbers of each row are along lanes ([k r]), where they need no padding.
Tiles past the end of the rows or of the vocabulary hold anything at all; what is summed over them
is masked. Axes: r rows, d width of the model, v ids of the vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.backend import Backend, output_shape
from t5x_lite.kernels.tile_math import dot_f32, update_softmax
from t5x_lite.kernels.vocabulary.config import VocabularyTiles, choose_tiles, pad_to_lanes
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig, SoftmaxStats


class VocabularySpecs(NamedTuple):
    """Blocks of the operands that a grid step reads.

    Attributes:
      hidden: of the hidden states.
      table: of the table.
      per_row: function of k: of k numbers per row.
    """

    hidden: pl.BlockSpec
    table: pl.BlockSpec
    per_row: Callable[[int], pl.BlockSpec]


@dataclass(frozen=True)
class VocabularySizes:
    """Sizes of a kernel call, and how they are cut.

    Attributes:
      rows: rows that exist.
      ids: ids that exist on this device.
      tiles: sizes of a tile.
    """

    rows: int
    ids: int
    tiles: VocabularyTiles

    def specs(self, width: int, tied: bool, rows_first: bool) -> VocabularySpecs:
        """Returns the blocks of the operands.

        Args:
          width: of the model.
          tied: the table is [v d].
          rows_first: the grid is (rows, ids), not (ids, rows).
        """
        rows, ids = self.tiles.rows, self.tiles.ids

        def row_block(i, j):
            return i if rows_first else j

        def id_block(i, j):
            return j if rows_first else i

        def per_row(k: int) -> pl.BlockSpec:
            return pl.BlockSpec((k, rows), lambda i, j: (0, row_block(i, j)))

        hidden = pl.BlockSpec((rows, width), lambda i, j: (row_block(i, j), 0))
        if tied:
            table = pl.BlockSpec((ids, width), lambda i, j: (id_block(i, j), 0))
        else:
            table = pl.BlockSpec((width, ids), lambda i, j: (0, id_block(i, j)))
        return VocabularySpecs(hidden, table, per_row)

    @property
    def cuts_rows(self) -> bool:
        """True if the last tile of rows goes past the end."""
        return self.rows % self.tiles.rows > 0

    @property
    def cuts_ids(self) -> bool:
        """True if the last tile of ids goes past the end."""
        return self.ids % self.tiles.ids > 0


def pad_operands(hidden, table, config: CrossEntropyConfig, backend: Backend, summed: str = ""):
    """Returns hidden and table with at least one tile's rows and ids, and their true sizes.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      config: of the logits.
      backend: what runs the kernels.
      summed: "rows" or "ids" where a gradient is summed for each of these.
    """
    ids = config.local_size(table)
    padded = pad_to_lanes(hidden, 0)
    table = pad_to_lanes(table, 0 if config.tied else 1)
    tiles = choose_tiles(padded, config.local_size(table), backend, summed)
    return padded, table, VocabularySizes(hidden.shape[0], ids, tiles)


def call_kernel(
    kernel, operands, sizes: VocabularySizes, backend: Backend, summed: str = "", **blocks
) -> jax.Array:
    """Runs a kernel over tiles of rows by tiles of ids, the inner ones in order.

    Args:
      kernel: the kernel.
      operands: hidden, table, and numbers per row.
      sizes: sizes of a tile.
      backend: what runs the kernel.
      summed: "ids" has rows inside, otherwise ids are; "" has one product per tile, not two.
      **blocks: in_specs, out_specs, out_shape and scratch_shapes of the call.
    """
    hidden, table, _ = operands
    ids = table.size // hidden.shape[1]
    grid = sizes.tiles.grid(hidden.shape[0], ids)
    # What is outside is fetched once, what is inside as often as there are tiles outside.
    fetched = hidden.nbytes + grid[0] * table.nbytes
    if summed == "ids":
        fetched, grid = grid[1] * hidden.nbytes + table.nbytes, grid[::-1]
    products = 2 if summed else 1
    result = blocks["out_shape"]
    return pl.pallas_call(
        kernel,
        grid=grid,
        interpret=backend.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.tiles.memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * hidden.size * ids,
            bytes_accessed=fetched + result.size * result.dtype.itemsize,
            transcendentals=hidden.shape[0] * ids,
        ),
        **blocks,
    )(*operands)


def fused_stats(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    config: CrossEntropyConfig,
    backend: Backend,
) -> SoftmaxStats:
    """Returns the statistics of each row over this device's part of the vocabulary.

    The sum of logits is 0 where there is no smoothing.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      targets: [r], counted within this part.
      config: of the logits.
      backend: what runs the kernel.
    """
    hidden, table, sizes = pad_operands(hidden, table, config, backend)
    targets = pad_to_lanes(targets[None], 1)
    specs = sizes.specs(hidden.shape[1], config.tied, rows_first=True)
    stats = call_kernel(
        functools.partial(stats_kernel, sizes=sizes, config=config),
        (hidden, table, targets),
        sizes,
        backend,
        in_specs=[specs.hidden, specs.table, specs.per_row(1)],
        out_specs=specs.per_row(5),
        out_shape=output_shape((5, hidden.shape[0]), jnp.float32, hidden, table, targets),
    )
    return SoftmaxStats(*stats[:, : sizes.rows])


def stats_kernel(
    hidden, table, targets, stats, *, sizes: VocabularySizes, config: CrossEntropyConfig
):
    """Takes one tile of ids into the statistics of a tile of rows.

    Args:
      hidden: reference, [r d].
      table: reference, [v d] or [d v].
      targets: reference, [1 r].
      stats: output, [5 r], the fields of SoftmaxStats.
      sizes: sizes of a tile.
      config: of the logits.
    """
    block = pl.program_id(1)

    @pl.when(block == 0)
    def begin():
        stats[0:1] = jnp.full_like(stats[0:1], -jnp.inf)
        stats[1:4] = jnp.zeros_like(stats[1:4])
        stats[4:5] = jnp.full_like(stats[4:5], -jnp.inf)

    products = dot_f32(table[...], hidden[...], (1 if config.tied else 0, 1))
    logits = config.scale_and_cap(products)
    ids = block * sizes.tiles.ids + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    present = logits
    if sizes.cuts_ids:
        present = jnp.where(ids < sizes.ids, logits, -jnp.inf)
    update = update_softmax(stats[0:1], stats[1:2], present, axis=0)
    stats[1:2] = update.l
    stats[0:1] = update.m
    others = jnp.where(ids == targets[...], -jnp.inf, present)
    stats[4:5] = jnp.maximum(stats[4:5], jnp.max(others, axis=0, keepdims=True))
    target_logit = jnp.where(ids == targets[...], logits, 0)
    stats[2:3] += jnp.sum(target_logit, axis=0, keepdims=True)
    if config.smoothing > 0:
        if sizes.cuts_ids:
            present = jnp.where(ids < sizes.ids, logits, 0)
        stats[3:4] += jnp.sum(present, axis=0, keepdims=True)
