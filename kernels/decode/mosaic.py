# SPDX-License-Identifier: Apache-2.0
"""Pallas Mosaic GPU kernel of attention over a cache: the slots of a row are split over programs.

Interpreted against float64, races looked for, and lowered for A100, H100 and B200 in tests; never
run on a GPU, nor timed. Its products are `mma.sync`'s and its copies those of a pipeline, which all
of these have. Axes: those of mosaic_operands.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.decode.api import PartialAttention, merge_partials
from t5x_lite.kernels.decode.mosaic_operands import (
    DecodeSchedule,
    MosaicDecodeConfig,
    MosaicDecodeOperands,
    make_config,
    make_operands,
)
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.flash_mosaic.tile import BLOCK, make_kernel, spread
from t5x_lite.kernels.tile_math import MASK_VALUE, apply_softcap, finish_softmax

HEAD_SIZES = (64, 128)
# Blocks that are fetched while one is multiplied, and that one.
STEPS = 3


def has_mosaic_form(q, sources: tuple[AttentionSource, ...]) -> bool:
    """Returns True for what this kernel computes.

    Args:
      q: queries.
      sources: caches and inputs.
    """
    return (
        q.shape[-1] in HEAD_SIZES
        and q.shape[3] <= BLOCK
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and all(source.keys.dtype == q.dtype for source in sources)
        and all(source.keys.shape[2] >= BLOCK for source in sources)
        # Queries inside a prefix attend to slots behind them: nearly all slots would be near.
        and all(getattr(source.mask, "prefix", None) is None for source in sources)
    )


def mosaic_decode_attention(
    q: Float[Array, "b w k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "b w k g h"]:
    """Softmax attention of new tokens over all sources in one softmax, as on TPU.

    Args:
      q: [b w k g h], queries, already scaled.
      sources: caches, with a CacheMask, and inputs, with Bool [b s]; `has_mosaic_form` is true.
      softcap: cap of the scores, or None.
      interpret: runs the kernel in the interpreter.

    Raises:
      ValueError: a tree has more than 64 tokens.
    """
    partials = [
        partial for source in sources for partial in split_attention(q, source, softcap, interpret)
    ]
    return merge_partials(partials).astype(sources[0].values.dtype)


def split_attention(
    q, source: AttentionSource, softcap: float | None, interpret: bool
) -> list[PartialAttention]:
    """Attention to every split of a source's slots.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      softcap: cap of the scores, or None.
      interpret: runs the kernel in the interpreter.
    """
    config = make_config(q, source, softcap, interpret)
    schedule, operands = make_operands(q, source, config)
    b, w, k, g, h = q.shape
    leaves = jax.tree.leaves((schedule, operands))
    shape = (config.splits, b, k, config.chunks, BLOCK, h)
    run = make_kernel(
        functools.partial(decode_kernel, config),
        [
            output_shape(shape, jnp.float32, *leaves),
            output_shape(shape[:-1], jnp.float32, *leaves),
        ],
        (("batch", b), ("head", k), ("program", config.chunks * config.splits)),
        [plgpu.SMEM((BLOCK, BLOCK), q.dtype)],
        interpret,
    )
    context, log_z = run(*schedule, *operands)

    def unpack(x):
        """Returns rows [b k chunks r ...] as queries."""
        x = x[:, :, :, : config.chunk_tokens * g]
        x = x.reshape(b, k, config.chunks * config.chunk_tokens, g, *x.shape[4:])
        return jnp.moveaxis(x[:, :, :w], 1, 2)

    return [PartialAttention(unpack(context[i]), unpack(log_z[i])) for i in range(config.splits)]


class MosaicDecodeState(NamedTuple):
    """The online softmax of a program's rows.

    Attributes:
      acc: [r h], the context before its division.
      m: [r], running maximum.
      l: [r], running sum.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array


