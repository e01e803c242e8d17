# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward on TPU, for queries and biases: tiles are recomputed from log(Z).

Names are those of FlashAttention-2 (Dao, 2023, algorithm 2): dout is the gradient of the output,
delta the row sum of dout * out. Axes as in `tpu_forward`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash import tile as tiles
from t5x_lite.kernels.flash import toeplitz, tpu_forward
from t5x_lite.kernels.flash.config import (
    FlashConfig,
    FlashScalars,
    estimate_cost,
    num_bytes,
)
from t5x_lite.kernels.flash.tpu_forward import FlashOperands
from t5x_lite.kernels.tile_math import LANES


class QueryResiduals(NamedTuple):
    """Arrays of the queries that the backward pass needs.

    Attributes:
      q: [b t w], queries, heads packed in lanes.
      dout: [b t w], gradient of the context.
      log_z: [b m p t], log of the softmax's sum.
      delta: [b m p t], row sum of dout * context.
    """

    q: Any
    dout: Any
    log_z: Any
    delta: Any


class QueryGradientState(NamedTuple):
    """A block of queries, kept from one block of keys to the next, per packed head.

    Attributes:
      q: [p t w], queries of each head alone.
      dout: [p t w], gradient of the context of each head alone.
      log_z: [p t 128], the same in every lane.
      delta: [p t 128], the same in every lane.
      dq: [p t w], the gradient so far.
      query_ids: [t 128] for each source, segment ids of the queries along rows.
      toeplitz: [p 128 d] for each source, its expanded bias; None without one.
      dtoeplitz: [p 128 d] for each source, the gradient of that so far.
    """

    q: Any
    dout: Any
    log_z: Any
    delta: Any
    dq: Any
    query_ids: tuple[Any, ...]
    toeplitz: tuple[Any, ...]
    dtoeplitz: tuple[Any, ...]


class TileGradients(NamedTuple):
    """Probabilities of a tile and the gradients of its scores.

    Attributes:
      p: [r c], probabilities; 0 where masked.
      dbias: [r c], gradient of the scores with softcap and bias: p * (dp - delta).
      ds: [r c], gradient of the scores before the softcap.
    """

    p: Float[Array, "r c"]
    dbias: Float[Array, "r c"]
    ds: Float[Array, "r c"]


def backward_queries(
    config: FlashConfig,
    queries: QueryResiduals,
    sources: tuple[FlashOperands, ...],
    scalars: tuple[FlashScalars, ...],
) -> tuple[Float[Array, "b t w"], tuple[Float[Array, "m p d"] | None, ...]]:
    """Returns the gradients of q, and of every source's bias by difference of indices.

    Args:
      config: sizes.
      queries: what the forward pass kept, and the gradient of its result.
      sources: arrays of every source.
      scalars: scalars of every source.
    """
    operands = (*queries, *(x for source in sources for x in (source.k, source.v)))
    biases = [source.bias for source in sources]
    dbias = [None if x is None else output_shape(x.shape, x.dtype, *operands) for x in biases]
    inputs = tpu_forward.query_spec(config)
    statistics = tpu_forward.statistics_spec(config)
    source_blocks = tpu_forward.operand_specs(config, sources)
    accessed = num_bytes(*queries, queries.q) + tpu_forward.fetched_bytes(config, sources)
    return pl.pallas_call(
        functools.partial(backward_queries_kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tpu_forward.grid_shape(config, queries.q.shape[0], scalars),
            in_specs=[QueryResiduals(inputs, inputs, statistics, statistics), source_blocks],
            out_specs=(inputs, tuple(spec.bias for spec in source_blocks)),
            scratch_shapes=tuple(scratch_shapes(config, queries, sources)),
        ),
        out_shape=(output_shape(queries.q.shape, queries.q.dtype, *operands), tuple(dbias)),
        compiler_params=tpu_forward.compiler_params(config),
        cost_estimate=estimate_cost(config, queries.q.shape[0], 3, accessed),
        interpret=config.backend.interpret,
        name="flash_attention_backward_queries",
    )(scalars, queries, sources)


def backward_queries_kernel(
    config: FlashConfig, scalars, queries, sources, dq, dbias, *scratch
) -> None:
    """One block of keys for one block of queries of a block of heads.

    Args:
      config: sizes.
      scalars: of every source, in scalar memory.
      queries: references to blocks of QueryResiduals.
      sources: references to blocks of every source.
      dq: output.
      dbias: outputs, for each source with a bias.
      *scratch: a QueryGradientState.
    """
    state = QueryGradientState(*scratch)
    block, row, query_block, step = (pl.program_id(axis) for axis in range(4))
    is_first = (row == 0) & (query_block == 0)
    is_final = step == pl.num_programs(3) - 1
    is_last = (row == pl.num_programs(1) - 1) & (query_block == pl.num_programs(2) - 1) & is_final

    @pl.when(step == 0)
    def begin():
        state.dq[...] = jnp.zeros(state.dq.shape, jnp.float32)
        tpu_forward.separate_heads(config, block, queries.q, state.q)
        tpu_forward.separate_heads(config, block, queries.dout, state.dout)
        for head in range(config.block_heads):
            state.log_z[head] = tiles.lanes_to_sublanes(queries.log_z[0, 0, head : head + 1])
            state.delta[head] = tiles.lanes_to_sublanes(queries.delta[0, 0, head : head + 1])
        tpu_forward.prepare_sources(sources, state.query_ids, state.toeplitz, is_first)

    dtoeplitz = [x for x in state.dtoeplitz if x is not None]
    pl.when(is_first & (step == 0))(functools.partial(zero_all, dtoeplitz))
    visit = functools.partial(visit_tile, config, scalars, sources, state)
    tiles.visit_tiles(config, scalars, visit)

    @pl.when(is_final)
    def finish():
        heads = range(config.block_heads)
        total = sum(tiles.restore_head(config, state.dq[head], block, head) for head in heads)
        dq[0] = total.astype(dq.dtype)

    vectors = [x for x in dbias if x is not None]
    pl.when(is_last)(functools.partial(fold_gradients, dtoeplitz, vectors))


