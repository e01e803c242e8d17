# SPDX-License-Identifier: Apache-2.0
"""Policies that decide which tokens of a block are kept after a pass over it.

b rows    w places of a block
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.config.canvas import CommitPolicy


def select_places(
    policy: CommitPolicy,
    log_probability: Float[Array, "b w"],
    noise: Float[Array, "b w"],
    is_open: Bool[Array, "b w"],
) -> Bool[Array, "b w"]:
    """Selects the places whose choices are kept: at least one where a row has any open place.

    Args:
      policy: the policy.
      log_probability: of the choice of each place.
      noise: a number of each place, which stays the same from pass to pass; the random order.
      is_open: True for places that can be selected.
    """
    scores = {"random": noise, "order": -jnp.arange(noise.shape[1]) + 0.0 * noise}
    rank = rank_places(scores.get(policy.kind, log_probability), is_open)
    selected = rank < policy.count
    if policy.kind in ("threshold", "neighbors"):
        selected = selected | (log_probability >= jnp.log(policy.least))
    if policy.kind == "neighbors":
        # Anchors and what stands near them (LocalLeap; Kong et al., 2025).
        anchors = is_open & (log_probability >= jnp.log(policy.least))
        place = jnp.arange(noise.shape[1])
        is_near = jnp.abs(place[:, None] - place[None, :]) <= policy.reach
        near = jnp.any(anchors[:, None, :] & is_near, axis=2)
        selected = selected | (near & (log_probability >= jnp.log(policy.near)))
    return selected & is_open


def rank_places(score: Float[Array, "b w"], is_open: Bool[Array, "b w"]) -> Int[Array, "b w"]:
    """Ranks open places by score, 0 for the highest; of equal ones the leftmost is first."""
    score = jnp.where(is_open, score, -jnp.inf)
    higher = score[:, None, :] > score[:, :, None]
    place = jnp.arange(score.shape[1])
    earlier = (score[:, None, :] == score[:, :, None]) & (place[None, :] < place[:, None])
    return jnp.sum(higher | earlier, axis=2)
