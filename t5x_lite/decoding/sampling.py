# SPDX-License-Identifier: Apache-2.0
"""Choice of the next token: the most probable one, or one sampled with Gumbel noise.

The noise is a function of the row's seed, the row's number and the position alone, so that the same
tokens are drawn by any drafter, at any draft length and in any batch (Daliri, Musco and Suresh,
2024, arXiv 2408.07978). A drafter that has probabilities applies `choose_tokens` to its own logits:
with the noise of the model's choice it agrees at least (1 - d) / (1 + d) of the time, d the total
variation distance of the two distributions, and exact acceptance leaves the text unchanged.

Acceptance rules that sample themselves (`speculative`) need noise that no draft depends on: it has
a `NoiseKind` of its own, and also depends on where the block begins.

  b rows    w positions    v vocabulary
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_lite import config
from t5x_lite.decoding.request import Request
from t5x_lite.kernels import api as kernels
from t5x_lite.sharding import by_rows, spec

# That of a token whose range reaches down to 0 or below.
LEAST_TEMPERATURE = 1e-6


class SamplingParams(NamedTuple):
    """Sampling parameters of each row.

    Attributes:
      temperature: float32, divisor of the logits; 0 is greedy.
      top_k: int32, number of most probable tokens to sample from; 0 for all.
      top_p: float32, least probability of the most probable tokens to sample from (nucleus); 1 for
        all.
      seed: uint32, key of the noise.
      row: uint32, number of the row, also a key of the noise.
      min_p: least probability, as a share of the highest one (Nguyen et al., 2024,
        arXiv 2407.01082); None for no limit, here and below.
      typical_p: least probability of the tokens whose information is nearest to the entropy
        (locally typical sampling; Meister et al., 2022, arXiv 2202.00666).
      epsilon_cutoff: least probability (Hewitt et al., 2022, arXiv 2210.15191).
      eta_cutoff: the same, lower where the entropy is high (eta sampling, same paper).
      temperature_range: the most that a token's temperature is above or below `temperature`, by
        the entropy of its distribution (dynamic temperature, as in llama.cpp).
      temperature_exponent: exponent of the entropy, as a share of the highest possible one.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    row: Any
    min_p: Any = None
    typical_p: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    temperature_range: Any = None
    temperature_exponent: Any = None


def make_sampling_params(request: Request, decode: config.Decode) -> SamplingParams:
    """Returns the sampling parameters of each row of the request."""
    rows = len(request.row)

    def optional(value: float, off: float) -> np.ndarray | None:
        return None if value == off else np.full(rows, value, np.float32)

    return SamplingParams(
        temperature=np.full(rows, decode.temperature, np.float32),
        top_k=np.full(rows, decode.top_k, np.int32),
        top_p=np.full(rows, decode.top_p, np.float32),
        seed=request.seed,
        row=request.row,
        min_p=optional(decode.min_p, 0),
        typical_p=optional(decode.typical_p, 1),
        epsilon_cutoff=optional(decode.epsilon_cutoff, 0),
        eta_cutoff=optional(decode.eta_cutoff, 0),
        temperature_range=optional(decode.dynatemp_range, 0),
        temperature_exponent=np.full(rows, decode.dynatemp_exponent, np.float32)
        if decode.dynatemp_range
        else None,
    )


class NoiseKind(enum.IntEnum):
    """Purpose of noise that depends on the block; the values are too large to be positions.

    Attributes:
      DRAFT: sampling a draft token.
      ACCEPT: accepting a draft token.
      RESIDUAL: sampling the token after the last accepted draft.
      ORDER: the order in which the places of a block are filled.
    """

    DRAFT = 2**32 - 1
    ACCEPT = 2**32 - 2
    RESIDUAL = 2**32 - 3
    ORDER = 2**32 - 4


def choose_tokens(
    logits: Float[Array, "b w v"], positions: Int[Array, "b w"], sampling: SamplingParams | None
) -> Int[Array, "b w"]:
    """Chooses a token for each position.

    Args:
      logits: scores of the tokens.
      positions: position of each token to choose.
      sampling: sampling parameters; None for the most probable token, the lowest id of equal ones.

    Returns:
      The ids, int32.
    """
    if sampling is None:
        return argmax_token(logits)
    temperature = sampling.temperature[:, None, None]
    drawn = warp_logits(logits, sampling) + gumbel_noise(sampling, positions, logits.shape[-1])
    return jnp.argmax(jnp.where(temperature > 0, drawn, logits), axis=-1).astype(jnp.int32)


