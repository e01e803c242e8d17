# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward on TPU, for keys and values: keys along rows, queries along columns.

Names and axes as in `tpu_backward_q`; g blocks of query heads share a block of key heads.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash import tile as tiles
from t5x_lite.kernels.flash import toeplitz
from t5x_lite.kernels.flash.block_mask import SegmentIds
from t5x_lite.kernels.flash.config import (
    FlashConfig,
    FlashScalars,
    estimate_cost,
    num_bytes,
)
from t5x_lite.kernels.flash.tpu_backward_q import QueryResiduals, recompute_tile
from t5x_lite.kernels.flash.tpu_forward import FlashOperands, compiler_params
from t5x_lite.kernels.tile_math import LANES


class KeyGradientState(NamedTuple):
    """A block of keys, kept from one block of queries to the next.

    Attributes:
      dk: [s w], the gradient of keys so far.
      dv: [s w], the gradient of values so far.
      key_ids: [s 128], segment ids of the keys along rows.
      toeplitz: [gp 128 d], expanded bias of g blocks of p query heads; None without one.
    """

    dk: Any
    dv: Any
    key_ids: Any
    toeplitz: Any


class KeyGridStep(NamedTuple):
    """A step of the grid.

    Attributes:
      heads: block of key heads.
      row: row of the batch.
      block: block of keys.
      member: block of query heads among those of these key heads.
      step: place of the block of queries in its run.
    """

    heads: Int[Array, ""]
    row: Int[Array, ""]
    block: Int[Array, ""]
    member: Int[Array, ""]
    step: Int[Array, ""]


class KeyInputs(NamedTuple):
    """Scalars and arrays that the kernel reads.

    Attributes:
      scalars: of the source, in scalar memory.
      queries: references to blocks of QueryResiduals.
      source: references to blocks of the source.
    """

    scalars: FlashScalars
    queries: QueryResiduals
    source: FlashOperands


def backward_keys(
    config: FlashConfig,
    index: int,
    queries: QueryResiduals,
    source: FlashOperands,
    scalars: FlashScalars,
) -> tuple[Float[Array, "b s w"], Float[Array, "b s w"]]:
    """Returns the gradients of k and v of a source.

    Args:
      config: sizes.
      index: of the source.
      queries: what the forward pass kept, and the gradient of its result.
      source: its arrays; the bias is by query minus key index.
      scalars: its scalars, with the runs of blocks of queries.
    """
    operands = (*queries, source.k, source.v)
    b, _, lanes = source.k.shape
    steps = jnp.maximum(jnp.max(scalars.block_mask.count), 1)
    key_blocks = config.key_blocks(index)
    grid = (lanes // config.block_lanes, b, key_blocks, config.group, steps)
    times = key_blocks if config.group * config.query_blocks > 1 else 1
    accessed = 2 * num_bytes(source.k, source.v) + times * num_bytes(*queries)
    specs = operand_specs(config, index, source)
    one_source = replace(config, sources=config.sources[index : index + 1])
    return pl.pallas_call(
        functools.partial(backward_keys_kernel, config, index),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[query_specs(config, index), specs],
            out_specs=[specs.k, specs.v],
            scratch_shapes=tuple(scratch_shapes(config, source)),
        ),
        out_shape=[output_shape(x.shape, x.dtype, *operands) for x in (source.k, source.v)],
        compiler_params=compiler_params(config, len(grid)),
        cost_estimate=estimate_cost(one_source, b, 4, accessed),
        interpret=config.backend.interpret,
        name="flash_attention_backward_keys",
    )(scalars, queries, source)


def backward_keys_kernel(
    config: FlashConfig, index: int, scalars, queries, source, dk, dv, *scratch
) -> None:
    """One block of queries for one block of keys of a block of key heads.

    Args:
      config: sizes.
      index: of the source.
      scalars: of the source, in scalar memory.
      queries: references to blocks of QueryResiduals.
      source: references to blocks of the source.
      dk: output.
      dv: output.
      *scratch: a KeyGradientState.
    """
    state = KeyGradientState(*scratch)
    at = KeyGridStep(*(pl.program_id(axis) for axis in range(5)))
    key_block = at.row * config.key_blocks(index) + at.block
    count = scalars.block_mask.count[key_block]
    query_block = query_block_index(config, index, scalars, at)

    @pl.when((at.member == 0) & (at.step == 0))
    def begin():
        state.dk[...] = jnp.zeros(state.dk.shape, jnp.float32)
        state.dv[...] = jnp.zeros(state.dv.shape, jnp.float32)
        state.key_ids[...] = tiles.lanes_to_sublanes(source.segment_ids.key[0])

    if state.toeplitz is not None:
        is_first = (at.row == 0) & (at.block == 0) & (at.step == 0)
        heads = pl.ds(at.member * config.block_heads, config.block_heads)
        expand = functools.partial(tiles.expand_bias, source.bias, state.toeplitz.at[heads])
        pl.when(is_first)(expand)

    sizes = config.block_sizes
    tile = tiles.Tile(index, query_block * sizes.query, at.block * sizes.key, direction=-1)
    has_heads = at.heads * config.group + at.member < config.head_blocks
    active = (at.step < count) & has_heads
    segment = scalars.block_mask.segment[key_block]
    query_segment = scalars.block_mask.other_segment[at.row * config.query_blocks + query_block]
    unmasked = segment == query_segment
    unmasked = unmasked & tiles.is_unmasked(config.sources[index], tile, scalars, sizes)
    inputs = KeyInputs(scalars, queries, source)
    visit = functools.partial(visit_tile, config, at, inputs, state)
    pl.when(active & unmasked)(functools.partial(visit, tile._replace(masked=False)))
    pl.when(active & ~unmasked)(functools.partial(visit, tile))

    @pl.when((at.member == pl.num_programs(3) - 1) & (at.step == pl.num_programs(4) - 1))
    def finish():
        dk[0] = state.dk[...].astype(dk.dtype)
        dv[0] = state.dv[...].astype(dv.dtype)


