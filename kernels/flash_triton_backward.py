# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward for GPUs: tiles made again from log(Z), once by queries, once by keys.

Queries and keys each have programs of their own, so nothing is added up in memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels import flash_triton_tile as tiling
from t5x_lite.kernels import tiles
from t5x_lite.kernels.flash_backward import Tile, again
from t5x_lite.kernels.flash_plan import Rule
from t5x_lite.kernels.flash_tile import product
from t5x_lite.kernels.flash_triton_tile import Head, Operand, Plan


class Queries(NamedTuple):
    """What the backward pass knows of queries; mean: the sum over keys of p times its slope."""

    q: Float[Array, "b t k g h"]
    gradient: Float[Array, "b t k g h"]
    log_z: Float[Array, "b n t"]
    mean: Float[Array, "b n t"]


class Block(NamedTuple):
    """A block of queries."""

    q: Float[Array, "r h"]
    gradient: Float[Array, "r h"]
    log_z: Float[Array, " r"]
    mean: Float[Array, " r"]


def load(plan: Plan, queries: Queries, head: Head, index) -> Block:
    rows = (tiling.load_queries(plan, x, head, index) for x in queries[:2])
    return Block(*rows, *(tiling.load_statistics(plan, x, head, index) for x in queries[2:]))


def of_queries(
    plan: Plan, queries: Queries, sources: tuple[Operand, ...]
) -> tuple[Float[Array, "b t k g h"], tuple[Float[Array, "b n 2 m"] | None, ...]]:
    """The gradient of q; and of every source's bias, the sums of blocks beyond the farthest
    distance, on either side (behind, ahead): all of these distances share one number."""
    b, _, k, g, _ = queries.q.shape
    leaves = jax.tree.leaves((queries, sources))
    far = tiles.like((b, k * g, 2, plan.query_blocks), jnp.float32, *leaves)
    return pl.pallas_call(
        functools.partial(kernel_of_queries, plan),
        grid=(plan.query_blocks, k * g, b),
        out_shape=(
            tiles.like(queries.q.shape, queries.q.dtype, *leaves),
            tuple(None if source.bias is None else far for source in sources),
        ),
        compiler_params=plan.parameters(queries.q.dtype),
        interpret=plan.how.interpret,
        name="flash_attention_backward_queries",
    )(queries, sources)


def kernel_of_queries(plan: Plan, queries, sources, of_q, far) -> None:
    block, head = pl.program_id(0), tiling.head_of(plan, pl.program_id(2), pl.program_id(1))
    rows = plan.sizes.query
    index = tiling.span(block * rows, rows)
    own = load(plan, queries, head, index)
    total = jnp.zeros((rows, plan.size), jnp.float32)
    for rule, source, beyond in zip(plan.rules, sources, far, strict=True):
        run = head.batch * plan.query_blocks + block
        first = source.first[run]
        known = tiling.tokens(source.query_codes, head.batch, index).upright
        look = functools.partial(visit_keys, plan, rule, source, head, (own, known))
        none = jnp.zeros((rows,), jnp.float32)
        state = jax.lax.fori_loop(first, first + source.count[run], look, (total, none, none))
        total, *sides = state
        if beyond is not None:
            for side, sums in enumerate(sides):
                beyond[head.batch, pl.program_id(1), side, block] = jnp.sum(sums)
    tiling.store_queries(plan, of_q, head, index, total)


def visit_keys(plan: Plan, rule: Rule, source: Operand, head: Head, own, block, state):
    """Adds what a block of keys gives to the gradient of q, and to that of far distances."""
    (queries, known), (total, behind, ahead) = own, state
    index = tiling.span(block * plan.sizes.key, plan.sizes.key)
    keys = tiling.tokens(source.key_codes, head.batch, index).flat
    k = tiling.load_keys(plan, source.k, head, index)
    v = tiling.load_keys(plan, source.v, head, index)
    tile = tile_of(plan, rule, source, head, (queries, known), (k, v, keys))
    total = total + product(tile.of_scores.astype(k.dtype), k, (1, 0))
    if source.bias is not None:
        distance = tiling.distances(source, known, keys)
        beyond = lambda far: jnp.sum(jnp.where(far, tile.of_biased, 0.0), axis=1)
        behind = behind + beyond(distance <= -source.farthest)
        ahead = ahead + beyond(distance >= source.farthest)
    return total, behind, ahead