def argmax_token(logits: Float[Array, "... v"]) -> Int[Array, "..."]:
    """Returns the lowest id of the largest logit, as argmax; the last id if any logit is NaN.

    On a CPU two passes that XLA vectorizes, where argmax is a loop over pairs and top_k a heap: for
    49,152 logits 0.04, 0.23 and 0.08 ms of one core (jaxlib 0.10.2). Nowhere else: if a compiler
    recomputes the logits for each pass, in another precision, no logit equals the largest.
    """
    if kernels.target_device().platform != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    size = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(size, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == largest, ids, size - 1), axis=-1)


def warp_logits(logits: Float[Array, "b w v"], sampling: SamplingParams) -> Float[Array, "b w v"]:
    """Divides logits by the temperature (0 as 1) and applies `filter_logits`."""
    return filter_logits(logits / token_temperature(logits, sampling), sampling)


def token_temperature(
    logits: Float[Array, "b w v"], sampling: SamplingParams
) -> Float[Array, "#b #w 1"]:
    """Returns the temperature of each token, which may rise with the entropy; 0 as 1."""
    temperature = sampling.temperature[:, None, None]
    if sampling.temperature_range is not None:
        spread = sampling.temperature_range[:, None, None]
        least, most = jnp.maximum(temperature - spread, LEAST_TEMPERATURE), temperature + spread
        share = jnp.clip(entropy(logits) / np.log(logits.shape[-1]), 0, 1)
        dynamic = least + (most - least) * share ** sampling.temperature_exponent[:, None, None]
        temperature = jnp.where(temperature > 0, dynamic, temperature)
    return jnp.where(temperature > 0, temperature, 1.0)


def truncated_mass(
    logits: Float[Array, "b w v"], sampling: SamplingParams | None
) -> Float[Array, "b w"]:
    """Probability at the temperature of the tokens that `filter_logits` drops; 0 if greedy."""
    zero = by_rows(jnp.zeros_like(logits[..., 0]))
    if sampling is None:
        return zero
    scaled = logits / token_temperature(logits, sampling)
    dropped = jnp.isneginf(filter_logits(scaled, sampling))
    mass = jnp.sum(jnp.where(dropped, jax.nn.softmax(scaled), 0), axis=-1)
    return jnp.where(sampling.temperature[:, None] > 0, mass, zero)


def log_distribution(
    logits: Float[Array, "b w v"], sampling: SamplingParams | None
) -> Float[Array, "b w v"]:
    """Log-probabilities that `choose_tokens` samples from; one token has all if it is greedy.

    Args:
      logits: scores of the tokens.
      sampling: sampling parameters; None is greedy.

    Returns:
      Log-probabilities after temperature, top-k and top-p.
    """
    best = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(logits.shape[-1])
    greedy = jnp.where(best, 0.0, -jnp.inf)
    if sampling is None:
        return greedy
    drawn = jax.nn.log_softmax(warp_logits(logits, sampling))
    return jnp.where(sampling.temperature[:, None, None] > 0, drawn, greedy)


def sample_draft(
    log_probability: Float[Array, "b v"],
    begin: Int[Array, " b"],
    position: Int[Array, " b"],
    sampling: SamplingParams,
) -> Int[Array, " b"]:
    """Samples one token per row, for a Draft that carries log_probability.

    Independent of `choose_tokens` and of every other block.

    Args:
      log_probability: `log_distribution` of the drafter's logits.
      begin: position of the first draft of the block, state.length + 1.
      position: position of this draft.
      sampling: sampling parameters.

    Returns:
      The ids, int32.
    """
    noise = uniform_noise(
        sampling, NoiseKind.DRAFT, begin, position[:, None], log_probability.shape[-1:]
    )
    drawn = log_probability - jnp.log(-jnp.log(noise[:, 0]))
    return jnp.argmax(drawn, axis=-1).astype(jnp.int32)


def uniform_noise(
    sampling: SamplingParams,
    kind: NoiseKind,
    begin: Int[Array, " b"],
    positions: Int[Array, "b w"],
    shape: tuple[int, ...] = (),
) -> Float[Array, "b w ..."]:
    """Uniform noise inside (0, 1).

    Args:
      sampling: its seed and row are keys.
      kind: purpose of the noise, a key.
      begin: position of the first draft of the block, a key.
      positions: a key for each node.
      shape: numbers per node.

    Returns:
      Noise [b w *shape].
    """
    least = jnp.finfo(jnp.float32).tiny

    def node_noise(seed, row, begin, position):
        key = jax.random.fold_in(jax.random.key(seed), row)
        for part in (np.uint32(kind), begin, position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, shape, minval=least)

    rows = jax.vmap(jax.vmap(node_noise, in_axes=(None, None, None, 0)))
    return rows(sampling.seed, sampling.row, begin, positions)


