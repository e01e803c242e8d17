# SPDX-License-Identifier: Apache-2.0
"""Which token a row writes at a position: the most probable one, or one drawn by Gumbel noise.

The noise is a function of the row's seed, the row's number and the position alone. Whoever drafts,
however wide a block is and whoever shares the batch: the same tokens are drawn (Daliri, Musco and
Suresh, 2024, arXiv 2408.07978). A drafter that has probabilities guesses by `choose` on its own
logits: with the noise of the model's choice it is right at least (1 - d) / (1 + d) of the time,
d the total variation distance of the two, and exact acceptance keeps the text.

Rules of acceptance that draw for themselves (`speculative`) need noise that nobody has seen: it
has streams of its own, and depends on where the block begins too.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_lite import kernels
from t5x_lite.sharding import spec


class Sampling(NamedTuple):
    """How each row draws. temperature 0 is greedy; top_k 0 and top_p 1 leave out nothing."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    seed: UInt32[Array, " b"]
    row: UInt32[Array, " b"]


class Stream(enum.IntEnum):
    """What fresh noise is for. Values are far from any position, which are streams as well."""

    GUESS = 2**32 - 1
    ACCEPT = 2**32 - 2
    RESIDUAL = 2**32 - 3


def choose(
    logits: Float[Array, "b w v"], positions: Int[Array, "b w"], sampling: Sampling | None
) -> Int[Array, "b w"]:
    """The token chosen for each position; without sampling the most probable, lowest id first."""
    if sampling is None:
        return most_probable(logits)
    temperature = sampling.temperature[:, None, None]
    drawn = scaled(logits, sampling) + gumbel(sampling, positions, logits.shape[-1])
    return jnp.argmax(jnp.where(temperature > 0, drawn, logits), axis=-1).astype(jnp.int32)


def most_probable(logits: Float[Array, "... v"]) -> Int[Array, "..."]:
    """The lowest id of the largest logit, as argmax; the last id where a logit is no number.

    On a CPU two passes that XLA vectorises, where argmax is a loop over pairs and top_k a heap: for
    49,152 logits 0.04, 0.23 and 0.08 ms of one core (jaxlib 0.10.2). Nowhere else: where a compiler
    makes logits anew for each pass, in another precision, the largest would equal none.
    """
    if kernels.device()[0] != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    size = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(size, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == largest, ids, size - 1), axis=-1)


def scaled(logits: Float[Array, "b w v"], sampling: Sampling) -> Float[Array, "b w v"]:
    """logits over the temperature (0 as 1), with what top-k and top-p leave out at -infinity."""
    temperature = sampling.temperature[:, None, None]
    return kept(logits / jnp.where(temperature > 0, temperature, 1.0), sampling)


def law(logits: Float[Array, "b w v"], sampling: Sampling | None) -> Float[Array, "b w v"]:
    """The log-probabilities that `choose` draws by: greedily, all on the most probable token."""
    best = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(logits.shape[-1])
    greedy = jnp.where(best, 0.0, -jnp.inf)
    if sampling is None:
        return greedy
    drawn = jax.nn.log_softmax(scaled(logits, sampling))
    return jnp.where(sampling.temperature[:, None, None] > 0, drawn, greedy)


def guess(
    log_probability: Float[Array, "b v"],
    begin: Int[Array, " b"],
    position: Int[Array, " b"],
    sampling: Sampling,
) -> Int[Array, " b"]:
    """One draw per row, for a Draft that carries log_probability (`law` of the drafter's logits).

    begin is the position of the first guess of the block, state.length + 1; position is the
    guess's own. Independent of `choose` and of every other block.
    """
    noise = fresh(sampling, Stream.GUESS, begin, position[:, None], log_probability.shape[-1:])
    drawn = log_probability - jnp.log(-jnp.log(noise[:, 0]))
    return jnp.argmax(drawn, axis=-1).astype(jnp.int32)


def fresh(
    sampling: Sampling,
    stream: Stream,
    begin: Int[Array, " b"],
    positions: Int[Array, "b w"],
    shape: tuple[int, ...] = (),
) -> Float[Array, "b w ..."]:
    """Uniform noise inside (0, 1), keyed by seed, row, stream, begin of the block, and position."""
    least = jnp.finfo(jnp.float32).tiny

    def one(seed, row, begin, position):
        key = jax.random.fold_in(jax.random.key(seed), row)
        for part in (np.uint32(stream), begin, position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, shape, minval=least)

    rows = jax.vmap(jax.vmap(one, in_axes=(None, None, None, 0)))
    return rows(sampling.seed, sampling.row, begin, positions)


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
