# SPDX-License-Identifier: Apache-2.0
"""TPU kernel of attention over a cache.

Axes: b batch, k key heads, r rows (w g queries of a key head), s slots, c slots of one block, h
head size, n buckets of the relative position bias.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import Backend, output_shape
from t5x_lite.kernels.decode import rows as packed_rows
from t5x_lite.kernels.decode.config import DecodeConfig, make_config
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.decode.rows import DecodeScalars, RowInfo
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.tile_math import MASK_VALUE


class DecodeOperands(NamedTuple):
    """Arrays that the kernel reads in blocks; None where the source lacks them.

    Attributes:
      q: [b k r h], queries as rows.
      keys: [b k s h], or transposed [b k h s].
      values: like keys.
      info: the token of each row.
      depths: [1 c], depths of a tree's tokens, padded to a block.
      table: [k r n], bias of every bucket by row.
      visible: [b 1 s], 1 for inputs that every query of a row attends to.
    """

    q: Any
    keys: Any
    values: Any
    info: RowInfo | None = None
    depths: Any = None
    table: Any = None
    visible: Any = None


class DecodeSoftmax(NamedTuple):
    """State of the online softmax, carried from block to block of slots (float32, in VMEM).

    Attributes:
      acc: [k r h], sum of values weighted by exp(score - m).
      m: [k r 1], running maximum of the scores.
      l: [k r 1], running sum of exp(score - m).
    """

    acc: Float[Array, "k r h"]
    m: Float[Array, "k r 1"]
    l: Float[Array, "k r 1"]


def make_operands(
    q, source: AttentionSource, config: DecodeConfig
) -> tuple[DecodeScalars, DecodeOperands]:
    """Returns everything the kernel reads: scalars ahead, arrays in blocks.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      config: block sizes.
    """
    keys, values = source.keys, source.values
    if config.transposed:
        keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
    rows = config.chunks * config.rows
    operands = DecodeOperands(packed_rows.pack_rows(q, rows), keys, values)
    mask, bias = source.mask, source.relative_bias
    if not isinstance(mask, CacheMask):
        assert isinstance(mask, jax.Array)
        scalars = packed_rows.input_scalars(mask, config.chunks)
        return scalars, operands._replace(visible=mask.astype(jnp.int32)[:, None, :])
    last_boundary = None if bias is None else bias.last_boundary
    scalars = packed_rows.cache_scalars(mask, last_boundary, config.chunk_tokens)
    operands = operands._replace(info=packed_rows.row_info(mask, q.shape[3], rows))
    if mask.ancestors is not None:
        # Rolled to the slots of the new tokens in a kernel; at least 128 wide, so it cannot wrap.
        depths = jnp.pad(mask.depths().astype(jnp.int32), (0, config.block - config.width))
        operands = operands._replace(depths=depths[None])
    if bias is not None:
        table = packed_rows.bias_table(bias, q.shape[2:4], config.rows)
        operands = operands._replace(table=table)
    return scalars, operands


def call_kernel(q, source: AttentionSource, softcap: float | None, backend: Backend, partial: bool):
    """Returns the context [b k r h] and log_z [b k r 1], None unless partial.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
      partial: the context is float32, to be merged with others by log_z.
    """
    config = make_config(q, source, softcap)
    scalars, operands = make_operands(q, source, config)
    b, k, rows, h = operands.q.shape
    leaves = jax.tree.leaves((scalars, operands))
    dtype = jnp.float32 if partial else source.values.dtype
    results = [output_shape((b, k, rows, h), dtype, *leaves)]
    if partial:
        results.append(output_shape((b, k, rows, 1), jnp.float32, *leaves))
    outputs = pl.pallas_call(
        functools.partial(decode_kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, k // config.heads, config.chunks, max_blocks(scalars, config)),
            in_specs=(operand_specs(operands, config),),
            out_specs=[row_spec(config, result.shape[3]) for result in results],
            scratch_shapes=[
                pltpu.VMEM((config.heads, config.rows, size), jnp.float32) for size in (h, 1, 1)
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=estimate_cost(operands),
        interpret=backend.interpret,
        name="block_decode_attention",
    )(scalars, operands)
    return outputs if partial else (*outputs, None)


def max_blocks(scalars: DecodeScalars, config: DecodeConfig) -> Int[Array, ""]:
    """Returns the most blocks that a chunk visits; at least one, in which it writes its output."""
    blocks = pl.cdiv(scalars.end, config.block) - scalars.first // config.block
    return jnp.maximum(jnp.max(blocks), 1)


def estimate_cost(operands: DecodeOperands) -> pl.CostEstimate:
    """Returns the cost for full caches: their lengths are not known before the kernel runs."""
    r, h = operands.q.shape[2:]
    pairs = operands.keys.size // h * r
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
    written = operands.q.size * operands.q.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * pairs * h, transcendentals=pairs, bytes_accessed=read + written
    )


def row_spec(config: DecodeConfig, size: int) -> pl.BlockSpec:
    """Returns the block of one chunk of rows of a few key heads of one row of the batch."""
    return pl.BlockSpec(
        (None, config.heads, config.rows, size),
        lambda row, head, chunk, step, scalars: (row, head, chunk, 0),
    )


def operand_specs(operands: DecodeOperands, config: DecodeConfig) -> DecodeOperands:
    """Returns the blocks of the operands that a grid step reads: of slots no fully masked one."""

    def slot_block(row, chunk, step, scalars):
        # Past the last one the same block again: what is there already is not fetched.
        at = row * config.chunks + chunk
        block = jax.lax.div(scalars.first[at], config.block) + step
        return jnp.maximum(jnp.minimum(block, pl.cdiv(scalars.end[at], config.block) - 1), 0)

    def cache_index(row, head, chunk, step, scalars):
        block = slot_block(row, chunk, step, scalars)
        return (row, head, 0, block) if config.transposed else (row, head, block, 0)

    h = operands.q.shape[3]
    tile = (h, config.block) if config.transposed else (config.block, h)
    cache = pl.BlockSpec((None, config.heads, *tile), cache_index)
    by_chunk = pl.BlockSpec((config.rows, 1), lambda row, head, chunk, *_: (chunk, 0))
    visible = pl.BlockSpec(
        (None, 1, config.block),
        lambda row, head, chunk, step, scalars: (row, 0, slot_block(row, chunk, step, scalars)),
    )

    def full_array(x):
        return pl.BlockSpec(x.shape, lambda *_: (0, 0))

    def by_head(x):
        return pl.BlockSpec((config.heads, *x.shape[1:]), lambda row, head, *_: (head, 0, 0))

    return DecodeOperands(
        q=row_spec(config, h),
        keys=cache,
        values=cache,
        info=jax.tree.map(lambda _: by_chunk, operands.info),
        depths=jax.tree.map(full_array, operands.depths),
        table=jax.tree.map(by_head, operands.table),
        visible=jax.tree.map(lambda _: visible, operands.visible),
    )


def decode_kernel(config: DecodeConfig, scalars: DecodeScalars, operands: DecodeOperands, *refs):
    """One block of slots for one chunk of rows of a few key heads of one row of the batch.

    Args:
      config: block sizes.
      scalars: of all chunks, in scalar memory.
      operands: references to blocks.
      *refs: outputs (context, and log_z where it is wanted), then the state.
    """
    outputs, state = refs[:-3], DecodeSoftmax(*refs[-3:])
    step = pl.program_id(3)
    chunk_scalars = scalars.of_chunk(pl.program_id(0), pl.program_id(2), config.chunks)
    block = jax.lax.div(chunk_scalars.first, config.block) + step
    begin = block * config.block
    visited = block < pl.cdiv(chunk_scalars.end, config.block)
    unmasked = (begin >= chunk_scalars.unmasked_first) & (
        begin + config.block <= chunk_scalars.unmasked_end
    )

    @pl.when(step == 0)
    def initialize():
        state.acc[...] = jnp.zeros_like(state.acc)
        state.m[...] = jnp.full_like(state.m, MASK_VALUE)
        state.l[...] = jnp.zeros_like(state.l)

    @pl.when(visited & unmasked)
    def visit_unmasked():
        scores = block_scores(operands, config)
        if config.boundaries is not None:
            last = len(config.boundaries)
            scores = scores + operands.table[...][..., last : last + 1]
        accumulate(state, scores, None, operands.values[...], config)

    @pl.when(visited & ~unmasked)
    def visit_masked():
        visible, bias = visible_and_bias(config, operands, chunk_scalars, begin)
        scores = block_scores(operands, config)
        scores = scores if bias is None else scores + bias
        scores = jnp.where(visible[None], scores, MASK_VALUE)
        values = zero_missing_slots(operands.values[...], begin, config)
        accumulate(state, scores, visible[None], values, config)

    @pl.when(step == pl.num_programs(3) - 1)
    def write():
        divisor, log_z = tile_math.finish_softmax(state.m[...], state.l[...])
        outputs[0][...] = (state.acc[...] / divisor).astype(outputs[0].dtype)
        if len(outputs) > 1:
            outputs[1][...] = log_z


def block_scores(operands: DecodeOperands, config: DecodeConfig) -> Float[Array, "k r c"]:
    """Returns the scores of a block, before bias and mask."""
    axis = 1 if config.transposed else 2
    scores = tile_math.dot_f32(operands.q[...], operands.keys[...], (2, axis), batch=(0,))
    return tile_math.apply_softcap(scores, config.softcap)


def visible_and_bias(config: DecodeConfig, operands: DecodeOperands, scalars: DecodeScalars, begin):
    """Returns which slots of a block each row attends to [r c], and their bias [k r c] or None.

    Args:
      config: block sizes.
      operands: references to blocks.
      scalars: of this chunk.
      begin: first slot of the block.
    """
    slot = begin + jax.lax.broadcasted_iota(jnp.int32, (config.rows, config.block), 1)
    if operands.visible is not None:
        visible = jnp.broadcast_to(operands.visible[...], slot.shape) > 0
        return visible & (slot < config.slots), None
    position = slot
    if operands.depths is not None:
        # begin is a multiple of block, and a roll takes no negative shift.
        shift = jax.lax.rem(scalars.index, config.block)
        depth = jnp.broadcast_to(pltpu.roll(operands.depths[...], shift, 1), slot.shape)
        offset = slot - scalars.index
        is_token = (offset >= 0) & (offset < config.width)
        position = jnp.where(is_token, scalars.index + depth, slot)
    info = jax.tree.map(lambda ref: ref[...], operands.info)
    visible = packed_rows.visible_slots(slot, position, info, scalars, config.width)
    visible = visible & (slot < config.slots)
    if config.boundaries is None:
        return visible, None
    distance = position - scalars.index - info.depth
    return visible, packed_rows.bias_of_distance(
        distance, operands.table[...], config.boundaries, config.both_sides
    )


def zero_missing_slots(values, begin, config: DecodeConfig):
    """Returns values with 0 in the slots of the last block past the cache, which may hold NaN.

    Args:
      values: a block of values.
      begin: its first slot.
      config: block sizes.
    """
    if config.slots % config.block == 0:
        return values
    axis = 2 if config.transposed else 1
    slot = begin + jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(slot < config.slots, values.astype(jnp.float32), 0).astype(values.dtype)


def accumulate(state: DecodeSoftmax, scores, visible, values, config: DecodeConfig) -> None:
    """Takes one more block into the state.

    Args:
      state: the online softmax, in place.
      scores: [k r c], masked.
      visible: [1 r c]; None where every row attends to all of the block.
      values: a block of values.
      config: block sizes.
    """
    p, alpha, m, l = tile_math.update_softmax(state.m[...], state.l[...], scores, visible)
    state.m[...] = m
    state.l[...] = l
    axis = 2 if config.transposed else 1
    context = tile_math.dot_f32(p.astype(values.dtype), values, (2, axis), batch=(0,))
    state.acc[...] = alpha * state.acc[...] + context