def gumbel_noise(
    sampling: SamplingParams, positions: Int[Array, "b w"], size: int
) -> Float[Array, "b w v"]:
    """Gumbel noise keyed by fold_in(fold_in(seed, row), position).

    Args:
      sampling: its seed and row are keys.
      positions: position of each token.
      size: v.

    Returns:
      Noise for every token of the vocabulary.
    """

    def position_noise(seed, row, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.gumbel(key, (size,))

    rows = jax.vmap(jax.vmap(position_noise, in_axes=(None, None, 0)))
    return rows(sampling.seed, sampling.row, positions)


def filter_logits(logits: Float[Array, "b w v"], sampling: SamplingParams) -> Float[Array, "b w v"]:
    """Sets the logits of tokens that are not sampled from to minus infinity.

    Top-k, then each of top-p, min-p, typical-p, epsilon and eta on what the one before left, in
    the order of transformers. Ties with the last token kept are kept too; the most probable token
    always is, but for typical-p, which keeps the most typical one.
    """
    top_k = sampling.top_k[:, None, None]
    counts = jnp.ones_like(logits)
    enough = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    logits = jnp.where(top_mass(logits, counts, enough), logits, -jnp.inf)
    top_p = sampling.top_p[:, None, None]
    inside = top_mass(logits, jax.nn.softmax(logits), top_p)
    logits = jnp.where(inside | (top_p >= 1), logits, -jnp.inf)
    if sampling.min_p is not None:
        logits = drop_below(logits, sampling.min_p[:, None, None] * max_probability(logits))
    if sampling.typical_p is not None:
        logits = keep_typical(logits, sampling.typical_p[:, None, None])
    if sampling.epsilon_cutoff is not None:
        logits = drop_below(logits, sampling.epsilon_cutoff[:, None, None])
    if sampling.eta_cutoff is not None:
        cutoff = sampling.eta_cutoff[:, None, None]
        limit = jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-entropy(logits)))
        logits = drop_below(logits, limit)
    return logits


def max_probability(logits: Float[Array, "b w v"]) -> Float[Array, "b w 1"]:
    """Returns the probability of the most probable token."""
    return jnp.max(jax.nn.softmax(logits), axis=-1, keepdims=True)


def entropy(logits: Float[Array, "b w v"]) -> Float[Array, "b w 1"]:
    """Returns the entropy of the distribution, in nats."""
    logarithms = jax.nn.log_softmax(logits)
    terms = jnp.where(jnp.isfinite(logarithms), jnp.exp(logarithms) * logarithms, 0)
    return -jnp.sum(terms, axis=-1, keepdims=True)


def drop_below(
    logits: Float[Array, "b w v"], least: Float[Array, "#b #w 1"]
) -> Float[Array, "b w v"]:
    """Sets the logits of tokens less probable than `least` to minus infinity, but for the best."""
    best = logits >= jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where((jax.nn.softmax(logits) >= least) | best, logits, -jnp.inf)


def keep_typical(
    logits: Float[Array, "b w v"], mass: Float[Array, "#b #w 1"]
) -> Float[Array, "b w v"]:
    """Keeps the tokens whose information is nearest to the entropy, as few as have the mass."""
    distance = jnp.abs(-jax.nn.log_softmax(logits) - entropy(logits))
    inside = top_mass(-distance, jax.nn.softmax(logits), mass)
    return jnp.where(inside, logits, -jnp.inf)


def top_mass(
    values: Float[Array, "b w v"], weights: Float[Array, "b w v"], enough: Float[Array, "#b #w #v"]
) -> Bool[Array, "b w v"]:
    """Marks the highest values, as few as together weigh enough.

    Finds the threshold bit by bit from the highest: 32 sums in place of a sort, which costs an XLA
    CPU milliseconds per row of a real vocabulary and cannot take k at run time.

    Args:
      values: what is compared.
      weights: weight of each value.
      enough: least sum of the weights.

    Returns:
      True for the values at or above the threshold.
    """
    keys = sortable_bits(values)

    def lower(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.sum(jnp.where(keys >= candidate, weights, 0), axis=-1, keepdims=True)
        return jnp.where(weight >= enough, candidate, threshold)

    start = jnp.zeros_like(jnp.sum(keys, axis=-1, keepdims=True))  # placed as the sums are
    return keys >= jax.lax.fori_loop(0, 32, lower, start)


def sortable_bits(values: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Maps float32 values to unsigned integers of the same order; both zeros become one."""
    values = jnp.where(values == 0, 0, values.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def gather_vocabulary(logits: Float[Array, "b w v"]) -> Float[Array, "b w v"]:
    """Reshards logits so that the vocabulary of a row is on one device, as choosing needs."""
    return jax.reshard(logits, spec("batch length whole"))
