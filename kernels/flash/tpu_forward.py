# SPDX-License-Identifier: Apache-2.0
"""Flash attention forward on TPU: an online softmax over blocks of keys (Dao et al., 2022).

Axes: b batch, t queries, s keys, w lanes of packed heads, m blocks of p heads, d distances.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

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
    vmem_limits,
)
from t5x_lite.kernels.tile_math import LANES, MASK_VALUE


class FlashOperands(NamedTuple):
    """Arrays of a source, references to blocks of them, or the specs of these.

    Attributes:
      k: [b s w], keys, heads packed in lanes.
      v: [b s w], values, likewise.
      segment_ids: of queries and keys.
      bias: [m p d], vectors by distance, per block of heads; None without a bias.
    """

    k: Any
    v: Any
    segment_ids: SegmentIds
    bias: Any


class ForwardState(NamedTuple):
    """Online softmax of a block of queries, kept from one block of keys to the next, per head.

    Attributes:
      q: [p t w], queries of each head alone.
      m: [p t 128], running maximum of the scores, the same in every lane.
      l: [p t 128], running sum of exp(score - m), likewise.
      acc: [p t w], sum of values weighted by exp(score - m).
      query_ids: [t 128] for each source, segment ids of the queries along rows.
      toeplitz: [p 128 d] for each source, its expanded bias; None without one.
    """

    q: Any
    m: Any
    l: Any
    acc: Any
    query_ids: tuple[Any, ...]
    toeplitz: tuple[Any, ...]


def flash_forward(
    config: FlashConfig,
    q: Float[Array, "b t w"],
    sources: tuple[FlashOperands, ...],
    scalars: tuple[FlashScalars, ...],
) -> tuple[Float[Array, "b t w"], Float[Array, "b m p t"]]:
    """Returns the context like q, and log(Z) of every query.

    Args:
      config: sizes.
      q: [b t w], queries, heads packed in lanes.
      sources: arrays of every source.
      scalars: scalars of every source.
    """
    b, t, _ = q.shape
    operands = (q, *(x for source in sources for x in (source.k, source.v)))
    log_z = output_shape((b, config.head_blocks, config.block_heads, t), jnp.float32, *operands)
    accessed = 2 * num_bytes(q) + num_bytes(log_z) + fetched_bytes(config, sources)
    return pl.pallas_call(
        functools.partial(forward_kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid_shape(config, b, scalars),
            in_specs=[query_spec(config), operand_specs(config, sources)],
            out_specs=[query_spec(config), statistics_spec(config)],
            scratch_shapes=tuple(scratch_shapes(config, q.dtype, sources)),
        ),
        out_shape=[output_shape(q.shape, sources[0].v.dtype, *operands), log_z],
        compiler_params=compiler_params(config),
        cost_estimate=estimate_cost(config, b, 2, accessed),
        interpret=config.backend.interpret,
        name="flash_attention",
    )(scalars, q, sources)


def forward_kernel(config: FlashConfig, scalars, q, sources, context, log_z, *scratch) -> None:
    """One block of keys for one block of queries of a block of heads.

    Args:
      config: sizes.
      scalars: of every source, in scalar memory.
      q: reference to the queries.
      sources: references to blocks of every source.
      context: output.
      log_z: output.
      *scratch: a ForwardState.
    """
    state = ForwardState(*scratch)
    block, row, query_block, step = (pl.program_id(axis) for axis in range(4))
    is_first = (row == 0) & (query_block == 0)

    @pl.when(step == 0)
    def begin():
        initialize_state(config, block, q, state)
        prepare_sources(sources, state.query_ids, state.toeplitz, is_first)

    visit = functools.partial(visit_tile, config, scalars, sources, state)
    tiles.visit_tiles(config, scalars, visit)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        total = jnp.zeros(context.shape[1:], jnp.float32)
        for head in range(config.block_heads):
            m, l = state.m[head], state.l[head]
            fully_masked = m == MASK_VALUE
            scale = jnp.where(fully_masked, 0, 1 / jnp.where(fully_masked, 1, l))[:, :1]
            total = total + tiles.restore_head(config, state.acc[head] * scale, block, head)
            log_sum = m + jnp.log(jnp.where(fully_masked, 1, l))
            log_sum = jnp.where(fully_masked, MASK_VALUE, log_sum)
            log_z[0, 0, head : head + 1] = tiles.sublanes_to_lanes(log_sum)
        context[0] = total.astype(context.dtype)


def initialize_state(config: FlashConfig, block, q, state: ForwardState) -> None:
    """Writes the state of a block of queries before its first tile.

    Args:
      config: sizes.
      block: index of the block of query heads.
      q: reference to the queries.
      state: what is written.
    """
    state.m[...] = jnp.full(state.m.shape, MASK_VALUE, jnp.float32)
    state.l[...] = jnp.zeros(state.l.shape, jnp.float32)
    state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)
    separate_heads(config, block, q, state.q)


def separate_heads(config: FlashConfig, block, x, scratch) -> None:
    """Writes every packed head of x alone.

    Args:
      config: sizes.
      block: index of the block of query heads.
      x: reference, [1 t w].
      scratch: reference, [p t w].
    """
    for head in range(config.block_heads):
        scratch[head] = tiles.select_head(config, x[0], block, head)


def prepare_sources(sources, query_ids, expanded, is_first) -> None:
    """Writes segment ids of queries along rows; at the first block of these heads, expands biases.

    Args:
      sources: references to blocks of every source.
      query_ids: references, [t 128] for each source.
      expanded: references, [p 128 d] for each source, or None.
      is_first: True at the first block of queries of these heads.
    """
    for source, ids, vectors in zip(sources, query_ids, expanded, strict=True):
        ids[...] = tiles.lanes_to_sublanes(source.segment_ids.query[0])
        if source.bias is not None:
            pl.when(is_first)(functools.partial(tiles.expand_bias, source.bias, vectors))


def visit_tile(
    config: FlashConfig, scalars, sources, state: ForwardState, tile: tiles.Tile
) -> None:
    """Takes a tile into the softmax of every packed head.

    Args:
      config: sizes.
      scalars: of every source.
      sources: references to blocks of every source.
      state: the online softmax, in place.
      tile: where it is.
    """
    index = tile.source
    spec, source = config.sources[index], sources[index]
    v = tiles.zero_past_end(source.v[0], tile.key, spec.length, config.block_sizes.key)
    if tile.masked:
        query_ids, key_ids = state.query_ids[index][:, :1], source.segment_ids.key[0]
        visible = tiles.visible_pairs(spec, tile, scalars[index], query_ids, key_ids)
    for head in range(config.block_heads):
        scores = tile_math.dot_f32(state.q[head], source.k[0], (1, 1))
        scores = tile_math.apply_softcap(scores, config.softcap)
        if spec.biased:
            start = tile.toeplitz_start(scalars[index].offsets[3])
            scores += toeplitz.read_tile(state.toeplitz[index], head, start, config.block_sizes)
        if tile.masked:
            scores = jnp.where(visible, scores, MASK_VALUE)
        p, alpha, m, l = tile_math.update_softmax(state.m[head], state.l[head], scores)
        state.m[head] = m
        state.l[head] = l
        context = tile_math.dot_f32(p.astype(v.dtype), v, (1, 0))
        state.acc[head] = alpha[:, :1] * state.acc[head] + context


def grid_shape(config: FlashConfig, rows: int, scalars: tuple[FlashScalars, ...]) -> tuple:
    """Returns blocks of heads, rows, blocks of queries, and the most tiles that one of them visits.

    Args:
      config: sizes.
      rows: rows of the batch.
      scalars: of every source.
    """
    steps = jnp.maximum(jnp.max(sum(each.block_mask.count for each in scalars)), 1)
    return config.head_blocks, rows, config.query_blocks, steps


def compiler_params(config: FlashConfig, axes: int = 4) -> pltpu.CompilerParams:
    """Returns parameters by which cores may share heads; the rest follows in order, for what is
    kept in scratch."""
    semantics = ("parallel", *("arbitrary",) * (axes - 1))
    memory = vmem_limits(config.backend).memory
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=memory)


def fetched_bytes(config: FlashConfig, sources: tuple[FlashOperands, ...]) -> int:
    """Returns bytes of keys and values: again for every block of queries, unless they are one
    block."""
    times = [
        1 if config.key_blocks(index) == 1 else config.query_blocks for index in range(len(sources))
    ]
    sizes = [num_bytes(source.k, source.v) for source in sources]
    return config.group * sum(map(operator.mul, sizes, times))


def query_spec(config: FlashConfig) -> pl.BlockSpec:
    """Returns the block of queries of a grid step."""
    shape = (1, config.block_sizes.query, config.block_lanes)
    return pl.BlockSpec(shape, lambda m, b, t, step, scalars: (b, t, m))


def statistics_spec(config: FlashConfig) -> pl.BlockSpec:
    """Returns the block of one number per query and head, queries along lanes."""
    shape = (1, 1, config.block_heads, config.block_sizes.query)
    return pl.BlockSpec(shape, lambda m, b, t, step, scalars: (b, m, 0, t))


def operand_specs(
    config: FlashConfig, sources: tuple[FlashOperands, ...]
) -> tuple[FlashOperands, ...]:
    """Returns the blocks of every source's arrays that a grid step reads."""
    return tuple(operand_spec(config, index, source) for index, source in enumerate(sources))


