# SPDX-License-Identifier: Apache-2.0
"""Flash attention forward: an online softmax over blocks of keys (Dao et al., 2022), on TPU."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import flash_tile as tiling
from t5x_lite.kernels import tiles
from t5x_lite.kernels.flash_plan import LANES, Numbers, Plan, cost, room, size
from t5x_lite.kernels.visits import Codes


class Operand(NamedTuple):
    """Arrays of a source, or the references to blocks of them; bias per block of heads."""

    k: Float[Array, "b s w"]
    v: Float[Array, "b s w"]
    codes: Codes
    bias: Float[Array, "m p d"] | None


class State(NamedTuple):
    """What a block of queries keeps from one block of keys to the next: per packed head."""

    q: Float[Array, "p t w"]
    peak: Float[Array, "p t 128"]
    total: Float[Array, "p t 128"]
    sum: Float[Array, "p t w"]
    codes: tuple[Int[Array, "t 128"], ...]
    diagonals: tuple[Float[Array, "p 128 d"] | None, ...]


def forward(
    plan: Plan, q: Float[Array, "b t w"], sources: tuple[Operand, ...], numbers: tuple[Numbers, ...]
) -> tuple[Float[Array, "b t w"], Float[Array, "b m p t"]]:
    """Context like q, and log(Z) of every query: m blocks of p heads."""
    b, t, _ = q.shape
    operands = (q, *(x for source in sources for x in (source.k, source.v)))
    log_z = tiles.like((b, plan.blocks, plan.packed, t), jnp.float32, *operands)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid(plan, b, numbers),
            in_specs=[queries(plan), operand_specs(plan, sources)],
            out_specs=[queries(plan), statistics(plan)],
            scratch_shapes=tuple(state_shapes(plan, q.dtype, sources)),
        ),
        out_shape=[tiles.like(q.shape, sources[0].v.dtype, *operands), log_z],
        compiler_params=compiler_parameters(plan),
        cost_estimate=cost(plan, b, 2, 2 * size(q) + size(log_z) + fetched(plan, sources)),
        interpret=plan.how.interpret,
        name="flash_attention",
    )(numbers, q, sources)


def kernel(plan: Plan, numbers, q, sources, context, log_z, *scratch) -> None:
    state = State(*scratch)
    block, row, part, step = (pl.program_id(axis) for axis in range(4))
    first = (row == 0) & (part == 0)

    @pl.when(step == 0)
    def begin():
        start(plan, block, q, state)
        prepare(sources, state.codes, state.diagonals, first)

    tiling.walk(plan, numbers, functools.partial(visit, plan, numbers, sources, state))

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        whole = jnp.zeros(context.shape[1:], jnp.float32)
        for head in range(plan.packed):
            peak, total = state.peak[head], state.total[head]
            blind = peak == tiling.HIDDEN
            share = jnp.where(blind, 0, 1 / jnp.where(blind, 1, total))[:, :1]
            whole = whole + tiling.home(plan, state.sum[head] * share, block, head)
            level = jnp.where(blind, tiling.HIDDEN, peak + jnp.log(jnp.where(blind, 1, total)))
            log_z[0, 0, head : head + 1] = tiling.row(level)
        context[0] = whole.astype(context.dtype)


def start(plan: Plan, block, q, state: State) -> None:
    """A block of queries that has seen nothing yet."""
    state.peak[...] = jnp.full(state.peak.shape, tiling.HIDDEN, jnp.float32)
    state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
    state.sum[...] = jnp.zeros(state.sum.shape, jnp.float32)
    spread(plan, block, q, state.q)


def spread(plan: Plan, block, x, scratch) -> None:
    """Every packed head of x [1 t w] alone, into scratch [p t w]."""
    for head in range(plan.packed):
        scratch[head] = tiling.only(plan, x[0], block, head)


def prepare(sources, codes, diagonals, first) -> None:
    """Codes of queries stood upright; at the first block of these heads, biases laid out."""
    for source, upright, expanded in zip(sources, codes, diagonals, strict=True):
        upright[...] = tiling.column(source.codes.query[0])
        if source.bias is not None:
            pl.when(first)(functools.partial(tiling.expand, source.bias, expanded))


def visit(plan: Plan, numbers, sources, state: State, index: int, place, masked: bool) -> None:
    """Takes a tile into the softmax of every packed head."""
    rule, source = plan.rules[index], sources[index]
    v = tiling.inside(source.v[0], place.key, rule.length, plan.sizes.key)
    if masked:
        upright = state.codes[index][:, :1]
        shown = tiling.seen(rule, place, numbers[index], upright, source.codes.key[0])
    for head in range(plan.packed):
        scores = tiling.product(state.q[head], source.k[0], (1, 1))
        scores = tiling.capped(scores, plan.softcap)
        if rule.biased:
            expanded = state.diagonals[index]
            scores += tiling.bias_tile(expanded, head, place, numbers[index], plan.sizes)
        if masked:
            scores = jnp.where(shown, scores, tiling.HIDDEN)
        before = state.peak[head]
        peak = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        shares = jnp.exp(scores - peak[:, :1])
        fade = jnp.exp(before - peak)
        state.peak[head] = peak
        state.total[head] = fade * state.total[head] + jnp.sum(shares, axis=1, keepdims=True)
        seen = tiling.product(shares.astype(v.dtype), v, (1, 0))
        state.sum[head] = fade[:, :1] * state.sum[head] + seen


def grid(plan: Plan, rows: int, numbers: tuple[Numbers, ...]) -> tuple:
    """As many steps as the block of queries takes that visits most."""
    steps = jnp.maximum(jnp.max(sum(own.visits.count for own in numbers)), 1)
    return plan.blocks, rows, plan.query_blocks, steps


def compiler_parameters(plan: Plan, axes: int = 4) -> pltpu.CompilerParams:
    """Heads may be shared between cores; the rest follows in order, for what is kept in scratch."""
    order = ("parallel", *("arbitrary",) * (axes - 1))
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=room(plan.how).memory)


def fetched(plan: Plan, sources: tuple[Operand, ...]) -> int:
    """Bytes of keys and values: again for every block of queries, unless they are one block."""
    times = [1 if plan.key_blocks(i) == 1 else plan.query_blocks for i in range(len(sources))]
    read = [size(source.k, source.v) for source in sources]
    return plan.group * sum(map(operator.mul, read, times))


def queries(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, plan.sizes.query, plan.width), lambda m, b, t, step, n: (b, t, m))


def statistics(plan: Plan) -> pl.BlockSpec:
    """A number per query and head, queries along lanes."""
    shape = (1, 1, plan.packed, plan.sizes.query)
    return pl.BlockSpec(shape, lambda m, b, t, step, n: (b, m, 0, t))


def operand_specs(plan: Plan, sources: tuple[Operand, ...]) -> tuple[Operand, ...]:
    """Which block of every source's arrays a step of the grid is given."""
    return tuple(operand_spec(plan, index, source) for index, source in enumerate(sources))


