# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward for GPUs: tiles are recomputed from log(Z), by queries and by keys.

Queries and keys each have programs of their own, so nothing is summed in memory. Names are those of
FlashAttention-2 (Dao, 2023, algorithm 2), as on TPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash.tpu_backward_q import TileGradients, recompute_tile
from t5x_lite.kernels.flash_triton import tile as tiles
from t5x_lite.kernels.flash_triton.tile import (
    HeadContext,
    QueryHead,
    TileTokens,
    TritonFlashConfig,
    TritonFlashOperands,
)
from t5x_lite.utils.not_none import not_none


class TritonQueryResiduals(NamedTuple):
    """Arrays of the queries that the backward pass needs.

    Attributes:
      q: [b t k g h], queries.
      dout: [b t k g h], gradient of the context.
      log_z: [b n t], log of the softmax's sum.
      delta: [b n t], row sum of dout * context.
    """

    q: Float[Array, "b t k g h"]
    dout: Float[Array, "b t k g h"]
    log_z: Float[Array, "b n t"]
    delta: Float[Array, "b n t"]


class QueryBlock(NamedTuple):
    """A block of queries of one head.

    Attributes:
      q: [r h], queries.
      dout: [r h], gradient of the context.
      log_z: [r], log of the softmax's sum.
      delta: [r], row sum of dout * context.
      tokens: their indices and segments, along rows or columns; they differ by source.
    """

    q: Float[Array, "r h"]
    dout: Float[Array, "r h"]
    log_z: Float[Array, " r"]
    delta: Float[Array, " r"]
    tokens: TileTokens | None = None


class KeyBlock(NamedTuple):
    """A block of keys of one key head.

    Attributes:
      k: [c h], keys.
      v: [c h], values.
      tokens: their indices and segments, along rows or columns.
    """

    k: Float[Array, "c h"]
    v: Float[Array, "c h"]
    tokens: TileTokens


def load_query_block(
    config: TritonFlashConfig, queries: TritonQueryResiduals, head: QueryHead, index
) -> QueryBlock:
    """Returns a block of queries, without tokens.

    Args:
      config: sizes.
      queries: references to whole arrays.
      head: the query head.
      index: [r], indices of the queries.
    """
    return QueryBlock(
        q=tiles.load_queries(config, queries.q, head, index),
        dout=tiles.load_queries(config, queries.dout, head, index),
        log_z=tiles.load_statistics(config, queries.log_z, head, index),
        delta=tiles.load_statistics(config, queries.delta, head, index),
    )


def backward_queries(
    config: TritonFlashConfig,
    queries: TritonQueryResiduals,
    sources: tuple[TritonFlashOperands, ...],
) -> tuple[Float[Array, "b t k g h"], tuple[Float[Array, "b n 2 m"] | None, ...]]:
    """Returns the gradient of q, and for every source that of the bias at far distances.

    Distances from the last boundary on share one bias per side (behind, ahead); their gradient is
    summed per block of queries.

    Args:
      config: sizes.
      queries: what the forward pass kept, and the gradient of its result.
      sources: for programs of queries.
    """
    b, _, k, g, _ = queries.q.shape
    leaves = jax.tree.leaves((queries, sources))
    far = output_shape((b, k * g, 2, config.query_blocks), jnp.float32, *leaves)
    return pl.pallas_call(
        functools.partial(backward_queries_kernel, config),
        grid=(config.query_blocks, k * g, b),
        out_shape=(
            output_shape(queries.q.shape, queries.q.dtype, *leaves),
            tuple(None if source.bias is None else far for source in sources),
        ),
        compiler_params=config.compiler_params(queries.q.dtype),
        interpret=config.backend.interpret,
        name="flash_attention_backward_queries",
    )(queries, sources)


def backward_queries_kernel(config: TritonFlashConfig, queries, sources, dq, far_dbias) -> None:
    """One block of queries of one head, over all its blocks of keys.

    Args:
      config: sizes.
      queries: references to whole arrays.
      sources: references to whole arrays.
      dq: output, [b t k g h].
      far_dbias: outputs, [b n 2 m] for each source with a bias.
    """
    block, head = pl.program_id(0), tiles.query_head(config, pl.program_id(2), pl.program_id(1))
    rows = config.block_sizes.query
    index = tiles.index_range(block * rows, rows)
    queries_block = load_query_block(config, queries, head, index)
    total = jnp.zeros((rows, config.padded_size), jnp.float32)
    for spec, source, far in zip(config.sources, sources, far_dbias, strict=True):
        run = head.batch * config.query_blocks + block
        first = source.first[run]
        tokens = tiles.load_tokens(source.query_ids, head.batch, index).as_rows
        context = HeadContext(config, spec, source, head)
        visit = functools.partial(visit_keys, context, queries_block._replace(tokens=tokens))
        zeros = jnp.zeros((rows,), jnp.float32)
        state = jax.lax.fori_loop(first, first + source.count[run], visit, (total, zeros, zeros))
        total, *sides = state
        if far is not None:
            for side, sums in enumerate(sides):
                far[head.batch, pl.program_id(1), side, block] = jnp.sum(sums)
    tiles.store_queries(config, dq, head, index, total)


