# SPDX-License-Identifier: Apache-2.0
"""Flash attention backward, for queries and biases: tiles made again from log(Z), on TPU."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import diagonals, flash_forward, tiles
from t5x_lite.kernels import flash_tile as tiling
from t5x_lite.kernels.flash_forward import Operand
from t5x_lite.kernels.flash_plan import LANES, Numbers, Plan, cost, size


class Queries(NamedTuple):
    """What the backward pass knows of queries; mean: the sum over keys of p times its slope."""

    q: Float[Array, "b t w"]
    gradient: Float[Array, "b t w"]
    log_z: Float[Array, "b m p t"]
    mean: Float[Array, "b m p t"]


class State(NamedTuple):
    """A block of queries, per packed head; slopes: of the biases, along expanded diagonals."""

    q: Float[Array, "p t w"]
    gradient: Float[Array, "p t w"]
    log_z: Float[Array, "p t 128"]
    mean: Float[Array, "p t 128"]
    sum: Float[Array, "p t w"]
    codes: tuple[Int[Array, "t 128"], ...]
    diagonals: tuple[Float[Array, "p 128 d"] | None, ...]
    slopes: tuple[Float[Array, "p 128 d"] | None, ...]


class Tile(NamedTuple):
    """The probabilities of a tile, and the gradients of its scores after and before the softcap."""

    shares: Float[Array, "r c"]
    of_biased: Float[Array, "r c"]
    of_scores: Float[Array, "r c"]


def backward_queries(
    plan: Plan, queries: Queries, sources: tuple[Operand, ...], numbers: tuple[Numbers, ...]
) -> tuple[Float[Array, "b t w"], tuple[Float[Array, "m p d"] | None, ...]]:
    """The gradients of q, and of every source's bias by difference of indices."""
    operands = (*queries, *(x for source in sources for x in (source.k, source.v)))
    biases = [source.bias for source in sources]
    of_bias = [None if x is None else tiles.like(x.shape, x.dtype, *operands) for x in biases]
    inputs = flash_forward.queries(plan)
    statistics = flash_forward.statistics(plan)
    source_specs = flash_forward.operand_specs(plan, sources)
    accessed = size(*queries, queries.q) + flash_forward.fetched(plan, sources)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=flash_forward.grid(plan, queries.q.shape[0], numbers),
            in_specs=[Queries(inputs, inputs, statistics, statistics), source_specs],
            out_specs=(inputs, tuple(spec.bias for spec in source_specs)),
            scratch_shapes=tuple(state_shapes(plan, queries, sources)),
        ),
        out_shape=(tiles.like(queries.q.shape, queries.q.dtype, *operands), tuple(of_bias)),
        compiler_params=flash_forward.compiler_parameters(plan),
        cost_estimate=cost(plan, queries.q.shape[0], 3, accessed),
        interpret=plan.how.interpret,
        name="flash_attention_backward_queries",
    )(numbers, queries, sources)


def kernel(plan: Plan, numbers, queries, sources, of_q, of_bias, *scratch) -> None:
    state = State(*scratch)
    block, row, part, step = (pl.program_id(axis) for axis in range(4))
    first = (row == 0) & (part == 0)
    final = step == pl.num_programs(3) - 1
    last = (row == pl.num_programs(1) - 1) & (part == pl.num_programs(2) - 1) & final

    @pl.when(step == 0)
    def begin():
        state.sum[...] = jnp.zeros(state.sum.shape, jnp.float32)
        flash_forward.spread(plan, block, queries.q, state.q)
        flash_forward.spread(plan, block, queries.gradient, state.gradient)
        for head in range(plan.packed):
            state.log_z[head] = tiling.column(queries.log_z[0, 0, head : head + 1])
            state.mean[head] = tiling.column(queries.mean[0, 0, head : head + 1])
        flash_forward.prepare(sources, state.codes, state.diagonals, first)

    slopes = [x for x in state.slopes if x is not None]
    pl.when(first & (step == 0))(functools.partial(clear, slopes))
    tiling.walk(plan, numbers, functools.partial(visit, plan, numbers, sources, state))

    @pl.when(final)
    def finish():
        heads = range(plan.packed)
        whole = sum(tiling.home(plan, state.sum[head], block, head) for head in heads)
        of_q[0] = whole.astype(of_q.dtype)

    vectors = [x for x in of_bias if x is not None]
    pl.when(last)(functools.partial(fold, slopes, vectors))


def clear(slopes) -> None:
    for slope in slopes:
        slope[...] = jnp.zeros(slope.shape, jnp.float32)


def fold(slopes, vectors) -> None:
    """Sums slopes [p 128 d] along diagonals into vectors [1 p d]."""
    for slope, vector in zip(slopes, vectors, strict=True):
        for head in range(slope.shape[0]):
            vector[0, head : head + 1] = diagonals.folded(slope[head])


def visit(plan: Plan, numbers, sources, state: State, index: int, place, masked: bool) -> None:
    """Adds what a tile gives to the gradient of q and of its bias."""
    rule, source = plan.rules[index], sources[index]
    k = tiling.inside(source.k[0], place.key, rule.length, plan.sizes.key)
    shown = None
    if masked:
        upright = state.codes[index][:, :1]
        shown = tiling.seen(rule, place, numbers[index], upright, source.codes.key[0])
    for head in range(plan.packed):
        bias, start = None, place.start(numbers[index].place[3])
        if rule.biased:
            bias = diagonals.tile(state.diagonals[index], head, start, tuple(plan.sizes))
        tile = again(
            plan.softcap,
            tiling.product(state.q[head], k, (1, 1)),
            tiling.product(state.gradient[head], source.v[0], (1, 1)),
            (state.log_z[head][:, :1], state.mean[head][:, :1]),
            (bias, shown),
        )
        if rule.biased:
            diagonals.add_tile(state.slopes[index], head, start, tile.of_biased)
        state.sum[head] += tiling.product(tile.of_scores.astype(k.dtype), k, (1, 0))


def again(softcap: float | None, scores, slope, statistics, extras) -> Tile:
    """The tile of `scores` (q times k) once more; slope: gradient of the context times v.

    statistics: log(Z) and mean of queries; extras: bias and what is shown, or None for either.
    """
    (log_z, mean), (bias, shown) = statistics, extras
    hide = lambda x: x if shown is None else jnp.where(shown, x, 0)
    capped = tiling.capped(scores, softcap)
    shares = hide(jnp.exp((capped if bias is None else capped + bias) - log_z))
    of_biased = hide(shares * (slope - mean))
    # tanh' = 1 - tanh^2; what is hidden may be anything, also no number.
    steepness = 1 if softcap is None else hide(1 - (capped / softcap) ** 2)
    return Tile(shares, of_biased, of_biased * steepness)


def state_shapes(plan: Plan, queries: Queries, sources: tuple[Operand, ...]) -> State:
    forward = flash_forward.state_shapes(plan, queries.q.dtype, sources)
    per_query = pltpu.VMEM((plan.packed, plan.sizes.query, LANES), jnp.float32)
    gradient = pltpu.VMEM(forward.q.shape, queries.gradient.dtype)
    return State(
        q=forward.q,
        gradient=gradient,
        log_z=per_query,
        mean=per_query,
        sum=forward.sum,
        codes=forward.codes,
        diagonals=forward.diagonals,
        slopes=forward.diagonals,
    )
