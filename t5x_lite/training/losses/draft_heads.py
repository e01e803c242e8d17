# SPDX-License-Identifier: Apache-2.0
"""Loss of draft heads, which predict later tokens from the hidden states of the model's own loss.

b batch    t target position    d width    v vocabulary    j tokens since the hidden state
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.kernels.api import TokenLosses
from t5x_lite.model import Transformer

# Losses [b t] of targets [b t], read from hidden [b t d].
Reader = Callable[[Float[Array, "b t d"], Int[Array, "b t"]], TokenLosses]


class HeadSums(NamedTuple):
    """Sums over the targets of draft heads.

    Attributes:
      objective: scalar, what is minimized.
      correct: scalar, targets that were predicted.
      weights: scalar, number of targets.
    """

    objective: jax.Array
    correct: jax.Array
    weights: jax.Array


class TrainedHeads(NamedTuple):
    """Draft heads of a model that trains.

    Attributes:
      apply: transformer.apply with its weights.
      read: losses of targets, read from hidden states.
      heads: config of the heads.
      loss: config of their loss.
    """

    apply: Callable
    read: Reader
    heads: config.DraftHeads
    loss: config.DraftHeadLoss


def head_sums(
    heads: TrainedHeads, hidden: Float[Array, "b t d"], batch: Batch, key: jax.Array | None
) -> HeadSums:
    """Computes the share of the objective that heads have.

    Head i (from 1) predicts from hidden[b, t], which target t is read from, target t + i of the
    same example. With a key one head is drawn by its factor, and stands for all (Stern et al.,
    2018, section 6).

    Args:
      heads: the draft heads.
      hidden: [b t d] hidden states.
      batch: one microbatch.
      key: PRNG key that draws a head; None to compute all of them.
    """
    main, *factors = heads.loss.factors(heads.heads.count)
    branches = [functools.partial(one_head_sums, heads, head) for head in range(len(factors))]
    if key is None:
        each = [branch(hidden, batch) for branch in branches]
        shares = [sums.objective * f for sums, f in zip(each, factors, strict=True)]
        added = jax.tree.map(lambda *parts: sum(parts), *each)
        return added._replace(objective=sum(shares))
    drawn = jax.random.categorical(key, jnp.log(jnp.array(factors)))
    sums = jax.lax.switch(drawn, branches, hidden, batch)
    return sums._replace(objective=sums.objective * (1 - main))


def one_head_sums(
    heads: TrainedHeads, head: int, hidden: Float[Array, "b t d"], batch: Batch
) -> HeadSums:
    """Computes the sums of one head.

    Args:
      heads: the draft heads.
      head: number of the head, from 0.
      hidden: [b t d] hidden states.
      batch: one microbatch.
    """
    ahead = head + 1
    since = None
    if heads.heads.sequential:
        since = jnp.stack([shift_left(batch.targets, i) for i in range(ahead)], axis=2)
    states = heads.apply(hidden, slice(head, ahead), since, method=Transformer.draft_hidden)
    losses = heads.read(states[:, :, 0], shift_left(batch.targets, ahead))
    same = shift_left(batch.target_segments, ahead) == batch.target_segments
    weights = jnp.where(same, shift_left(batch.loss_weights, ahead), 0).astype(jnp.float32)
    return HeadSums(
        objective=jnp.sum(losses.objective * weights),
        correct=jnp.sum(losses.correct * weights),
        weights=jnp.sum(weights),
    )


def shift_left(x: Array, ahead: int) -> Array:
    """Shifts rows of x [b t] by `ahead` positions to the left; zeros follow the end of a row."""
    return jnp.pad(x[:, ahead:], ((0, 0), (0, min(ahead, x.shape[1]))))