def operand_spec(config: FlashConfig, index: int, source: FlashOperands) -> FlashOperands:
    """Returns the blocks of a source's arrays that a grid step reads.

    Args:
      config: sizes.
      index: of the source.
      source: its arrays.
    """
    sizes = config.block_sizes

    def key_block(m, b, t, step, scalars):
        return tiles.key_block_index(config, scalars, index, (m, b, t, step))

    def key_index(m, b, t, step, scalars):
        block = key_block(m, b, t, step, scalars)
        return b, block, tiles.floor_divide(m, config.group)

    def key_ids_index(m, b, t, step, scalars):
        return b, 0, key_block(m, b, t, step, scalars)

    keys = pl.BlockSpec((1, sizes.key, config.block_lanes), key_index)
    segment_ids = SegmentIds(
        query=pl.BlockSpec((1, 1, sizes.query), lambda m, b, t, step, scalars: (b, 0, t)),
        key=pl.BlockSpec((1, 1, sizes.key), key_ids_index),
    )
    bias = None
    if source.bias is not None:
        shape = (1, *source.bias.shape[1:])
        bias = pl.BlockSpec(shape, lambda m, b, t, step, scalars: (m, 0, 0))
    return FlashOperands(keys, keys, segment_ids, bias)


def scratch_shapes(config: FlashConfig, dtype, sources: tuple[FlashOperands, ...]) -> ForwardState:
    """Returns the scratch memory of the state.

    Args:
      config: sizes.
      dtype: of the queries.
      sources: arrays of every source.
    """
    rows = (config.block_heads, config.block_sizes.query)
    return ForwardState(
        q=pltpu.VMEM((*rows, config.block_lanes), dtype),
        m=pltpu.VMEM((*rows, LANES), jnp.float32),
        l=pltpu.VMEM((*rows, LANES), jnp.float32),
        acc=pltpu.VMEM((*rows, config.block_lanes), jnp.float32),
        query_ids=tuple(pltpu.VMEM((config.block_sizes.query, LANES), jnp.int32) for _ in sources),
        toeplitz=tuple(toeplitz_shape(source) for source in sources),
    )


def toeplitz_shape(source: FlashOperands):
    """Returns the scratch memory of a source's expanded bias; None without a bias."""
    if source.bias is None:
        return None
    _, heads, distances = source.bias.shape
    return pltpu.VMEM((heads, LANES, distances), jnp.float32)
