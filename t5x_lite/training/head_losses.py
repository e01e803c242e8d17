# SPDX-License-Identifier: Apache-2.0
"""The loss of heads that guess later tokens, from the hidden states that the model's own loss has.

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
from t5x_lite.kernels import TokenLosses

# Losses [b t] of targets [b t], read from hidden [b t d].
Reader = Callable[[Float[Array, "b t d"], Int[Array, "b t"]], TokenLosses]


class HeadSums(NamedTuple):
    """Sums over targets: what is minimised, how many were guessed right, and how many there are."""

    objective: jax.Array
    correct: jax.Array
    weights: jax.Array


class Guesser(NamedTuple):
    """A model's heads while they are trained: transformer.apply with its weights, how the losses of
    a hidden state are read, and the config of both.
    """

    apply: Callable
    read: Reader
    heads: config.Heads
    loss: config.HeadLoss


def sums(
    guesser: Guesser, hidden: Float[Array, "b t d"], batch: Batch, key: jax.Array | None
) -> HeadSums:
    """The share that heads have in the objective; without a key all of them are computed.

    Head i (from 1) is to guess from hidden[b, t], which target t is read from, target t + i of the
    same example. With a key one head is drawn by its factor, and stands for all (Stern et al.,
    2018, section 6).
    """
    own, *factors = guesser.loss.factors(guesser.heads.count)
    branches = [functools.partial(one, guesser, head) for head in range(len(factors))]
    if key is None:
        each = [branch(hidden, batch) for branch in branches]
        shares = [found.objective * f for found, f in zip(each, factors, strict=True)]
        added = jax.tree.map(lambda *parts: sum(parts), *each)
        return added._replace(objective=sum(shares))
    drawn = jax.random.categorical(key, jnp.log(jnp.array(factors)))
    found = jax.lax.switch(drawn, branches, hidden, batch)
    return found._replace(objective=found.objective * (1 - own))


def one(guesser: Guesser, head: int, hidden: Float[Array, "b t d"], batch: Batch) -> HeadSums:
    """The sums of one head (0, 1, ...)."""
    ahead = head + 1
    since = None
    if guesser.heads.sequential:
        since = jnp.stack([later(batch.targets, i) for i in range(ahead)], axis=2)
    told = guesser.apply(hidden, slice(head, ahead), since, method="guess")[:, :, 0]
    found = guesser.read(told, later(batch.targets, ahead))
    same = later(batch.target_segments, ahead) == batch.target_segments
    weights = jnp.where(same, later(batch.loss_weights, ahead), 0).astype(jnp.float32)
    total = lambda x: jnp.sum(x * weights)
    return HeadSums(total(found.objective), total(found.correct), jnp.sum(weights))


def later(x: Array, ahead: int) -> Array:
    """x [b t] as it is `ahead` places later in each row; 0 where the row has ended."""
    return jnp.pad(x[:, ahead:], ((0, 0), (0, min(ahead, x.shape[1]))))
