# SPDX-License-Identifier: Apache-2.0
"""Flash attention for GPUs as Triton kernels: what `flash_attention` computes, by the same rules.

Interpreted against float64 and lowered for CUDA in tests, and once compiled to machine code by
Triton's own compiler (flash_triton_tile.LARGEST); it has not run on a GPU, nor been timed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels import flash_triton_backward as backwards
from t5x_lite.kernels import flash_triton_bias as biases
from t5x_lite.kernels import flash_triton_forward as forwards
from t5x_lite.kernels import flash_triton_tile as tiling
from t5x_lite.kernels.flash_attention import rule_of
from t5x_lite.kernels.flash_triton_tile import FEWEST, Plan
from t5x_lite.kernels.reference import KEPT
from t5x_lite.kernels.source import Source
from t5x_lite.kernels.tiles import How
from t5x_lite.kernels.visits import Sizes


class Arrays(NamedTuple):
    """What of a source has a gradient; bias by distance, as far as it changes."""

    k: Float[Array, "b k s h"]
    v: Float[Array, "b k s h"]
    bias: Float[Array, "n d"] | None


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
    gets 0, and gives no gradient. Blocks are at most `largest`, powers of two from 16 on.
    """
    return flash_attention_log_z(q, sources, softcap, how, largest)[0]


def flash_attention_log_z(
    q, sources: tuple[Source, ...], softcap: float | None, how: How, largest: Sizes | None = None
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b n t"]]:
    """The context, and log(Z) of every query (-1e30 where it sees nothing), to join parts by."""
    plan = plan_of(q, sources, softcap, how, largest)
    arrays = tuple(Arrays(source.keys, source.values, bias_of(source)) for source in sources)
    return attend(plan, q, arrays, tuple(source.sight for source in sources))


def plan_of(q, sources, softcap, how: How, largest: Sizes | None) -> Plan:
    _, t, _, g, h = q.shape
    size = max(FEWEST, pl.next_power_of_2(h))
    largest = largest or tiling.largest_sizes(size, q.dtype)
    longest = max(source.keys.shape[2] for source in sources)
    whole = lambda length: max(FEWEST, pl.next_power_of_2(length))
    sizes = Sizes(min(largest.query, whole(t)), min(largest.key, whole(longest)))
    return Plan(g, h, t, sizes, tuple(rule_of(source) for source in sources), softcap, how)


def bias_of(source: Source) -> Float[Array, "n d"] | None:
    relative = source.relative
    if relative is None:
        return None
    return relative.by_distance(-relative.farthest, 2 * relative.farthest + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, sources, sights):
    return forward(plan, q, sources, sights)[0]


def forward(plan: Plan, q, sources: tuple[Arrays, ...], sights):
    operands = [both(plan, *one)[0] for one in zip(sources, sights, strict=True)]
    context, log_z = forwards.forward(plan, q, tuple(operands))
    context = checkpoint_name(context, KEPT)
    log_z = checkpoint_name(log_z, KEPT)
    return (context, log_z), (q, sources, sights, context, log_z)


def both(plan: Plan, source: Arrays, sight):
    """The source for programs of queries, and for programs of keys."""
    return tiling.operands_of(*source, sight, plan.sizes)


def backward(plan: Plan, kept, gradients):
    q, sources, sights, context, log_z = kept
    gradient, of_log_z = gradients
    # A score's gradient is p (slope - mean): mean takes in what the gradient of log(Z) adds.
    mean = jnp.sum(gradient.astype(jnp.float32) * context.astype(jnp.float32), axis=-1)
    mean = jnp.moveaxis(mean.reshape(*q.shape[:2], -1), 1, 2) - of_log_z
    queries = backwards.Queries(q, gradient, log_z, mean)
    by_query, by_key = zip(*map(functools.partial(both, plan), sources, sights), strict=True)
    of_q, far = backwards.of_queries(plan, queries, by_query)
    of_sources = []
    for index, (source, sums) in enumerate(zip(by_key, far, strict=True)):
        of_bias = None if sums is None else biases.of_bias(plan, index, queries, source, sums)
        of_sources.append(Arrays(*backwards.of_keys(plan, index, queries, source), of_bias))
    return of_q, tuple(of_sources), None


attend.defvjp(forward, backward)
