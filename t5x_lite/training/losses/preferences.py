# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs of texts: DPO, IPO, ORPO and SimPO, of one margin between two scores.

b rows    t target position    k pairs of a row: texts 2k + 1 and 2k + 2 by segment id
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.sharding import spec

# A text's probability is at most 1 - 1e-7: its odds are finite.
LEAST_SURPRISE = 1e-7
# Means that a step reports, besides the loss.
MEANS = ("chosen_reward", "rejected_reward", "reward_margin", "preference_accuracy")
KL = "kl"


class PairScores(NamedTuple):
    """Log-probabilities of the texts of pairs, in nats: chosen ones at 0 of the last axis.

    Attributes:
      sums: [b k 2], of whole texts.
      lengths: [b k 2] float32, their tokens, at least 1.
      there: [b k], False for padding.
    """

    sums: Float[Array, "b k 2"]
    lengths: Float[Array, "b k 2"]
    there: Bool[Array, "b k"]


class PreferenceLosses(NamedTuple):
    """Loss of each pair, and what is reported of it.

    Attributes:
      loss: [b k], what is minimized.
      means: [b k] each by name, of which the mean over pairs is reported.
    """

    loss: Float[Array, "b k"]
    means: dict[str, Float[Array, "b k"]]


def mean_names(cfg: config.Preferences) -> tuple[str, ...]:
    """Names of PreferenceLosses.means."""
    return (*MEANS, KL) if cfg.has_reference else MEANS


def count_pairs(segments: Int[Array, "b t"]) -> Int[Array, ""]:
    """Number of pairs in rows of texts."""
    return jnp.sum((jnp.max(segments, axis=1) + 1) // 2)


def score_pairs(
    log_probabilities: Float[Array, "b t"],
    weights: Float[Array, "b t"],
    segments: Int[Array, "b t"],
) -> PairScores:
    """Sums the log-probabilities of tokens by text.

    Args:
      log_probabilities: of each target token.
      weights: 1 for tokens of the texts, 0 for those of their inputs and padding.
      segments: number of the text in its row, from 1; 0 is padding.
    """
    sums = by_pair(sum_by_segment(log_probabilities * weights, segments))
    lengths = by_pair(sum_by_segment(weights, segments))
    pairs = (jnp.max(segments, axis=1) + 1) // 2
    there = jnp.arange(sums.shape[1]) < pairs[:, None]
    return PairScores(sums, jnp.maximum(lengths, 1), there)


def sum_by_segment(values: Float[Array, "b t"], segments: Int[Array, "b t"]) -> Array:
    """Sum of the values of each segment [b t]: that of segment i + 1 at i."""
    size = segments.shape[1]

    def add(values, segments):
        sums = functools.partial(jax.ops.segment_sum, num_segments=size + 1)
        return jax.vmap(sums)(values, segments)[:, 1:]

    return jax.sharding.auto_axes(add, out_sharding=spec("batch whole"))(values, segments)


def by_pair(values: Float[Array, "b t"]) -> Float[Array, "b k 2"]:
    """Values of texts by pair; a last text without another is left out."""
    pairs = values.shape[1] // 2
    values = jax.reshard(values, spec("batch whole"))[:, : 2 * pairs]
    shape = (values.shape[0], pairs, 2)
    return jax.lax.reshape(values, shape, out_sharding=spec("batch whole whole"))


def preference_losses(
    cfg: config.Preferences, policy: PairScores, reference: Float[Array, "b k 2"] | None
) -> PreferenceLosses:
    """Computes the loss of each pair from its scores.

    Args:
      cfg: the loss.
      policy: scores under the model that trains.
      reference: sums under the reference model; None without one.
    """
    lengths = policy.lengths if cfg.per_token else 1.0
    score = policy.sums / lengths
    likelihood = score[..., 0]
    if reference is not None:
        score = score - reference / lengths
    if cfg.loss == "orpo":
        score = log_odds(score)
    margin = score[..., 0] - score[..., 1]
    means = {
        "chosen_reward": cfg.beta * score[..., 0],
        "rejected_reward": cfg.beta * score[..., 1],
        "reward_margin": cfg.beta * margin,
        "preference_accuracy": 100.0 * (margin > 0),
    }
    if reference is not None:
        # The mean log-ratio is KL(model, reference) where the model has written the texts.
        means[KL] = jnp.mean((policy.sums - reference) / policy.lengths, axis=-1)
    return PreferenceLosses(loss_of_margin(cfg, margin, likelihood), means)


def loss_of_margin(cfg: config.Preferences, margin, likelihood) -> Float[Array, "b k"]:
    """The loss of each pair.

    Args:
      cfg: the loss.
      margin: [b k] score of the chosen text less that of the rejected one.
      likelihood: [b k] log-probability per token of the chosen text, for orpo.
    """
    if cfg.loss == "ipo":
        return jnp.square(margin - 1 / (2 * cfg.beta))  # Azar et al., 2023, eq. 17
    if cfg.loss == "orpo":
        return -likelihood - cfg.beta * jax.nn.log_sigmoid(margin)  # Hong et al., 2024, eq. 6
    # Rafailov et al., 2023, eq. 7; Meng et al., 2024, eq. 6.
    return -jax.nn.log_sigmoid(cfg.beta * margin - cfg.gamma)


def log_odds(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(p / (1 - p)) of the probability exp(x)."""
    x = jnp.minimum(x, -LEAST_SURPRISE)
    near = x > -0.6931472
    # Each branch has a finite gradient where the other one is taken.
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    rest = jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
    return x - rest
