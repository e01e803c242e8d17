# SPDX-License-Identifier: Apache-2.0
"""Flash attention that knows T5's bias, packing, prefixes, windows and two sources at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_lite.kernels import diagonals, flash_backward, flash_backward_keys, flash_forward, visits
from t5x_lite.kernels.flash_forward import Operand
from t5x_lite.kernels.flash_plan import (
    LANES,
    Numbers,
    Plan,
    Rule,
    lanes_of,
    largest_sizes,
    pack,
    unpack,
)
from t5x_lite.kernels.reference import KEPT
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.source import Source
from t5x_lite.kernels.tile_table import Shape, blocks
from t5x_lite.kernels.tiles import How
from t5x_lite.kernels.visits import Sizes


class Packed(NamedTuple):
    """A source with heads side by side in lanes, and its bias [m p d] by difference of indices."""

    k: Float[Array, "b s w"]
    v: Float[Array, "b s w"]
    bias: Float[Array, "m p d"] | None


def flash_attention(
    q: Float[Array, "b t k g h"],
    sources: tuple[Source, ...],
    softcap: float | None,
    how: How,
    largest: Sizes | None = None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention over all sources in one softmax; memory linear in length, both ways.

    Queries come scaled. softcap c turns scores x into c tanh(x / c), before bias and mask; a bias
    is that of key index minus query index. Scores and sums are float32. A query that sees nothing
    gets 0, and gives no gradient. Blocks are at most `largest`, by default
    what suits the chip.
    """
    return flash_attention_log_z(q, sources, softcap, how, largest)[0]


def flash_attention_log_z(
    q, sources: tuple[Source, ...], softcap: float | None, how: How, largest: Sizes | None = None
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b n t"]]:
    """The context, and log(Z) of every query (-1e30 where it sees nothing), to join parts by."""
    b, t, k, g, h = q.shape
    plan = plan_of(q, sources, softcap, how, largest)
    heads = lambda x: pack(jnp.swapaxes(x, 1, 2))
    arrays, sights, origins = [], [], []
    for source in sources:
        bias, origin = bias_of(plan, source)
        arrays.append(Packed(heads(source.keys), heads(source.values), bias))
        sights.append(source.sight)
        origins.append(origin)
    packed = pack(q.reshape(b, t, k * g, h))
    context, log_z = attend(plan, packed, tuple(arrays), tuple(sights), tuple(origins))
    log_z = log_z.reshape(b, -1, t)[:, : k * g]
    return unpack(context, k * g, h).reshape(q.shape), log_z


def plan_of(q, sources, softcap, how: How, largest: Sizes | None) -> Plan:
    _, t, k, g, h = q.shape
    row_bytes = max(LANES, lanes_of(h)) * q.dtype.itemsize
    longest = max(source.keys.shape[2] for source in sources)
    largest = largest or measured(how, q, sources[0], longest) or largest_sizes(how, row_bytes)
    whole = lambda length: -(-length // LANES) * LANES
    return Plan(
        heads=k * g,
        group=g,
        head=lanes_of(h),
        queries=t,
        sizes=Sizes(min(largest.query, whole(t)), min(largest.key, whole(longest))),
        rules=tuple(rule_of(source) for source in sources),
        softcap=softcap,
        how=how,
    )


def measured(how: How, q, source: Source, keys: int) -> Sizes | None:
    """The blocks that were measured on this chip for such shapes, where they were."""
    _, t, _, _, h = q.shape
    biased, causal = source.relative is not None, source.sight.causal
    shape = Shape(how.chip, t, keys, h, q.dtype.itemsize, biased, causal)
    found = blocks(shape) if how.chip else None
    return Sizes(*found) if found else None


def rule_of(source: Source) -> Rule:
    sight = source.sight
    return Rule(
        causal=sight.causal,
        prefix=sight.causal and sight.query_prefix is not None,
        reach=sight.reach is not None,
        biased=source.relative is not None,
        length=source.keys.shape[2],
    )


def bias_of(plan: Plan, source: Source):
    """The bias by difference of indices, a row per head of every block, and where it begins."""
    if source.relative is None:
        return None, jnp.int32(0)
    widest = max(plan.sizes)
    bias, origin = diagonals.by_difference(source.relative, source.sight.offset, widest)
    spare = plan.blocks * plan.packed - plan.heads
    return jnp.pad(bias, ((0, spare), (0, 0))).reshape(plan.blocks, plan.packed, -1), origin


class Prepared(NamedTuple):
    """A source as kernels take it: queries along rows, and (reversed) keys along rows."""

    operand: Operand
    numbers: Numbers
    reversed_operand: Operand
    reversed_numbers: Numbers


def prepared(plan: Plan, source: Packed, sight: Sight, origin) -> Prepared:
    codes = visits.codes(sight, plan.sizes)
    by_query, by_key = visits.visits(sight, codes, plan.sizes)
    reach = (0, 0) if sight.reach is None else sight.reach
    offset = 0 if sight.offset is None else sight.offset
    place = lambda origin: jnp.stack([jnp.int32(x) for x in (offset, *reach, origin)])
    bias, reversed_bias, end = source.bias, None, 0
    if bias is not None:
        reversed_bias, end = diagonals.reversed_vector(bias), origin + bias.shape[-1]
    return Prepared(
        Operand(source.k, source.v, codes, bias),
        Numbers(place(origin), by_query),
        Operand(source.k, source.v, codes, reversed_bias),
        Numbers(place(-end), by_key),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, sources, sights, origins):
    return forward(plan, q, sources, sights, origins)[0]


def forward(plan: Plan, q, sources: tuple[Packed, ...], sights, origins):
    seen = [prepared(plan, *parts) for parts in zip(sources, sights, origins, strict=True)]
    operands, numbers = tuple(one.operand for one in seen), tuple(one.numbers for one in seen)
    context, log_z = flash_forward.forward(plan, q, operands, numbers)
    context = checkpoint_name(context, KEPT)
    log_z = checkpoint_name(log_z, KEPT)
    return (context, log_z), (q, sources, sights, origins, context, log_z)


def backward(plan: Plan, kept, gradients):
    q, sources, sights, origins, context, log_z = kept
    queries = queries_of(plan, q, gradients, context, log_z)
    seen = [prepared(plan, *parts) for parts in zip(sources, sights, origins, strict=True)]
    operands, numbers = tuple(one.operand for one in seen), tuple(one.numbers for one in seen)
    of_q, of_bias = flash_backward.backward_queries(plan, queries, operands, numbers)
    of_keys = []
    for index, one in enumerate(seen):
        transposed = (one.reversed_operand, one.reversed_numbers)
        of_keys.append(flash_backward_keys.backward_keys(plan, index, queries, *transposed))
    of_sources = [Packed(*pair, bias) for pair, bias in zip(of_keys, of_bias, strict=True)]
    return of_q, tuple(of_sources), None, None


def queries_of(plan: Plan, q, gradients, context, log_z) -> flash_backward.Queries:
    """A score's gradient is p (slope - mean): mean takes in what the gradient of log(Z) adds."""
    gradient, of_log_z = gradients
    b, t, _ = q.shape
    mean = gradient.astype(jnp.float32) * context.astype(jnp.float32)
    mean = jnp.sum(mean.reshape(b, t, plan.blocks, plan.packed, plan.head), axis=-1)
    mean = jnp.transpose(mean, (0, 2, 3, 1)) - of_log_z
    return flash_backward.Queries(q, gradient, log_z, mean)


attend.defvjp(forward, backward)