def visit_tile(
    config: FlashConfig,
    at: KeyGridStep,
    inputs: KeyInputs,
    state: KeyGradientState,
    tile: tiles.Tile,
) -> None:
    """Adds what a tile gives to the gradients of its keys and values.

    Args:
      config: sizes.
      at: the grid step.
      inputs: what the kernel reads.
      state: the gradients, in place.
      tile: where it is.
    """
    scalars, queries, source = inputs
    spec, sizes, visible = config.sources[tile.source], config.block_sizes, None
    if tile.masked:
        key_ids, query_ids = state.key_ids[:, :1], source.segment_ids.query[0]
        visible = tiles.visible_pairs(spec, tile, scalars, key_ids, query_ids)
    packed_q, packed_dout = (
        tiles.zero_past_end(x[0], tile.query, config.queries, sizes.query)
        for x in (queries.q, queries.dout)
    )
    block = at.heads * config.group + at.member
    for head in range(config.block_heads):
        q = tiles.select_head(config, packed_q, block, head)
        dout = tiles.select_head(config, packed_dout, block, head)
        bias = None
        if spec.biased:
            vector = at.member * config.block_heads + head
            start = tile.toeplitz_start(scalars.offsets[3])
            bias = toeplitz.read_tile(state.toeplitz, vector, start, (sizes.key, sizes.query))
        log_z, delta = (x[0, 0, head : head + 1] for x in (queries.log_z, queries.delta))
        gradients = recompute_tile(
            scores=tile_math.dot_f32(source.k[0], q, (1, 1)),
            dp=tile_math.dot_f32(source.v[0], dout, (1, 1)),
            log_z=log_z,
            delta=delta,
            bias=bias,
            visible=visible,
            softcap=config.softcap,
        )
        state.dk[...] += tile_math.dot_f32(gradients.ds.astype(q.dtype), q, (1, 0))
        state.dv[...] += tile_math.dot_f32(gradients.p.astype(dout.dtype), dout, (1, 0))


def query_block_index(
    config: FlashConfig, index: int, scalars: FlashScalars, at: KeyGridStep
) -> Int[Array, ""]:
    """Returns the block of queries of a grid step; past its last one, that one again.

    Args:
      config: sizes.
      index: of the source.
      scalars: of the source.
      at: the grid step.
    """
    key_block = at.row * config.key_blocks(index) + at.block
    place = jnp.minimum(at.step, jnp.maximum(scalars.block_mask.count[key_block] - 1, 0))
    return scalars.block_mask.first[key_block] + place


def query_head_block(config: FlashConfig, at: KeyGridStep) -> Int[Array, ""]:
    """Returns the block of query heads; where the last key heads have none left, the last one."""
    return jnp.minimum(at.heads * config.group + at.member, config.head_blocks - 1)


def query_specs(config: FlashConfig, index: int) -> QueryResiduals:
    """Returns the blocks of the queries' arrays that a grid step reads."""

    def array_index(heads, row, block, member, step, scalars):
        at = KeyGridStep(heads, row, block, member, step)
        query_block = query_block_index(config, index, scalars, at)
        return row, query_block, query_head_block(config, at)

    def statistics_index(heads, row, block, member, step, scalars):
        row, query_block, head_block = array_index(heads, row, block, member, step, scalars)
        return row, head_block, 0, query_block

    sizes = config.block_sizes
    arrays = pl.BlockSpec((1, sizes.query, config.block_lanes), array_index)
    statistics = pl.BlockSpec((1, 1, config.block_heads, sizes.query), statistics_index)
    return QueryResiduals(arrays, arrays, statistics, statistics)


def operand_specs(config: FlashConfig, index: int, source: FlashOperands) -> FlashOperands:
    """Returns the blocks of a source's arrays that a grid step reads.

    Args:
      config: sizes.
      index: of the source.
      source: its arrays.
    """

    def query_ids_index(heads, row, block, member, step, scalars):
        at = KeyGridStep(heads, row, block, member, step)
        return row, 0, query_block_index(config, index, scalars, at)

    def bias_index(heads, row, block, member, step, scalars):
        at = KeyGridStep(heads, row, block, member, step)
        return query_head_block(config, at), 0, 0

    sizes = config.block_sizes
    keys = pl.BlockSpec(
        (1, sizes.key, config.block_lanes), lambda heads, row, block, *rest: (row, block, heads)
    )
    segment_ids = SegmentIds(
        query=pl.BlockSpec((1, 1, sizes.query), query_ids_index),
        key=pl.BlockSpec((1, 1, sizes.key), lambda heads, row, block, *rest: (row, 0, block)),
    )
    bias = None
    if source.bias is not None:
        bias = pl.BlockSpec((1, *source.bias.shape[1:]), bias_index)
    return FlashOperands(keys, keys, segment_ids, bias)


def scratch_shapes(config: FlashConfig, source: FlashOperands) -> KeyGradientState:
    """Returns the scratch memory of the state."""
    gradient = pltpu.VMEM((config.block_sizes.key, config.block_lanes), jnp.float32)
    key_ids = pltpu.VMEM((config.block_sizes.key, LANES), jnp.int32)
    expanded = None
    if source.bias is not None:
        heads = config.group * config.block_heads
        expanded = pltpu.VMEM((heads, LANES, source.bias.shape[2]), jnp.float32)
    return KeyGradientState(gradient, gradient, key_ids, expanded)