def zero_all(references) -> None:
    """Writes 0 into float32 references."""
    for reference in references:
        reference[...] = jnp.zeros(reference.shape, jnp.float32)


def fold_gradients(expanded, vectors) -> None:
    """Sums expanded gradients [p 128 d] along diagonals into vectors [1 p d]."""
    for gradient, vector in zip(expanded, vectors, strict=True):
        for head in range(gradient.shape[0]):
            vector[0, head : head + 1] = toeplitz.fold_rows(gradient[head])


def visit_tile(
    config: FlashConfig, scalars, sources, state: QueryGradientState, tile: tiles.Tile
) -> None:
    """Adds what a tile gives to the gradient of q and of its bias.

    Args:
      config: sizes.
      scalars: of every source.
      sources: references to blocks of every source.
      state: the gradients, in place.
      tile: where it is.
    """
    index = tile.source
    spec, source = config.sources[index], sources[index]
    k = tiles.zero_past_end(source.k[0], tile.key, spec.length, config.block_sizes.key)
    visible = None
    if tile.masked:
        query_ids, key_ids = state.query_ids[index][:, :1], source.segment_ids.key[0]
        visible = tiles.visible_pairs(spec, tile, scalars[index], query_ids, key_ids)
    for head in range(config.block_heads):
        bias, start = None, tile.toeplitz_start(scalars[index].offsets[3])
        if spec.biased:
            shape = tuple(config.block_sizes)
            bias = toeplitz.read_tile(state.toeplitz[index], head, start, shape)
        gradients = recompute_tile(
            scores=tile_math.dot_f32(state.q[head], k, (1, 1)),
            dp=tile_math.dot_f32(state.dout[head], source.v[0], (1, 1)),
            log_z=state.log_z[head][:, :1],
            delta=state.delta[head][:, :1],
            bias=bias,
            visible=visible,
            softcap=config.softcap,
        )
        if spec.biased:
            toeplitz.add_tile(state.dtoeplitz[index], head, start, gradients.dbias)
        state.dq[head] += tile_math.dot_f32(gradients.ds.astype(k.dtype), k, (1, 0))


def recompute_tile(
    *,
    scores: Float[Array, "r c"],
    dp: Float[Array, "r c"],
    log_z: jax.Array,
    delta: jax.Array,
    bias: Float[Array, "r c"] | None,
    visible: jax.Array | None,
    softcap: float | None,
) -> TileGradients:
    """Returns a tile's probabilities again, and the gradients of its scores.

    Either axis may be that of the queries.

    Args:
      scores: [r c], q times k.
      dp: [r c], dout times v, the gradient of the probabilities.
      log_z: [r 1] or [1 c], of the queries.
      delta: [r 1] or [1 c], of the queries.
      bias: [r c], or None.
      visible: [r c], True where a query attends to a key; None where nothing is masked.
      softcap: cap of the scores, or None.
    """

    def zero_masked(x):
        return x if visible is None else jnp.where(visible, x, 0)

    capped = tile_math.apply_softcap(scores, softcap)
    p = zero_masked(jnp.exp((capped if bias is None else capped + bias) - log_z))
    dbias = zero_masked(p * (dp - delta))
    # tanh' = 1 - tanh^2; a masked score may be anything, NaN too.
    slope = 1 if softcap is None else zero_masked(1 - (capped / softcap) ** 2)
    return TileGradients(p, dbias, dbias * slope)


def scratch_shapes(
    config: FlashConfig, queries: QueryResiduals, sources: tuple[FlashOperands, ...]
) -> QueryGradientState:
    """Returns the scratch memory of the state.

    Args:
      config: sizes.
      queries: for their dtypes.
      sources: arrays of every source.
    """
    forward = tpu_forward.scratch_shapes(config, queries.q.dtype, sources)
    shape = (config.block_heads, config.block_sizes.query, LANES)
    return QueryGradientState(
        q=forward.q,
        dout=pltpu.VMEM(forward.q.shape, queries.dout.dtype),
        log_z=pltpu.VMEM(shape, jnp.float32),
        delta=pltpu.VMEM(shape, jnp.float32),
        dq=forward.acc,
        query_ids=forward.query_ids,
        toeplitz=forward.toeplitz,
        dtoeplitz=forward.toeplitz,
    )
