# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward, for keys and values: keys stand along rows, queries along columns."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import diagonals, tiles
from t5x_lite.kernels import flash_tile as tiling
from t5x_lite.kernels.flash_backward import Queries, again
from t5x_lite.kernels.flash_forward import Operand, compiler_parameters
from t5x_lite.kernels.flash_plan import LANES, Numbers, Plan, cost, size
from t5x_lite.kernels.visits import Codes


class State(NamedTuple):
    """A block of keys: the gradients so far; biases of g blocks of query heads."""

    of_k: Float[Array, "s w"]
    of_v: Float[Array, "s w"]
    codes: Int[Array, "s 128"]
    diagonals: Float[Array, "gp 128 d"] | None


class At(NamedTuple):
    """A step of the grid: block of key heads, row, block of keys, block of query heads of these
    key heads, and the turn of a block of queries."""

    heads: Int[Array, ""]
    row: Int[Array, ""]
    block: Int[Array, ""]
    member: Int[Array, ""]
    step: Int[Array, ""]


def backward_keys(
    plan: Plan, index: int, queries: Queries, source: Operand, numbers: Numbers
) -> tuple[Float[Array, "b s w"], Float[Array, "b s w"]]:
    """The gradients of k and v of source `index`; its bias is by query minus key index."""
    operands = (*queries, source.k, source.v)
    b, _, lanes = source.k.shape
    steps = jnp.maximum(jnp.max(numbers.visits.count), 1)
    grid = (lanes // plan.width, b, plan.key_blocks(index), plan.group, steps)
    times = plan.key_blocks(index) if plan.group * plan.query_blocks > 1 else 1
    accessed = 2 * size(source.k, source.v) + times * size(*queries)
    specs = operand_specs(plan, index, source)
    like = [tiles.like(x.shape, x.dtype, *operands) for x in (source.k, source.v)]
    return pl.pallas_call(
        functools.partial(kernel, plan, index),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[query_specs(plan, index), specs],
            out_specs=[specs.k, specs.v],
            scratch_shapes=tuple(state_shapes(plan, source)),
        ),
        out_shape=like,
        compiler_params=compiler_parameters(plan, len(grid)),
        cost_estimate=cost(replace(plan, rules=plan.rules[index : index + 1]), b, 4, accessed),
        interpret=plan.how.interpret,
        name="flash_attention_backward_keys",
    )(numbers, queries, source)


def kernel(plan: Plan, index: int, numbers, queries, source, of_k, of_v, *scratch) -> None:
    state = State(*scratch)
    at = At(*(pl.program_id(axis) for axis in range(5)))
    count = numbers.visits.count[at.row * plan.key_blocks(index) + at.block]
    query = query_block(plan, index, numbers, at)

    @pl.when((at.member == 0) & (at.step == 0))
    def begin():
        state.of_k[...] = jnp.zeros(state.of_k.shape, jnp.float32)
        state.of_v[...] = jnp.zeros(state.of_v.shape, jnp.float32)
        state.codes[...] = tiling.column(source.codes.key[0])

    if state.diagonals is not None:
        first = (at.row == 0) & (at.block == 0) & (at.step == 0)
        scratch = state.diagonals.at[pl.ds(at.member * plan.packed, plan.packed)]
        pl.when(first)(functools.partial(tiling.expand, source.bias, scratch))

    place = tiling.Place(query * plan.sizes.query, at.block * plan.sizes.key, -1)
    active = (at.step < count) & (at.heads * plan.group + at.member < plan.blocks)
    own = numbers.visits.own[at.row * plan.key_blocks(index) + at.block]
    whole = own == numbers.visits.other[at.row * plan.query_blocks + query]
    whole = whole & tiling.wholly_seen(plan.rules[index], place, numbers, plan.sizes)
    visited = functools.partial(visit, plan, index, at, (numbers, queries, source), state, place)
    pl.when(active & whole)(functools.partial(visited, False))
    pl.when(active & ~whole)(functools.partial(visited, True))

    @pl.when((at.member == pl.num_programs(3) - 1) & (at.step == pl.num_programs(4) - 1))
    def finish():
        of_k[0] = state.of_k[...].astype(of_k.dtype)
        of_v[0] = state.of_v[...].astype(of_v.dtype)


