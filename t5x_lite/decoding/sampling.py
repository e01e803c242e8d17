# SPDX-License-Identifier: Apache-2.0
"""Which token a row writes at a position: the most probable one, or one drawn by Gumbel noise.

The noise is a function of the row's seed, the row's number and the position alone. Whoever drafts,
however wide a block is and whoever shares the batch: the same tokens are drawn (Daliri, Musco and
Suresh, 2024, arXiv 2408.07978).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_lite.sharding import spec


class Sampling(NamedTuple):
    """How each row draws. temperature 0 is greedy; top_k 0 and top_p 1 leave out nothing."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    seed: UInt32[Array, " b"]
    row: UInt32[Array, " b"]


def choose(
    logits: Float[Array, "b w v"], positions: Int[Array, "b w"], sampling: Sampling | None
) -> Int[Array, "b w"]:
    """The token chosen for each position; without sampling the most probable, lowest id first."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature = sampling.temperature[:, None, None]
    scaled = kept(logits / jnp.where(temperature > 0, temperature, 1.0), sampling)
    drawn = scaled + gumbel(sampling, positions, logits.shape[-1])
    return jnp.argmax(jnp.where(temperature > 0, drawn, logits), axis=-1).astype(jnp.int32)


def gumbel(sampling: Sampling, positions: Int[Array, "b w"], size: int) -> Float[Array, "b w v"]:
    """Noise [size] per position, keyed by fold_in(fold_in(seed, row), position)."""

    def one(seed, row, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.gumbel(key, (size,))

    rows = jax.vmap(jax.vmap(one, in_axes=(None, None, 0)))
    return rows(sampling.seed, sampling.row, positions)


def kept(logits: Float[Array, "b w v"], sampling: Sampling) -> Float[Array, "b w v"]:
    """logits with what top-k, and then top-p of the rest, leave out at minus infinity.

    Ties with the last one kept are kept too.
    """
    top_k = sampling.top_k[:, None, None]
    counts = jnp.ones_like(logits)
    enough = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    logits = jnp.where(heaviest(logits, counts, enough), logits, -jnp.inf)
    top_p = sampling.top_p[:, None, None]
    inside = heaviest(logits, jax.nn.softmax(logits), top_p)
    return jnp.where(inside | (top_p >= 1), logits, -jnp.inf)


def heaviest(
    values: Float[Array, "b w v"], weights: Float[Array, "b w v"], enough: Float[Array, "#b #w #v"]
) -> Bool[Array, "b w v"]:
    """The highest values, as few as together weigh enough.

    The threshold is found bit by bit from the highest: 32 sums in place of a sort, which costs an
    XLA CPU milliseconds per row of a real vocabulary and cannot take k at run time.
    """
    keys = ordered(values)

    def lower(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.sum(jnp.where(keys >= candidate, weights, 0), axis=-1, keepdims=True)
        return jnp.where(weight >= enough, candidate, threshold)

    start = jnp.zeros_like(keys[..., :1])
    return keys >= jax.lax.fori_loop(0, 32, lower, start)


def ordered(values: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of float32 values; both zeros are one."""
    values = jnp.where(values == 0, 0, values.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def whole(logits: Float[Array, "b w v"]) -> Float[Array, "b w v"]:
    """logits with the vocabulary of each row on one device, which choosing among them needs."""
    return jax.reshard(logits, spec("batch length whole"))