def tile_of(plan: Plan, rule: Rule, source: Operand, head: Head, rows, columns) -> Tile:
    """The tile of a block of queries (along rows) and of keys (k, v, and who they are)."""
    (queries, known), (k, v, keys) = rows, columns
    distance = tiling.distances(source, known, keys)
    return again(
        plan.softcap,
        product(queries.q, k, (1, 1)),
        product(queries.gradient, v, (1, 1)),
        (queries.log_z[:, None], queries.mean[:, None]),
        (tiling.bias_of(plan, source, head, distance), tiling.seen(rule, source, known, keys)),
    )


def of_keys(
    plan: Plan, index: int, queries: Queries, source: Operand
) -> tuple[Float[Array, "b k s h"], Float[Array, "b k s h"]]:
    """The gradients of the keys and values of the source of this index."""
    leaves = jax.tree.leaves((queries, source))
    b, k, _, _ = source.k.shape
    return pl.pallas_call(
        functools.partial(kernel_of_keys, plan, index),
        grid=(plan.key_blocks(index), k, b),
        out_shape=[tiles.like(x.shape, x.dtype, *leaves) for x in (source.k, source.v)],
        compiler_params=plan.parameters(queries.q.dtype),
        interpret=plan.how.interpret,
        name="flash_attention_backward_keys",
    )(queries, source)


def kernel_of_keys(plan: Plan, number: int, queries, source: Operand, of_k, of_v) -> None:
    """A block of keys, over the queries of all heads of its group one after the other."""
    block, key_head, batch = (pl.program_id(axis) for axis in range(3))
    head = Head(batch, key_head, jnp.int32(0))
    columns = plan.sizes.key
    index = tiling.span(block * columns, columns)
    k = tiling.load_keys(plan, source.k, head, index)
    v = tiling.load_keys(plan, source.v, head, index)
    known = tiling.tokens(source.key_codes, batch, index).upright
    run = batch * plan.key_blocks(number) + block
    first, count = source.first[run], source.count[run]
    rule = plan.rules[number]

    def visit(turn, state):
        member = Head(batch, key_head, jax.lax.div(turn, count))
        at = tiling.span((first + jax.lax.rem(turn, count)) * plan.sizes.query, plan.sizes.query)
        own = load(plan, queries, member, at)
        others = tiling.tokens(source.query_codes, batch, at).flat
        return visit_queries(plan, rule, source, member, (k, v, known, own, others), state)

    none = jnp.zeros((columns, plan.size), jnp.float32)
    sums = jax.lax.fori_loop(0, plan.group * count, visit, (none, none))
    for x, value in zip((of_k, of_v), sums, strict=True):
        tiling.store_keys(plan, x, head, index, value)


def visit_queries(plan: Plan, rule: Rule, source: Operand, head: Head, tile, state):
    """Adds what a block of queries gives to the gradients of keys and values; keys along rows."""
    (k, v, keys, queries, others), (total_k, total_v) = tile, state
    distance = tiling.distances(source, others, keys)
    made = again(
        plan.softcap,
        product(k, queries.q, (1, 1)),
        product(v, queries.gradient, (1, 1)),
        (queries.log_z[None, :], queries.mean[None, :]),
        (tiling.bias_of(plan, source, head, distance), tiling.seen(rule, source, others, keys)),
    )
    total_v = total_v + product(made.shares.astype(v.dtype), queries.gradient, (1, 0))
    return total_k + product(made.of_scores.astype(k.dtype), queries.q, (1, 0)), total_v
