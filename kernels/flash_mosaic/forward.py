# SPDX-License-Identifier: Apache-2.0
"""Forward pass of attention with T5's bias for Hopper (FlashAttention-2, algorithm 1)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash_mosaic import tile as tiles
from t5x_lite.kernels.flash_mosaic.tile import BLOCK, STEPS, MosaicFlashConfig
from t5x_lite.kernels.tile_math import MASK_VALUE, finish_softmax


class MosaicOperands(NamedTuple):
    """Arrays of a call, padded to blocks, or the references to them.

    Attributes:
      k: [k bs h], keys.
      v: [k bs h], values.
      query_ids: [bt], segment ids of the queries.
      key_ids: [bs], segment ids of the keys.
      bias: [n r d], the bias of every tile of a head, side by side; of tiles with queries along
        rows, or with keys.
      first: for every block of one side of the batch the first block that it visits of its row.
      count: how many it visits.
    """

    k: Any
    v: Any
    query_ids: Any
    key_ids: Any
    bias: Any
    first: Any
    count: Any


def flash_forward(
    config: MosaicFlashConfig, q: Float[Array, "n bt h"], operands: MosaicOperands
) -> tuple[Float[Array, "n bt h"], Float[Array, "n bt"]]:
    """Returns the context like q, and log(Z) of every query.

    Args:
      config: sizes.
      q: queries.
      operands: with the visits of blocks of queries.
    """
    heads, length, _ = q.shape
    leaves = jax.tree.leaves((q, operands))
    batch = length // (BLOCK * config.query_blocks)
    run = config.kernel(
        functools.partial(forward_kernel, config),
        out_type=[
            output_shape(q.shape, q.dtype, *leaves),
            output_shape((heads, length), jnp.float32, *leaves),
        ],
        grid=(("head", heads), ("block", config.query_blocks), ("batch", batch)),
        scratch_types=[
            config.operand(q.dtype),
            plgpu.SMEM((BLOCK,), jnp.int32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
    return run(q, *operands)


def forward_kernel(config: MosaicFlashConfig, q, *references) -> None:
    """One block of queries of one head, over all its blocks of keys.

    Args:
      config: sizes.
      q: reference, [n bt h].
      *references: those of MosaicOperands, context [n bt h], log_z [n bt], and scratch.
    """
    source = MosaicOperands(*references[:7])
    context, log_z, q_tile, ids_tile, log_z_tile, loaded = references[7:]
    program = tiles.block_program(config, config.query_blocks)
    head, rows = program.head, program.rows
    pairs = (q.at[head, rows], q_tile), (source.query_ids.at[rows], ids_tile)
    tiles.load_tiles(pairs, loaded)
    queries = tiles.load_tokens(ids_tile, 0, program.block * BLOCK)
    first = source.first[program.run]

    def visit_keys(step, k_tile, v_tile, key_ids, bias, state):
        acc, m, l = state
        keys = tiles.load_tokens(key_ids, 1, (first + step[0]) * BLOCK)
        visible = tiles.visible_pairs(config, queries, keys)
        scores = tiles.masked_scores(config, q_tile, k_tile, bias, visible)
        m_new = jnp.maximum(m, scores.max(axis=1))
        p = tiles.exponential(visible, scores, tiles.spread(m_new, 0))
        alpha = jnp.exp(m - m_new)
        acc = acc * tiles.spread(alpha, 0, config.head_size)
        acc = acc + tiles.multiply(config, p.astype(v_tile.dtype), v_tile)
        return acc, m_new, l * alpha + p.sum(axis=1)

    rows_zero = tiles.zeros(BLOCK)
    pipeline = plgpu.emit_pipeline(
        visit_keys,
        grid=(source.count[program.run],),
        max_concurrent_steps=STEPS,
        init_carry=(tiles.zeros(BLOCK, config.head_size), rows_zero + MASK_VALUE, rows_zero),
        in_specs=tiles.key_specs(config, program, first),
    )
    acc, m, l = pipeline(*visited_keys(config, source, head))
    divisor, log_z_rows = finish_softmax(m, l)
    result = acc / tiles.spread(divisor, 0, config.head_size)
    tiles.store_tiles(
        (result, q_tile, context.at[head, rows]), (log_z_rows, log_z_tile, log_z.at[head, rows])
    )


def visited_keys(config: MosaicFlashConfig, source: MosaicOperands, head) -> tuple:
    """Returns references to the keys, values, their ids and the bias of a query head.

    Args:
      config: sizes.
      source: references to whole arrays.
      head: index of the query head.
    """
    key_head = jax.lax.div(head, jnp.int32(config.group))
    keys = source.k.at[key_head], source.v.at[key_head]
    return *keys, source.key_ids, source.bias.at[head]