def decode_kernel(config: MosaicDecodeConfig, *references) -> None:
    """One split of the slots that a chunk of tokens attends to, for one key head of one row of b.

    Args:
      config: sizes.
      *references: those of DecodeSchedule and MosaicDecodeOperands, the context
        [splits b k chunks r h], log_z [splits b k chunks r], and scratch.
    """
    schedule, operands = DecodeSchedule(*references[:4]), MosaicDecodeOperands(*references[4:11])
    context, log_z, p_tile = references[11:]
    batch, head, program = (jax.lax.axis_index(axis) for axis in ("batch", "head", "program"))
    splits = jnp.int32(config.splits)
    chunk, split = jax.lax.div(program, splits), jax.lax.rem(program, splits)
    at = (batch * config.chunks + chunk) * config.splits + split
    begin, far, near, tile = (field[at] for field in schedule)
    q = load_tile(operands.q.at[batch, head, chunk], plgpu.Layout.MMA_LHS(config.dtype))
    per_row = config.accumulator.reduce(1)
    first = load_tile(operands.first.at[batch, chunk], per_row)
    far_bias = load_tile(operands.bias.at[head], per_row)

    def visit_far(step, k_tile, v_tile, visible_ref, state):
        column = load_tile(visible_ref, config.accumulator.reduce(0))
        slot = plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1, layout=config.accumulator)
        slot = slot + config.first_slot(begin + step[0])
        visible = (spread(column, 1) > 0) & (slot >= spread(first, 0))
        scores = row_scores(config, q, k_tile) + spread(far_bias, 0)
        return add_block(config, state, jnp.where(visible, scores, MASK_VALUE), v_tile, p_tile)

    def visit_near(step, k_tile, v_tile, bias_ref, state):
        bias = load_tile(bias_ref, config.accumulator)
        scores = row_scores(config, q, k_tile) + bias
        masked = jnp.where(bias > MASK_VALUE / 2, scores, MASK_VALUE)
        return add_block(config, state, masked, v_tile, p_tile)

    keys = operands.keys.at[batch, head], operands.values.at[batch, head]
    visible_blocks = block_spec((None, BLOCK), lambda step: (begin + step, 0))
    near_blocks = block_spec((None, BLOCK, BLOCK), lambda step: (tile + step, 0, 0))
    state = visit_blocks(config, visit_far, (begin, far), visible_blocks, empty_state(config))(
        *keys, operands.visible.at[batch]
    )
    acc, m, l = visit_blocks(config, visit_near, (begin + far, near), near_blocks, state)(
        *keys, operands.near.at[batch, head, chunk]
    )
    divisor, log_z_rows = finish_softmax(m, l)
    place = split, batch, head, chunk
    context_rows = acc / spread(divisor, 0, config.size)
    plgpu.store(context.at[place], context_rows, optimized=False)
    plgpu.store(log_z.at[place], log_z_rows, optimized=False)


def visit_blocks(config: MosaicDecodeConfig, visit, blocks, third: plgpu.BlockSpec, state):
    """Returns a pipeline over blocks of slots, of references to keys, values and a third array.

    Args:
      config: sizes.
      visit: function of a step, its tiles and the state.
      blocks: the first one, and how many.
      third: blocks of the third array.
      state: before it.
    """
    begin, count = blocks
    slots = block_spec(
        (pl.Element(BLOCK), config.size), lambda step: (config.first_slot(begin + step), 0)
    )
    return plgpu.emit_pipeline(
        visit,
        grid=(count,),
        max_concurrent_steps=STEPS,
        init_carry=state,
        in_specs=[slots, slots, third],
    )


def block_spec(shape: tuple, index_map) -> plgpu.BlockSpec:
    """Returns blocks that lie inside of their array: an A100 copies no others."""
    return plgpu.BlockSpec(shape, index_map, oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def empty_state(config: MosaicDecodeConfig) -> MosaicDecodeState:
    """Returns the state of rows that have attended to nothing."""
    rows = jnp.zeros((BLOCK,), jnp.float32)
    rows = plgpu.layout_cast(rows, config.accumulator.reduce(1))
    return MosaicDecodeState(zero_tile(config, config.size), rows + MASK_VALUE, rows)


def zero_tile(config: MosaicDecodeConfig, columns: int) -> Float[Array, "r c"]:
    """Returns zeros as a product is accumulated."""
    return plgpu.layout_cast(jnp.zeros((BLOCK, columns), jnp.float32), config.accumulator)


def load_tile(reference, layout) -> jax.Array:
    """Returns the values of a reference to global or shared memory, in a layout of registers."""
    return plgpu.load(reference, layout=layout, optimized=False)


def multiply(config: MosaicDecodeConfig, left, right) -> Float[Array, "r c"]:
    """Returns a product in float32.

    Args:
      config: interpreted or not: the interpreter of jax 0.12 lacks `mma`.
      left: [r h], in the layout of left operands.
      right: [h c], reference to shared memory.
    """
    right = load_tile(right, plgpu.Layout.MMA_RHS(config.dtype))
    if config.interpret:
        return jnp.dot(left, right, preferred_element_type=jnp.float32)
    return plgpu.mma(zero_tile(config, right.shape[1]), left, right)


def row_scores(config: MosaicDecodeConfig, q, k_tile) -> Float[Array, "r c"]:
    """Returns the scores of a block, without bias and mask.

    Args:
      config: sizes.
      q: [r h], queries.
      k_tile: reference to the keys of the block.
    """
    return apply_softcap(multiply(config, q, k_tile.transpose((1, 0))), config.softcap)


def add_block(
    config: MosaicDecodeConfig, state: MosaicDecodeState, scores, v_tile, p_tile
) -> MosaicDecodeState:
    """Returns the state after one more block of slots.

    Args:
      config: sizes.
      state: before it.
      scores: [r c], MASK_VALUE where masked.
      v_tile: reference to the values of the block.
      p_tile: reference to shared memory, by which probabilities become a left operand.
    """
    m = jnp.maximum(state.m, scores.max(axis=1))
    visible = scores > MASK_VALUE / 2
    p = jnp.where(visible, jnp.exp(scores - spread(m, 0)), 0.0)
    alpha = jnp.exp(state.m - m)
    p_tile[...] = p.astype(config.dtype)
    probs = load_tile(p_tile, plgpu.Layout.MMA_LHS(config.dtype))
    acc = state.acc * spread(alpha, 0, config.size) + multiply(config, probs, v_tile)
    return MosaicDecodeState(acc, m, state.l * alpha + p.sum(axis=1))
