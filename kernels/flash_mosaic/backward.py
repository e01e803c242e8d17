# SPDX-License-Identifier: Apache-2.0
"""Backward pass of attention with T5's bias for Hopper: queries, keys, and the bias.

A tile's probabilities are made again from log(Z) (FlashAttention-2, algorithm 2). The bias of
blocks that are further apart than its reach is one number on either side: its gradient is summed
beside that of the queries. Nearer tiles at the same distance of blocks share their bias: programs
sum the gradient of such tiles elementwise, without atomics.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash_mosaic import tile as tiles
from t5x_lite.kernels.flash_mosaic.forward import MosaicOperands, visited_keys
from t5x_lite.kernels.flash_mosaic.tile import BLOCK, STEPS, MosaicFlashConfig

# Two programs for each of an H100's 132 processors.
PROGRAMS = 264


class MosaicResiduals(NamedTuple):
    """Arrays of the queries, or the references to them.

    Attributes:
      q: [n bt h], queries.
      dout: [n bt h], gradient of the context.
      log_z: [n bt], log(Z) of every query.
      delta: [n bt], row sum of dout * context.
    """

    q: Any
    dout: Any
    log_z: Any
    delta: Any


def query_specs(config: MosaicFlashConfig, index_of) -> list:
    """Returns the blocks of MosaicResiduals and query_ids that the steps of a pipeline read."""
    tokens, rows = tiles.token_blocks(config, index_of), tiles.row_blocks(index_of)
    return [tokens, tokens, rows, rows, rows]


def row_gradients(
    config: MosaicFlashConfig, residuals: MosaicResiduals, source, visible
) -> Float[Array, "r c"]:
    """Returns the gradient of the scores, and so of the bias, of a tile with queries along rows.

    Args:
      config: sizes.
      residuals: of a block of queries: references to shared memory.
      source: references to a block of k, of v, and of the bias.
      visible: True where a query attends to a key.
    """
    k_tile, v_tile, bias = source
    log_z, delta = (
        tiles.spread(plgpu.load(x, layout=tiles.statistics_layout(0)), 0)
        for x in (residuals.log_z, residuals.delta)
    )
    scores = tiles.masked_scores(config, residuals.q, k_tile, bias, visible)
    p = tiles.exponential(visible, scores, log_z)
    dp = tiles.multiply(config, residuals.dout, v_tile.transpose((1, 0)))
    return p * (dp - delta)


def backward_queries(
    config: MosaicFlashConfig, residuals: MosaicResiduals, operands: MosaicOperands
) -> tuple[Float[Array, "n bt h"], Float[Array, "n 2 bt"]]:
    """Returns the gradient of the queries, and that of the bias of far keys before and after.

    Args:
      config: sizes.
      residuals: what the forward pass kept, and the gradient of its result.
      operands: with the visits of blocks of queries.
    """
    heads, length, _ = residuals.q.shape
    leaves = jax.tree.leaves((residuals, operands))
    run = config.kernel(
        functools.partial(backward_queries_kernel, config),
        out_type=[
            output_shape(residuals.q.shape, residuals.q.dtype, *leaves),
            output_shape((heads, 2, length), jnp.float32, *leaves),
        ],
        grid=(
            ("head", heads),
            ("block", config.query_blocks),
            ("batch", length // (BLOCK * config.query_blocks)),
        ),
        scratch_types=[
            config.operand(residuals.q.dtype),
            config.operand(residuals.q.dtype),
            *(plgpu.SMEM((BLOCK,), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)),
            plgpu.Barrier(num_arrivals=5),
        ],
    )
    return run(*residuals, *operands)


def backward_queries_kernel(config: MosaicFlashConfig, *references) -> None:
    """One block of queries of one head, over all its blocks of keys.

    Args:
      config: sizes.
      *references: those of MosaicResiduals and MosaicOperands, dq [n bt h], the far bias's gradient
        [n 2 bt], and scratch.
    """
    residuals, source = MosaicResiduals(*references[:4]), MosaicOperands(*references[4:11])
    dq, far_dbias, *scratch, ids_tile, loaded = references[11:]
    program = tiles.block_program(config, config.query_blocks)
    head, block, rows = program.head, program.block, program.rows
    pairs = [(x.at[head, rows], tile) for x, tile in zip(residuals, scratch, strict=True)]
    tiles.load_tiles([*pairs, (source.query_ids.at[rows], ids_tile)], loaded)
    queries, query_tiles = tiles.load_tokens(ids_tile, 0, block * BLOCK), MosaicResiduals(*scratch)
    first = source.first[program.run]

    def visit_keys(step, k_tile, v_tile, key_ids, bias, state):
        acc, before, after = state
        keys = tiles.load_tokens(key_ids, 1, (first + step[0]) * BLOCK)
        visible = tiles.visible_pairs(config, queries, keys)
        gradients = row_gradients(config, query_tiles, (k_tile, v_tile, bias), visible)
        acc = acc + tiles.multiply(config, gradients.astype(k_tile.dtype), k_tile)
        total, distance = gradients.sum(axis=1), first + step[0] - block
        before = before + total * (distance <= -config.reach).astype(jnp.float32)
        return acc, before, after + total * (distance >= config.reach).astype(jnp.float32)

    pipeline = plgpu.emit_pipeline(
        visit_keys,
        grid=(source.count[program.run],),
        max_concurrent_steps=STEPS,
        init_carry=(tiles.zeros(BLOCK, config.head_size), tiles.zeros(BLOCK), tiles.zeros(BLOCK)),
        in_specs=tiles.key_specs(config, program, first),
    )
    acc, before, after = pipeline(*visited_keys(config, source, head))
    q_tile, _, before_tile, after_tile = scratch
    tiles.store_tiles(
        (acc, q_tile, dq.at[head, rows]),
        (before, before_tile, far_dbias.at[head, 0, rows]),
        (after, after_tile, far_dbias.at[head, 1, rows]),
    )


def backward_keys(
    config: MosaicFlashConfig, residuals: MosaicResiduals, operands: MosaicOperands
) -> tuple[Float[Array, "n bs h"], Float[Array, "n bs h"]]:
    """Returns the gradients of keys and values that each query head gives.

    Args:
      config: sizes.
      residuals: what the forward pass kept, and the gradient of its result.
      operands: with the visits of blocks of keys, and the bias of tiles with keys along rows.
    """
    heads, length = residuals.q.shape[0], operands.k.shape[1]
    dtype, leaves = operands.k.dtype, jax.tree.leaves((residuals, operands))
    shape = output_shape((heads, length, config.head_size), dtype, *leaves)
    run = config.kernel(
        functools.partial(backward_keys_kernel, config),
        out_type=[shape, shape],
        grid=(
            ("head", heads),
            ("block", config.key_blocks),
            ("batch", length // (BLOCK * config.key_blocks)),
        ),
        scratch_types=[
            config.operand(dtype),
            config.operand(dtype),
            plgpu.SMEM((BLOCK,), jnp.int32),
            plgpu.Barrier(num_arrivals=3),
        ],
    )
    return run(*residuals, *operands)


def backward_keys_kernel(config: MosaicFlashConfig, *references) -> None:
    """One block of keys, over all its blocks of queries of one head.

    Args:
      config: sizes.
      *references: those of MosaicResiduals and MosaicOperands, dk [n bs h], dv [n bs h], scratch.
    """
    residuals, source = MosaicResiduals(*references[:4]), MosaicOperands(*references[4:11])
    dk, dv, k_tile, v_tile, ids_tile, loaded = references[11:]
    program = tiles.block_program(config, config.key_blocks)
    head, key_head, rows = program.head, program.key_head, program.rows
    pairs = (source.k.at[key_head, rows], k_tile), (source.v.at[key_head, rows], v_tile)
    tiles.load_tiles((*pairs, (source.key_ids.at[rows], ids_tile)), loaded)
    keys, first = tiles.load_tokens(ids_tile, 0, program.block * BLOCK), source.first[program.run]

    def query_block(step):
        return program.batch * config.query_blocks + first + step

    def visit_queries(step, *state):
        q_tile, dout_tile, log_z, delta, query_ids, bias, (dk_acc, dv_acc) = state
        queries = tiles.load_tokens(query_ids, 1, (first + step[0]) * BLOCK)
        visible = tiles.visible_pairs(config, queries, keys)
        log_z, delta = (
            tiles.spread(plgpu.load(x, layout=tiles.statistics_layout(1)), 1)
            for x in (log_z, delta)
        )
        scores = tiles.masked_scores(config, k_tile, q_tile, bias, visible)
        p = tiles.exponential(visible, scores, log_z)
        dv_acc = dv_acc + tiles.multiply(config, p.astype(dout_tile.dtype), dout_tile)
        dp = tiles.multiply(config, v_tile, dout_tile.transpose((1, 0)))
        ds = p * (dp - delta)
        return dk_acc + tiles.multiply(config, ds.astype(q_tile.dtype), q_tile), dv_acc

    zeros = tiles.zeros(BLOCK, config.head_size)
    pipeline = plgpu.emit_pipeline(
        visit_queries,
        grid=(source.count[program.run],),
        max_concurrent_steps=STEPS,
        init_carry=(zeros, zeros),
        in_specs=[
            *query_specs(config, query_block),
            tiles.bias_blocks(lambda step: config.bias_tile(program.block, first + step)),
        ],
    )
    per_head = (reference.at[head] for reference in residuals)
    dk_acc, dv_acc = pipeline(*per_head, source.query_ids, source.bias.at[head])
    tiles.store_tiles((dk_acc, k_tile, dk.at[head, rows]), (dv_acc, v_tile, dv.at[head, rows]))


def backward_near_bias(
    config: MosaicFlashConfig, residuals: MosaicResiduals, operands: MosaicOperands
) -> Float[Array, "n m r c"]:
    """Returns the gradient of the tiles of the bias that are nearer than its reach.

    Args:
      config: sizes.
      residuals: what the forward pass kept, and the gradient of its result.
      operands: the arrays; no visits are read.
    """
    heads, length, _ = residuals.q.shape
    near, blocks = 2 * config.reach - 1, length // BLOCK
    splits = max(1, min(PROGRAMS // (heads * near), blocks))
    leaves = jax.tree.leaves((residuals, operands))
    run = config.kernel(
        functools.partial(backward_near_bias_kernel, config, splits),
        out_type=output_shape((heads, near, splits, BLOCK, BLOCK), jnp.float32, *leaves),
        grid=(("head", heads), ("place", near), ("split", splits)),
        scratch_types=[plgpu.SMEM((BLOCK, BLOCK), jnp.float32)],
    )
    return jnp.sum(run(*residuals, *operands), axis=2)


def backward_near_bias_kernel(config: MosaicFlashConfig, splits: int, *references) -> None:
    """The sum over a share of all blocks of queries of the tiles at one distance from them.

    Args:
      config: sizes.
      splits: number of shares.
      *references: those of MosaicResiduals and MosaicOperands, the sums [n m splits r c], scratch.
    """
    residuals, source = MosaicResiduals(*references[:4]), MosaicOperands(*references[4:11])
    sums, sums_tile = references[11:]
    head, place, split = (jax.lax.axis_index(axis) for axis in ("head", "place", "split"))
    all_blocks, in_row = residuals.q.shape[1] // BLOCK, jnp.int32(config.query_blocks)

    def query_block(step):
        return split + step * splits

    def key_block(step):
        """Returns the block of keys in its row; there is none before the row or after it."""
        return jax.lax.rem(query_block(step), in_row) + place + 1 - config.reach

    def stored_key_block(step):
        row = jax.lax.div(query_block(step), in_row)
        return row * config.key_blocks + jnp.clip(key_block(step), 0, config.key_blocks - 1)

    def add_tile(step, *state):
        *query_tiles, query_ids, k_tile, v_tile, key_ids, bias, total = state
        block, key = jax.lax.rem(query_block(step[0]), in_row), key_block(step[0])
        queries = tiles.load_tokens(query_ids, 0, block * BLOCK)
        keys = tiles.load_tokens(key_ids, 1, key * BLOCK)
        visible = tiles.visible_pairs(config, queries, keys)
        loaded = MosaicResiduals(*query_tiles)
        gradients = row_gradients(config, loaded, (k_tile, v_tile, bias), visible)
        exists = (key >= 0) & (key < config.key_blocks)
        return total + gradients * exists.astype(jnp.float32)

    key_tokens = tiles.token_blocks(config, stored_key_block)
    pipeline = plgpu.emit_pipeline(
        add_tile,
        grid=(jax.lax.div(all_blocks - split + splits - 1, jnp.int32(splits)),),
        max_concurrent_steps=STEPS,
        init_carry=tiles.zeros(BLOCK, BLOCK),
        in_specs=[
            *query_specs(config, query_block),
            *(key_tokens, key_tokens, tiles.row_blocks(stored_key_block)),
            tiles.bias_blocks(lambda step: place + 1),
        ],
    )
    per_head = (reference.at[head] for reference in residuals)
    total = pipeline(*per_head, source.query_ids, *visited_keys(config, source, head))
    tiles.store_tiles((total, sums_tile, sums.at[head, place, split]))
