# SPDX-License-Identifier: Apache-2.0
"""LayerSkip at one step: skip rates of layers, and the loss of exits between them.

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
from t5x_lite.model import Transformer
from t5x_lite.sharding import spec
from t5x_lite.training.losses.draft_heads import Reader


class ExitWeights(NamedTuple):
    """Weights of losses in the objective; they sum to 1.

    Attributes:
      last: scalar, weight of the last layer's loss.
      shares: [e] weights of the losses after `layers`.
      layers: [e] numbers of the layers that exit, from 0.
    """

    last: Float[Array, ""]
    shares: Float[Array, " e"]
    layers: Int[Array, " e"]


class EarlyExits(NamedTuple):
    """States after every layer, of which some count.

    Attributes:
      states: [l b t d] hidden states.
      weights: the layers that count at this step.
    """

    states: Float[Array, "l b t d"]
    weights: ExitWeights


def skip_rates(train: config.Train, layers: int, step: Int[Array, ""]) -> Float[Array, " l"]:
    """Probability that a row skips a layer at this step, for each layer.

    Args:
      train: config with `layer_skip`.
      layers: number of decoder layers.
      step: steps done so far.
    """
    assert train.layer_skip is not None
    chances = jnp.asarray(np.array(train.layer_skip.chances(layers), np.float32))
    if not train.layer_skip.rising:
        return chances
    return chances * (2 ** jnp.minimum(step / train.steps, 1) - 1)


def exit_weights(cfg: config.LayerSkip, layers: int, step: Int[Array, ""]) -> ExitWeights:
    """The layers that exit at this step, and their weights beside the last layer's.

    Every rotation-th layer exits, from layer (step modulo rotation) on; where that is beyond the
    last exit, the share is 0.

    Args:
      cfg: config of LayerSkip.
      layers: number of decoder layers.
      step: steps done so far.
    """
    *early, last = cfg.factors(layers)
    count = -(-len(early) // cfg.rotation)
    table = np.zeros(cfg.rotation * count, np.float32)
    table[: len(early)] = early
    chosen = step % cfg.rotation + cfg.rotation * jnp.arange(count)
    factors = jnp.asarray(table)[chosen]
    total = last + jnp.sum(factors)
    return ExitWeights(last / total, factors / total, jnp.minimum(chosen, layers - 2))


def exit_objective(
    apply: Callable, read: Reader, early: EarlyExits, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the loss of early exits, in a scan: the logits of one exit at a time.

    Args:
      apply: transformer.apply with its weights.
      read: losses of targets, read from hidden states.
      early: states after every layer, and the exits that count.
      batch: one microbatch.

    Returns:
      the weight of the last layer's loss, and the sum over targets that exits add to the objective.
    """
    exits = early.weights
    chosen = early.states.at[exits.layers].get(out_sharding=spec("whole batch length width"))
    weights = batch.loss_weights.astype(jnp.float32)

    def add(total, exit):
        state, share = exit
        losses = read(apply(state, method=Transformer.final_norm), batch.targets)
        return total + share * jnp.sum(losses.objective * weights), None

    return exits.last, jax.lax.scan(add, jnp.zeros(()), (chosen, exits.shares))[0]
