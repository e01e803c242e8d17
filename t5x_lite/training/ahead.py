# SPDX-License-Identifier: Apache-2.0
"""The training step compiled ahead of time, for devices that need not be there."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.training import costs, optimizer, schedules, state, step


def abstract_batch(run: config.Run) -> Batch:
    """The shapes of a batch, placed on the mesh in force."""
    rows, lengths = run.train.batch_size, run.data.lengths
    inputs, targets = costs.row_lengths(run.model.layout, lengths)
    array = lambda length, dtype: jax.ShapeDtypeStruct(
        (rows, length), dtype, sharding=sharding.named("batch length")
    )
    ids = [array(targets, jnp.int32)] * 3
    weights = array(targets, jnp.float32)
    if run.model.layout == "joined":
        return Batch(*ids, weights, prefix=array(targets, bool))
    return Batch(*ids, weights, *[array(inputs, jnp.int32)] * 3)


def abstract_state(run: config.Run) -> state.TrainState:
    """The shapes of the training state, placed on the mesh in force."""
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make(run.optimizer, schedule, model.axes(run.model), run.train.parts)
    return state.shapes(model.shapes(run.model), update)


def traced(run: config.Run, devices: list) -> Any:
    """The training step of run traced for devices, on a mesh of them that is set; nothing is
    computed. `.lower().compile()` gives the executable."""
    sharding.use_mesh(run.mesh, devices)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = model.axes(run.model)
    update = optimizer.make(run.optimizer, schedule, axes, run.train.parts)
    shapes = state.shapes(model.shapes(run.model), update)
    return step.make(run, update, schedule, axes).trace(shapes, abstract_batch(run))
