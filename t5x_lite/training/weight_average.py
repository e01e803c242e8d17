# SPDX-License-Identifier: Apache-2.0
"""The averaged copy of the weights that Train.average keeps: how a step moves it."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import config
from t5x_lite.checkpoints.checkpoint_io import CheckpointMetadata
from t5x_lite.checkpoints.train_state import Take, TrainState
from t5x_lite.config import gin_file
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import frozen_base
from t5x_lite.training.optimizer.param_groups import Selection
from t5x_lite.utils.not_none import not_none


def averaged_weights(run: TrainingRun) -> Take | None:
    """Function that takes out of the weights those with an averaged copy, which are those that
    train; None for a run without a copy."""
    if run.train.average is None:
        return None
    return Selection(run.train.param_groups, frozen_base.trained_axes(run)).take


def averaged_params(run: TrainingRun, state: TrainState) -> Any:
    """The weights that train with their averaged copy in their place."""
    selection = Selection(run.train.param_groups, frozen_base.trained_axes(run))
    return selection.put(state.params, state.average)


def move_average(
    cfg: config.Train, average: Any, trained: Any, state: TrainState, finite: jax.Array
) -> Any:
    """The averaged copy after a step.

    Args:
      cfg: length of the run and the kind of average.
      average: the copy before the step.
      trained: weights after the step, of the copy's structure.
      state: state after the step.
      finite: bool scalar, false for a step that changed no weight.
    """
    rule = not_none(cfg.average)
    if rule.kind == "uniform":
        since = state.step - rule.first_step(cfg.steps)
        # Computed from the step alone: there is no count to save.
        restarts, moves = since <= 0, since % rule.every == 0
        share = 1 / (jnp.maximum(since, 0) // rule.every + 1).astype(jnp.float32)
    else:
        updates = (state.step - state.skipped).astype(jnp.float32) - 1
        restarts, moves = jnp.bool_(False), finite
        # 1 - (1 + t) / (warmup + t), without a difference of nearly equal numbers.
        begin = max(rule.warmup - 1, 0) / jnp.maximum(rule.warmup + updates, 1)
        share = jnp.maximum(1 - rule.decay, begin)

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        nearer = jnp.where(moves, old + share * (new - old), old)
        return jnp.where(restarts, new, nearer)

    return jax.tree.map(move, average, trained)


def follow_weights(
    cfg: config.Train, selection: Selection, state: TrainState, finite: jax.Array
) -> TrainState:
    """Moves the averaged copy of the state, if the run keeps one.

    Args:
      cfg: length of the run and the kind of average.
      selection: the weights that train.
      state: state after a step, with the copy before it.
      finite: bool scalar, false for a step that changed no weight.
    """
    if cfg.average is None:
        return state
    trained = selection.take(state.params)
    return state._replace(average=move_average(cfg, state.average, trained, state, finite))


def check_window(run: TrainingRun, state: TrainState, note: CheckpointMetadata) -> TrainState:
    """The restored state, whose copy begins the uniform window that the run has now.

    Args:
      run: config of the run, whose Train.steps may be others than before.
      state: the restored state.
      note: metadata of its checkpoint.

    Raises:
      ValueError: as `check_first_step`.
    """
    if check_first_step(run, note):
        return state
    taken = not_none(averaged_weights(run))(state.params)
    return state._replace(average=jax.tree.map(jnp.copy, taken))


def check_first_step(run: TrainingRun, note: CheckpointMetadata) -> bool:
    """Returns true if a checkpoint's averaged copy is that of the run, false where it begins anew.

    Raises:
      ValueError: the window would have begun before the checkpoint.
    """
    rule = run.train.average
    if rule is None or rule.kind != "uniform":
        return True
    first = rule.first_step(run.train.steps)
    if note.step <= first:
        return False
    saved = None
    with contextlib.suppress(ValueError):  # of a version that this one cannot read
        saved = gin_file.from_text(note.config).train
    before = run.train.steps if saved is None else saved.steps
    config.require(
        before == run.train.steps or note.step >= run.train.steps,
        f"With Train.steps = {run.train.steps} the mean of Train.average begins with step {first}, "
        f"before the checkpoint of step {note.step}; with {before} it began with another. Bind "
        f"TRAIN_STEPS = {before}, or {note.step + (rule.last - 1) * rule.every} or more",
    )
    return True


def is_measured(run: TrainingRun) -> bool:
    """True if evaluations measure the averaged copy too."""
    return run.train.average is not None and run.train.average.evaluate


def metric_name(name: str) -> str:
    """Name of a metric of the averaged copy."""
    return f"average/{name}"
