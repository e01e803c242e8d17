# SPDX-License-Identifier: Apache-2.0
"""LayerSkip at one step: how often layers are skipped, and the loss of exits between them.

b batch    t target position    d width    l layers    e exits that count at this step
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.sharding import spec
from t5x_lite.training.head_losses import Reader


class Shares(NamedTuple):
    """What the objective is made of: `own` of the last layer's loss, `shares` of the losses after
    the layers of these numbers (0, 1, ...); they sum to 1.
    """

    own: Float[Array, ""]
    shares: Float[Array, " e"]
    layers: Int[Array, " e"]


class Early(NamedTuple):
    """The states after every layer, of which some count."""

    states: Float[Array, "l b t d"]
    shares: Shares


def rates(train: config.Train, layers: int, step: Int[Array, ""]) -> Float[Array, " l"]:
    """How often a row skips each layer at this step."""
    chances = np.array(train.layer_skip.chances(layers), np.float32)
    if not train.layer_skip.rising:
        return jnp.asarray(chances)
    return chances * (2 ** jnp.minimum(step / train.steps, 1) - 1)


def shares(cfg: config.LayerSkip, layers: int, step: Int[Array, ""]) -> Shares:
    """Which layers exit at this step, and what they weigh beside the last one.

    Every rotation-th of them from step modulo rotation on; where that is beyond the last, the
    share is 0.
    """
    *early, own = cfg.factors(layers)
    count = -(-len(early) // cfg.rotation)
    table = np.zeros(cfg.rotation * count, np.float32)
    table[: len(early)] = early
    chosen = step % cfg.rotation + cfg.rotation * jnp.arange(count)
    factors = jnp.asarray(table)[chosen]
    total = own + jnp.sum(factors)
    return Shares(own / total, factors / total, jnp.minimum(chosen, layers - 2))


def objective(
    apply: Callable, read: Reader, early: Early, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The share of the last layer's loss, and what exits add to the objective, summed over targets.

    apply is transformer.apply with its weights. In a scan: the logits of one exit at a time.
    """
    own, shares, layers = early.shares
    chosen = early.states.at[layers].get(out_sharding=spec("whole batch length width"))
    weights = batch.loss_weights.astype(jnp.float32)

    def add(total, exit):
        state, share = exit
        told = read(apply(state, method="finish"), batch.targets)
        return total + share * jnp.sum(told.objective * weights), None

    return own, jax.lax.scan(add, jnp.zeros(()), (chosen, shares))[0]
