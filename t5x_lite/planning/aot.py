# SPDX-License-Identifier: Apache-2.0
"""The training step compiled ahead of time, for devices that need not be there."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import sharding
from t5x_lite.batch import Batch, MaskedBlocks, PairReference, SampleData
from t5x_lite.checkpoints import train_state
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import (
    flops,
    frozen_base,
    optimizer,
    reference,
    schedules,
    step,
    weight_average,
)


def abstract_batch(run: TrainingRun) -> Batch:
    """Shapes of a batch, placed on the mesh in force."""
    rows, lengths = flops.batch_rows(run), run.data.lengths
    inputs, targets = flops.row_lengths(run.model.batch_layout, lengths)

    def array(length: int, dtype) -> jax.ShapeDtypeStruct:
        placement = sharding.named_sharding("batch length")
        return jax.ShapeDtypeStruct((rows, length), dtype, sharding=placement)

    ids, weights = array(targets, jnp.int32), array(targets, jnp.float32)
    known = reference_data(run, weights)
    canvas = None
    if run.model.canvas is not None and run.model.canvas.block > 1:
        canvas = MaskedBlocks(ids, ids, weights)
    if run.model.batch_layout == "decoder_only":
        return Batch(
            ids, ids, ids, weights, prefix=array(targets, bool), teacher_data=known, canvas=canvas
        )
    read = array(inputs, jnp.int32)
    return Batch(ids, ids, ids, weights, read, read, read, teacher_data=known, canvas=canvas)


def reference_data(run: TrainingRun, scores: Any) -> PairReference | SampleData | None:
    """Shapes of what is computed of the texts before a step; None where nothing is.

    Args:
      run: config of the run.
      scores: shape of a number for each target.
    """
    if run.grpo is not None:
        return SampleData(scores, scores, scores if run.grpo.has_reference else None)
    return None if getattr(run.data.task, "reference", None) is None else PairReference(scores)


def reference_shapes(run: TrainingRun) -> Any:
    """Shapes of a reference model's weights; None without one of its own."""
    compared = reference.find_reference(run)
    return None if compared is None else compared.shapes()


def abstract_state(run: TrainingRun) -> train_state.TrainState:
    """Shapes of the training state, placed on the mesh in force."""
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = frozen_base.trained_axes(run)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    averaged = weight_average.averaged_weights(run)
    return train_state.state_shapes(frozen_base.trained_shapes(run), update, averaged)


def trace_step(run: TrainingRun, devices: list) -> Any:
    """Traces the training step of a run for devices; nothing is computed.

    Sets the mesh over them. `.lower().compile()` of the result gives the executable.
    """
    sharding.use_mesh(run.mesh, devices)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = frozen_base.trained_axes(run)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    averaged = weight_average.averaged_weights(run)
    shapes = train_state.state_shapes(frozen_base.trained_shapes(run), update, averaged)
    traced = step.make_step(run, update, schedule, axes)
    frozen = (reference_shapes(run), frozen_base.base_shapes(run))
    return traced.trace(shapes, abstract_batch(run), *frozen)
