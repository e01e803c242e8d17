# SPDX-License-Identifier: Apache-2.0
"""Losses of `Model.readout`: cross entropy, binary cross entropy, squared error."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.batch import Batch
from t5x_lite.config.readout import SMOOTHED_KINDS
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.model.readout import TargetLosses, target_losses
from t5x_lite.sharding import spec
from t5x_lite.training.losses import cross_entropy
from t5x_lite.training.step_values import LossSums, count_unpadded_tokens
from t5x_lite.utils.not_none import not_none


def readout_sums(
    transformer: Any, run: TrainingRun, params: Any, batch: Batch, key: jax.Array | None
) -> LossSums:
    """Sums over the targets of a batch; only `objective` has a gradient.

    Args:
      transformer: the `model.Transformer` that trains.
      run: config of the run.
      params: weights, those that train with their gradient slots.
      batch: one microbatch.
      key: dropout key; None for no dropout.
    """
    outputs = transformer.apply({"params": params}, batch, key)
    targets, places, weights = (
        jax.reshard(x, spec("batch whole"))
        for x in (batch.targets, batch.target_positions, batch.loss_weights.astype(jnp.float32))
    )
    cfg = not_none(run.model.readout)
    if cfg.kind in SMOOTHED_KINDS:
        smoothing, z_loss = run.train.label_smoothing, run.train.z_loss
        losses = TargetLosses(*cross_entropy.cross_entropy(outputs, targets, smoothing, z_loss))
    else:
        losses = target_losses(cfg, outputs, targets, places)
    correct = None if losses.correct is None else jnp.sum(losses.correct * weights)
    return LossSums(
        objective=jnp.sum(losses.objective * weights),
        loss=jnp.sum(losses.nll * weights),
        correct=correct,
        weights=jnp.sum(weights),
        tokens=count_unpadded_tokens(batch),
    )