def operand_spec(plan: Plan, index: int, source: Operand) -> Operand:
    size = plan.sizes
    block = lambda *at: tiling.key_block(plan, at[4], index, at[:4])
    keys = pl.BlockSpec(
        (1, size.key, plan.width),
        lambda *at: (at[1], block(*at), tiling.quotient(at[0], plan.group)),
    )
    codes = Codes(
        pl.BlockSpec((1, 1, size.query), lambda *at: (at[1], 0, at[2])),
        pl.BlockSpec((1, 1, size.key), lambda *at: (at[1], 0, block(*at))),
    )
    bias = None
    if source.bias is not None:
        bias = pl.BlockSpec((1, *source.bias.shape[1:]), lambda *at: (at[0], 0, 0))
    return Operand(keys, keys, codes, bias)


def state_shapes(plan: Plan, dtype, sources: tuple[Operand, ...]) -> State:
    per_head = lambda lanes, kind: pltpu.VMEM((plan.packed, plan.sizes.query, lanes), kind)
    return State(
        q=per_head(plan.width, dtype),
        peak=per_head(LANES, jnp.float32),
        total=per_head(LANES, jnp.float32),
        sum=per_head(plan.width, jnp.float32),
        codes=tuple(pltpu.VMEM((plan.sizes.query, LANES), jnp.int32) for _ in sources),
        diagonals=tuple(diagonal_shape(source) for source in sources),
    )


def diagonal_shape(source: Operand):
    if source.bias is None:
        return None
    _, heads, differences = source.bias.shape
    return pltpu.VMEM((heads, LANES, differences), jnp.float32)
