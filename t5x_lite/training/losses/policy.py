# SPDX-License-Identifier: Apache-2.0
"""Clipped policy gradients of groups of samples (GRPO: Shao et al., 2024, eq. 3).

b rows, a sample in each    t target position    g groups    n samples of a group
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t5x_lite import config
from t5x_lite.batch import SampleData

# Added to the standard deviation of a group's rewards.
EPSILON = 1e-6
# Means over tokens that a step reports, besides the loss.
MEANS = ("kl", "ratio", "clipped")


class PolicyLosses(NamedTuple):
    """Loss of each token, and what is reported of it.

    Attributes:
      loss: [b t], what is minimized.
      means: [b t] each by name: the divergence from the reference, the ratio of probabilities
        after and before the updates, and whether it was clipped.
    """

    loss: Float[Array, "b t"]
    means: dict[str, Float[Array, "b t"]]


def group_advantages(rewards: np.ndarray, divide: bool) -> np.ndarray:
    """Advantages [g n], float64: rewards less their group's mean, over its standard deviation.

    Where all rewards of a group are equal, they are 0 exactly.

    Args:
      rewards: [g n] of the samples.
      divide: false leaves them undivided (Liu et al., 2025).
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if divide:
        centered = centered / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    equal = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(equal, 0.0, centered)


def policy_losses(
    cfg: config.Grpo,
    log_probabilities: Float[Array, "b t"],
    old: Float[Array, "b t"],
    samples: SampleData,
) -> PolicyLosses:
    """Computes the loss of each token.

    Args:
      cfg: clipping and weight of the divergence.
      log_probabilities: of the tokens under the model that trains.
      old: the same before the first update by these samples.
      samples: advantages, and log-probabilities under the reference.
    """
    ratio = jnp.exp(log_probabilities - old)
    above = cfg.clip if cfg.clip_above is None else cfg.clip_above
    clipped = jnp.clip(ratio, 1 - cfg.clip, 1 + above)
    gain = jnp.minimum(ratio * samples.advantages, clipped * samples.advantages)
    kl = jnp.zeros_like(ratio)
    if samples.reference is not None:
        # Schulman, 2020, k3: unbiased and never negative, for samples of the model.
        apart = samples.reference - log_probabilities
        kl = jnp.expm1(apart) - apart
    means = {"kl": kl, "ratio": ratio, "clipped": (gain < ratio * samples.advantages) * 1.0}
    return PolicyLosses(cfg.kl_weight * kl - gain, means)


def token_weights(
    cfg: config.Grpo, inside: Float[Array, "b t"], longest: int
) -> Float[Array, "b t"]:
    """Weights of tokens in the objective, before its division by `count_units`.

    Args:
      cfg: how tokens and samples are averaged.
      inside: 1 for tokens of the samples, 0 for others.
      longest: most tokens that a sample may have.
    """
    if cfg.average == "token":
        return inside
    if cfg.average == "constant":
        return inside / longest
    return inside / jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1)


def count_units(cfg: config.Grpo, inside: Float[Array, "b t"]) -> Float[Array, ""]:
    """Number of samples, or of their tokens, that the objective is the mean over."""
    if cfg.average == "token":
        return jnp.sum(inside)
    return jnp.sum((jnp.max(inside, axis=1) > 0).astype(jnp.float32))
