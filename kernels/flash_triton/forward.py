# SPDX-License-Identifier: Apache-2.0
"""Flash attention forward for GPUs: a Triton program for each block of queries of each head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import output_shape
from t5x_lite.kernels.flash_triton import tile as tiles
from t5x_lite.kernels.flash_triton.tile import (
    HeadContext,
    TileTokens,
    TritonFlashConfig,
    TritonFlashOperands,
)
from t5x_lite.kernels.tile_math import MASK_VALUE


def flash_forward(
    config: TritonFlashConfig,
    q: Float[Array, "b t k g h"],
    sources: tuple[TritonFlashOperands, ...],
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b n t"]]:
    """Returns the context like q, and log(Z) of every query.

    Args:
      config: sizes.
      q: [b t k g h], queries.
      sources: for programs of queries.
    """
    b, t, k, g, _ = q.shape
    leaves = jax.tree.leaves((q, sources))
    return pl.pallas_call(
        functools.partial(forward_kernel, config),
        grid=(config.query_blocks, k * g, b),
        out_shape=[
            output_shape(q.shape, sources[0].v.dtype, *leaves),
            output_shape((b, k * g, t), jnp.float32, *leaves),
        ],
        compiler_params=config.compiler_params(q.dtype),
        interpret=config.backend.interpret,
        name="flash_attention",
    )(q, sources)


def forward_kernel(config: TritonFlashConfig, q_ref, sources, context_ref, log_z_ref) -> None:
    """One block of queries of one head, over all its blocks of keys.

    Args:
      config: sizes.
      q_ref: reference, [b t k g h].
      sources: references to whole arrays.
      context_ref: output, [b t k g h].
      log_z_ref: output, [b n t].
    """
    block, head = pl.program_id(0), tiles.query_head(config, pl.program_id(2), pl.program_id(1))
    rows = config.block_sizes.query
    index = tiles.index_range(block * rows, rows)
    q = tiles.load_queries(config, q_ref, head, index)
    state = (
        jnp.zeros((rows, config.padded_size), jnp.float32),
        jnp.full((rows,), MASK_VALUE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    for spec, source in zip(config.sources, sources, strict=True):
        run = head.batch * config.query_blocks + block
        first = source.first[run]
        queries = tiles.load_tokens(source.query_ids, head.batch, index).as_rows
        context = HeadContext(config, spec, source, head)
        visit = functools.partial(visit_keys, context, q, queries)
        state = jax.lax.fori_loop(first, first + source.count[run], visit, state)
    acc, m, l = state
    divisor, log_z = tile_math.finish_softmax(m, l)
    tiles.store_queries(config, context_ref, head, index, acc / divisor[:, None])
    at, inside = tiles.statistics_at(config, log_z_ref, head, index)
    plgpu.store(at, log_z, mask=inside)


def visit_keys(context: HeadContext, q: Float[Array, "r h"], queries: TileTokens, block, state):
    """Returns the online softmax (acc, m, l) after one more block of keys.

    Args:
      context: head and source.
      q: [r h], the block of queries.
      queries: their indices and segments.
      block: index of the block of keys.
      state: acc [r h], m [r] and l [r] before it.
    """
    config, spec, source, head = context
    acc, m, l = state
    index = tiles.index_range(block * config.block_sizes.key, config.block_sizes.key)
    keys = tiles.load_tokens(source.key_ids, head.batch, index).as_columns
    k = tiles.load_keys(config, source.k, head, index)
    scores = tile_math.apply_softcap(tile_math.dot_f32(q, k, (1, 1)), config.softcap)
    visible = tiles.visible_pairs(spec, source, queries, keys)
    bias = tiles.load_bias(context, tiles.distances(source, queries, keys))
    scores = jnp.where(visible, scores if bias is None else scores + bias, MASK_VALUE)
    p, alpha, m, l = tile_math.update_softmax(m, l, scores, visible)
    v = tiles.load_keys(config, source.v, head, index)
    acc = acc * alpha[:, None] + tile_math.dot_f32(p.astype(v.dtype), v, (1, 0))
    return acc, m, l
