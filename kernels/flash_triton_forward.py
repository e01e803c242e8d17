# SPDX-License-Identifier: Apache-2.0
"""Flash attention forward for GPUs: a Triton program for each block of queries of each head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from t5x_lite.kernels import flash_triton_tile as tiling
from t5x_lite.kernels import tiles
from t5x_lite.kernels.flash_plan import Rule
from t5x_lite.kernels.flash_tile import HIDDEN, capped, product
from t5x_lite.kernels.flash_triton_tile import Head, Operand, Plan


def forward(
    plan: Plan, q: Float[Array, "b t k g h"], sources: tuple[Operand, ...]
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b n t"]]:
    """Context like q, and log(Z) of every query (HIDDEN where it sees nothing)."""
    b, t, k, g, _ = q.shape
    leaves = jax.tree.leaves((q, sources))
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.query_blocks, k * g, b),
        out_shape=[
            tiles.like(q.shape, sources[0].v.dtype, *leaves),
            tiles.like((b, k * g, t), jnp.float32, *leaves),
        ],
        compiler_params=plan.parameters(q.dtype),
        interpret=plan.how.interpret,
        name="flash_attention",
    )(q, sources)


def kernel(plan: Plan, q_ref, sources, context_ref, log_z_ref) -> None:
    block, head = pl.program_id(0), tiling.head_of(plan, pl.program_id(2), pl.program_id(1))
    rows = plan.sizes.query
    index = tiling.span(block * rows, rows)
    q = tiling.load_queries(plan, q_ref, head, index)
    state = (
        jnp.zeros((rows, plan.size), jnp.float32),
        jnp.full((rows,), HIDDEN, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    for rule, source in zip(plan.rules, sources, strict=True):
        run = head.batch * plan.query_blocks + block
        first = source.first[run]
        queries = tiling.tokens(source.query_codes, head.batch, index).upright
        look = functools.partial(visit, plan, rule, source, head, (q, queries))
        state = jax.lax.fori_loop(first, first + source.count[run], look, state)
    context, peak, total = state
    blind = total == 0
    whole = jnp.where(blind, 1.0, total)
    tiling.store_queries(plan, context_ref, head, index, context / whole[:, None])
    at, inside = tiling.statistics_at(plan, log_z_ref, head, index)
    plgpu.store(at, jnp.where(blind, HIDDEN, peak + jnp.log(whole)), mask=inside)


def visit(plan: Plan, rule: Rule, source: Operand, head: Head, own, block, state):
    """The online softmax after one more block of keys; own: queries, and who they are."""
    (q, queries), (context, peak, total) = own, state
    index = tiling.span(block * plan.sizes.key, plan.sizes.key)
    keys = tiling.tokens(source.key_codes, head.batch, index).flat
    scores = capped(product(q, tiling.load_keys(plan, source.k, head, index), (1, 1)), plan.softcap)
    shown = tiling.seen(rule, source, queries, keys)
    bias = tiling.bias_of(plan, source, head, tiling.distances(source, queries, keys))
    scores = jnp.where(shown, scores if bias is None else scores + bias, HIDDEN)
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    shares = jnp.where(shown, jnp.exp(scores - higher[:, None]), 0.0)
    fade = jnp.exp(peak - higher)
    v = tiling.load_keys(plan, source.v, head, index)
    context = context * fade[:, None] + product(shares.astype(v.dtype), v, (1, 0))
    return context, higher, total * fade + jnp.sum(shares, axis=1)