def visit_keys(context: HeadContext, queries: QueryBlock, block, state):
    """Adds what a block of keys gives to the gradient of q, and to that of far distances.

    Args:
      context: head and source.
      queries: the block of queries, along rows.
      block: index of the block of keys.
      state: dq [r h], and sums [r] of the gradient of far distances behind and ahead.
    """
    config, source, head = context.config, context.source, context.head
    dq, behind, ahead = state
    index = tiles.index_range(block * config.block_sizes.key, config.block_sizes.key)
    tokens = tiles.load_tokens(source.key_ids, head.batch, index).as_columns
    k = tiles.load_keys(config, source.k, head, index)
    v = tiles.load_keys(config, source.v, head, index)
    keys = KeyBlock(k, v, tokens)
    gradients = tile_gradients(context, queries, keys)
    dq = dq + tile_math.dot_f32(gradients.ds.astype(k.dtype), k, (1, 0))
    if source.bias is not None:
        distance = tiles.distances(source, not_none(queries.tokens), tokens)

        def sum_where(far):
            return jnp.sum(jnp.where(far, gradients.dbias, 0.0), axis=1)

        behind = behind + sum_where(distance <= -source.last_boundary)
        ahead = ahead + sum_where(distance >= source.last_boundary)
    return dq, behind, ahead


def tile_gradients(context: HeadContext, queries: QueryBlock, keys: KeyBlock) -> TileGradients:
    """Returns the probabilities and gradients of a tile with queries along rows.

    Args:
      context: head and source.
      queries: along rows.
      keys: along columns.
    """
    source = context.source
    query_tokens = not_none(queries.tokens)
    distance = tiles.distances(source, query_tokens, keys.tokens)
    return recompute_tile(
        scores=tile_math.dot_f32(queries.q, keys.k, (1, 1)),
        dp=tile_math.dot_f32(queries.dout, keys.v, (1, 1)),
        log_z=queries.log_z[:, None],
        delta=queries.delta[:, None],
        bias=tiles.load_bias(context, distance),
        visible=tiles.visible_pairs(context.spec, source, query_tokens, keys.tokens),
        softcap=context.config.softcap,
    )


def backward_keys(
    config: TritonFlashConfig,
    index: int,
    queries: TritonQueryResiduals,
    source: TritonFlashOperands,
) -> tuple[Float[Array, "b k s h"], Float[Array, "b k s h"]]:
    """Returns the gradients of the keys and values of a source.

    Args:
      config: sizes.
      index: of the source.
      queries: what the forward pass kept, and the gradient of its result.
      source: for programs of keys.
    """
    leaves = jax.tree.leaves((queries, source))
    b, k, _, _ = source.k.shape
    return pl.pallas_call(
        functools.partial(backward_keys_kernel, config, index),
        grid=(config.key_blocks(index), k, b),
        out_shape=[output_shape(x.shape, x.dtype, *leaves) for x in (source.k, source.v)],
        compiler_params=config.compiler_params(queries.q.dtype),
        interpret=config.backend.interpret,
        name="flash_attention_backward_keys",
    )(queries, source)


def backward_keys_kernel(
    config: TritonFlashConfig,
    source_index: int,
    queries,
    source: TritonFlashOperands,
    dk,
    dv,
) -> None:
    """A block of keys, over the queries of all heads of its group one after the other.

    Args:
      config: sizes.
      source_index: index of the source.
      queries: references to whole arrays.
      source: references to whole arrays.
      dk: output, [b k s h].
      dv: output, [b k s h].
    """
    block, key_head, batch = (pl.program_id(axis) for axis in range(3))
    head = QueryHead(batch, key_head, jnp.int32(0))
    columns = config.block_sizes.key
    index = tiles.index_range(block * columns, columns)
    k = tiles.load_keys(config, source.k, head, index)
    v = tiles.load_keys(config, source.v, head, index)
    keys = KeyBlock(k, v, tiles.load_tokens(source.key_ids, batch, index).as_rows)
    run = batch * config.key_blocks(source_index) + block
    first, count = source.first[run], source.count[run]
    rows = config.block_sizes.query

    def visit(turn, state):
        member = QueryHead(batch, key_head, jax.lax.div(turn, count))
        at = tiles.index_range((first + jax.lax.rem(turn, count)) * rows, rows)
        queries_block = load_query_block(config, queries, member, at)
        tokens = tiles.load_tokens(source.query_ids, batch, at).as_columns
        queries_block = queries_block._replace(tokens=tokens)
        context = HeadContext(config, config.sources[source_index], source, member)
        return visit_queries(context, keys, queries_block, state)

    zeros = jnp.zeros((columns, config.padded_size), jnp.float32)
    sums = jax.lax.fori_loop(0, config.group * count, visit, (zeros, zeros))
    for x, value in zip((dk, dv), sums, strict=True):
        tiles.store_keys(config, x, head, index, value)


def visit_queries(context: HeadContext, keys: KeyBlock, queries: QueryBlock, state):
    """Adds what a block of queries gives to the gradients of keys and values; keys along rows.

    Args:
      context: head and source.
      keys: along rows.
      queries: along columns.
      state: dk [c h] and dv [c h].
    """
    source = context.source
    dk, dv = state
    query_tokens = not_none(queries.tokens)
    distance = tiles.distances(source, query_tokens, keys.tokens)
    gradients = recompute_tile(
        scores=tile_math.dot_f32(keys.k, queries.q, (1, 1)),
        dp=tile_math.dot_f32(keys.v, queries.dout, (1, 1)),
        log_z=queries.log_z[None, :],
        delta=queries.delta[None, :],
        bias=tiles.load_bias(context, distance),
        visible=tiles.visible_pairs(context.spec, source, query_tokens, keys.tokens),
        softcap=context.config.softcap,
    )
    dv = dv + tile_math.dot_f32(gradients.p.astype(keys.v.dtype), queries.dout, (1, 0))
    return dk + tile_math.dot_f32(gradients.ds.astype(keys.k.dtype), queries.q, (1, 0)), dv