def visit(plan: Plan, index: int, at: At, given, state: State, place, masked: bool) -> None:
    """Adds what a tile gives to the gradients of its keys and values."""
    numbers, queries, source = given
    rule, sizes, shown = plan.rules[index], plan.sizes, None
    if masked:
        upright = state.codes[:, :1]
        shown = tiling.seen(rule, place, numbers, upright, source.codes.query[0])
    inside = lambda x: tiling.inside(x[0], place.query, plan.queries, sizes.query)
    every, gradients = inside(queries.q), inside(queries.gradient)
    block = at.heads * plan.group + at.member
    for head in range(plan.packed):
        q = tiling.only(plan, every, block, head)
        gradient = tiling.only(plan, gradients, block, head)
        bias = None
        if rule.biased:
            own, start = at.member * plan.packed + head, place.start(numbers.place[3])
            bias = diagonals.tile(state.diagonals, own, start, (sizes.key, sizes.query))
        statistics = (x[0, 0, head : head + 1] for x in (queries.log_z, queries.mean))
        tile = again(
            plan.softcap,
            tiling.product(source.k[0], q, (1, 1)),
            tiling.product(source.v[0], gradient, (1, 1)),
            tuple(statistics),
            (bias, shown),
        )
        state.of_k[...] += tiling.product(tile.of_scores.astype(q.dtype), q, (1, 0))
        state.of_v[...] += tiling.product(tile.shares.astype(gradient.dtype), gradient, (1, 0))


def query_block(plan: Plan, index: int, numbers: Numbers, at: At) -> Int[Array, ""]:
    """The block of queries of this step; before its first and after its last, the nearest."""
    own = at.row * plan.key_blocks(index) + at.block
    turn = jnp.minimum(at.step, jnp.maximum(numbers.visits.count[own] - 1, 0))
    return numbers.visits.first[own] + turn


def query_heads(plan: Plan, at: At) -> Int[Array, ""]:
    """The block of query heads; where the last key heads have none left, the last one."""
    return jnp.minimum(at.heads * plan.group + at.member, plan.blocks - 1)


def query_specs(plan: Plan, index: int) -> Queries:
    def place(*given):
        at = At(*given[:5])
        return at.row, query_block(plan, index, given[5], at), query_heads(plan, at)

    def statistic(*given):
        row, block, heads = place(*given)
        return row, heads, 0, block

    arrays = pl.BlockSpec((1, plan.sizes.query, plan.width), place)
    statistics = pl.BlockSpec((1, 1, plan.packed, plan.sizes.query), statistic)
    return Queries(arrays, arrays, statistics, statistics)


def operand_specs(plan: Plan, index: int, source: Operand) -> Operand:
    keys = pl.BlockSpec((1, plan.sizes.key, plan.width), lambda h, b, s, *rest: (b, s, h))

    def query_codes(*given):
        return given[1], 0, query_block(plan, index, given[5], At(*given[:5]))

    codes = Codes(
        pl.BlockSpec((1, 1, plan.sizes.query), query_codes),
        pl.BlockSpec((1, 1, plan.sizes.key), lambda h, b, s, *rest: (b, 0, s)),
    )
    bias = None
    if source.bias is not None:
        heads = lambda *given: (query_heads(plan, At(*given[:5])), 0, 0)
        bias = pl.BlockSpec((1, *source.bias.shape[1:]), heads)
    return Operand(keys, keys, codes, bias)


def state_shapes(plan: Plan, source: Operand) -> State:
    sums = pltpu.VMEM((plan.sizes.key, plan.width), jnp.float32)
    expanded = None
    if source.bias is not None:
        heads = plan.group * plan.packed
        expanded = pltpu.VMEM((heads, LANES, source.bias.shape[2]), jnp.float32)
    return State(sums, sums, pltpu.VMEM((plan.sizes.key, LANES), jnp.int32), expanded)
