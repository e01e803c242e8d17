# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run to read: the newest, the best by a metric, or that of a step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import processes
from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.checkpoints.checkpoint_io import (
    CheckpointError,
    CheckpointMetadata,
    DamagedCheckpointError,
    RemovedCheckpointError,
)
from t5x_lite.checkpoints.step_folders import FOLDER, list_damaged, list_steps
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.utils.paths import parse_path


def best_step(metadata: dict[int, CheckpointMetadata]) -> int | None:
    """The step best by the metric that the newest metadata names; the later one of equals."""
    best = metadata[max(metadata)].best if metadata else None
    if best is None:
        return None
    metric, higher = best
    sign = 1 if higher else -1
    scored = [
        (sign * each.metrics[metric], step)
        for step, each in metadata.items()
        if np.isfinite(each.metrics.get(metric, np.nan))
    ]
    return max(scored)[1] if scored else None


def readable_metadata(folder: Path) -> dict[int, CheckpointMetadata]:
    """Metadata of all checkpoints in a folder by step, damaged ones left out."""
    metadata = {}
    for step in list_steps(folder.parent):
        try:
            metadata[step] = checkpoint_io.read_metadata(folder / str(step))
        except (DamagedCheckpointError, RemovedCheckpointError):
            # Reported when it is the one to restore; until then it is not a candidate for the best.
            continue
    return metadata


def select_steps(folder: str | Path, step: int | None = None, best: bool = False) -> list[int]:
    """Steps of a run folder to read from, in the order in which they are tried.

    Args:
      folder: MODEL_DIR of the run.
      step: the one step to read; None for the newest.
      best: the one that is best by the run's metric.

    Returns:
      The step that was chosen alone, or all from the newest on.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    steps = list_steps(folder)
    root = parse_path(folder).resolve() / FOLDER
    if not steps:
        raise CheckpointError(f"{root} holds no checkpoint: is {folder} the MODEL_DIR of a run?")
    if best:
        step = best_step(readable_metadata(root))
        if step is None:
            raise CheckpointError(f"{root}: no metric names the best (set Checkpoint.metric)")
    if step is None:
        return steps[::-1]
    if step not in steps:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; it has {steps}")
    return [step]


def check_newest(
    model_dir: str | Path, expected: TrainState, ignore_damaged: bool = False
) -> CheckpointMetadata | None:
    """Metadata of the checkpoint that a run goes on from, whose arrays are not read; None for a run
    that begins.

    Args:
      model_dir: MODEL_DIR of the run.
      expected: shapes of its state.
      ignore_damaged: as in `read_newest`.

    Raises:
      CheckpointError: all are damaged, as far as their metadata tell; one has the name of another
        step, or is of another model or optimizer.
    """
    folder = parse_path(model_dir).resolve() / FOLDER
    readable_metadata(folder)

    def check_step(step: int) -> CheckpointMetadata:
        metadata = checkpoint_io.read_metadata(folder / str(step))
        check_state_shapes(folder / str(step), metadata, expected)
        return metadata

    return read_newest(folder, check_step, ignore_damaged)[0]


def check_state_shapes(folder: Path, metadata: CheckpointMetadata, expected: TrainState) -> None:
    """Compares the shapes in a checkpoint with those that a run needs.

    Args:
      folder: the checkpoint, named by its step.
      metadata: of this checkpoint.
      expected: shapes of the run's state.

    Raises:
      CheckpointMismatchError: names what differs.
    """
    for item, shapes in checkpoint_io.state_items(expected).items():
        part = "model" if item == "params" else "optimizer"
        stored = checkpoint_io.stored_shapes(metadata, item)
        checkpoint_io.check_shapes(stored, shapes, f"{folder} is of another {part}")


def read_newest(
    folder: Path, read: Callable[[int], Any], ignore_damaged: bool
) -> tuple[Any, dict[int, DamagedCheckpointError]]:
    """Reads the newest checkpoint that is not damaged.

    Args:
      folder: folder of the checkpoints.
      read: reads the checkpoint of a step.
      ignore_damaged: true where it is no error that all are damaged.

    Returns:
      What was read, None without a checkpoint; the errors of newer ones by step.

    Raises:
      DamagedCheckpointError: all are damaged.
    """
    steps = json.loads(processes.broadcast_text(json.dumps(list_steps(folder.parent))))
    damaged: dict[int, DamagedCheckpointError] = {}
    restored = None
    for step in reversed(steps):
        try:
            restored = read(step)
            break
        except DamagedCheckpointError as error:
            damaged[step] = error
    names = json.loads(processes.broadcast_text(json.dumps(list_damaged(folder.parent))))
    if restored is None and (damaged or names) and not ignore_damaged:
        raise DamagedCheckpointError(describe_damage(folder, damaged, names))
    return restored, damaged


def describe_damage(
    folder: Path, damaged: dict[int, DamagedCheckpointError], names: list[str]
) -> str:
    """Message about a folder in which no checkpoint can be used.

    Args:
      folder: folder of the checkpoints.
      damaged: errors by step.
      names: of those that were set aside before.
    """
    cause = f" ({next(iter(damaged.values()))})" if damaged else ""
    all_names = ", ".join([*map(str, sorted(damaged)), *names])
    return (
        f"{folder} has only damaged checkpoints: {all_names}{cause}. Put a copy back, choose "
        "another MODEL_DIR, or begin at step 0 with --ignore_damaged, which keeps them"
    )
