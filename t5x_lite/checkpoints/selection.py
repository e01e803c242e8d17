# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run to read: the newest, the best by a metric, or that of a step."""

from pathlib import Path

import numpy as np

from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.checkpoints.checkpoint_io import (
    CheckpointError,
    CheckpointMetadata,
    DamagedCheckpointError,
    RemovedCheckpointError,
)
from t5x_lite.checkpoints.step_folders import FOLDER, list_steps
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
