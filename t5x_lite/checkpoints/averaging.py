# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights of several checkpoints, one layer in memory at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.checkpoints import adapters, checkpoint_io, run_folder
from t5x_lite.checkpoints.digests import row_blocks
from t5x_lite.checkpoints.kinds import CheckpointKind
from t5x_lite.checkpoints.opened_checkpoint import OpenedCheckpoint
from t5x_lite.checkpoints.weights import Weights, is_finite
from t5x_lite.config.training_run import require_lora
from t5x_lite.tokenizers.errors import SourceError


class AveragedPart(NamedTuple):
    """One of the checkpoints of an average.

    Attributes:
      source: path or name of the checkpoint.
      step: its training step.
      weights: its weights; of a checkpoint of adapters, these alone.
      factor: its factor in the weighted mean, positive; the sum of all need not be 1.
    """

    source: str
    step: int
    weights: Weights
    factor: float

    @property
    def name(self) -> str:
        """The checkpoint as messages name it."""
        return f"{self.source}, step {self.step}" if self.step else self.source


class AveragedWeights:
    """The weighted mean of the weights of checkpoints, as `Weights`.

    Sums are in float64 and rounded once, so that the mean of equal checkpoints has their bits.

    Attributes:
      parts: the checkpoints, of equal shapes.
      dtype: of the mean; None for the widest that a weight has in the parts.
    """

    def __init__(self, parts: Sequence[AveragedPart], dtype: np.dtype | None = None):
        self.parts = parts
        first = parts[0]
        self.leaves = first.weights.leaves
        for part in parts[1:]:
            checkpoint_io.check_shapes(
                {path: leaf.shape for path, leaf in part.weights.leaves.items()},
                self.leaves,
                f"{part.name} (checkpoint) and {first.name} (run) have weights of different shapes",
            )
        self.names = {
            path: (leaf.shape, dtype or np.result_type(*[p.weights.names[path][1] for p in parts]))
            for path, leaf in self.leaves.items()
        }

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """The mean of a weight, or of one layer of it.

        Raises:
          SourceError: it has values that are NaN or infinite.
        """
        shape = self.names[path][0] if layer is None else self.names[path][0][1:]
        summed = np.zeros(shape, np.float64)
        for part in self.parts:
            values = part.weights.read(path, layer)
            if not is_finite(values):
                raise SourceError(f"{part.name}: {path} has values that are NaN or infinite")
            # By blocks: of the sum and of one checkpoint there is all in memory, and no more.
            blocks = map(row_blocks, map(np.atleast_1d, (summed, values)))
            for total, block in zip(*blocks, strict=True):
                total += part.factor * block.astype(np.float64)
            del values
        summed /= sum(part.factor for part in self.parts)
        return summed.astype(self.names[path][1])


def select_weights(opened: OpenedCheckpoint, averaged: bool = False) -> Weights:
    """The weights of a checkpoint to average: the adapters alone of one that has some.

    Args:
      opened: the checkpoint.
      averaged: take the averaged copy that its run has kept.

    Raises:
      ValueError: it has no such copy, or is damaged.
    """
    if not averaged:
        return opened.weights() if opened.adapters is None else opened.adapters.arrays
    if opened.kind != CheckpointKind.OURS:
        raise SourceError(f"{opened.path} is not a run folder: it has no averaged copy")
    opened.fetch_arrays()
    leaves = None
    if opened.adapters is not None:
        leaves = adapters.adapter_leaves(opened.model, require_lora(opened.run))
    return run_folder.SavedWeights(opened.path, opened.step, leaves, averaged=True)


def check_same_model(one: OpenedCheckpoint, other: OpenedCheckpoint) -> None:
    """Raises SourceError where weights of two checkpoints mean different things."""
    changes = run_folder.list_changes(other.model, one.model)
    if not changes and one.run.lora != other.run.lora:
        changes = f"Run.lora = {one.run.lora!r}, saved as {other.run.lora!r}"
    if changes:
        raise SourceError(f"{one.path} and {other.path} are of different models: {changes}")
    if one.adapters is not None and other.adapters is not None:
        owner = f"{other.path} (compared with {one.path})"
        adapters.check_digests(other.adapters.digests, one.adapters.digests, owner)


def describe_average(kind: str, parts: Sequence[AveragedPart], copies: bool) -> dict[str, Any]:
    """Provenance of an average, JSON-ready.

    Args:
      kind: how the factors were chosen: "uniform", "weighted", "exponential" or "copy".
      parts: the checkpoints.
      copies: the averaged copies that their runs have kept were taken, not their weights.
    """
    total = sum(part.factor for part in parts)
    return {
        "kind": kind,
        "averaged_copies": copies,
        "checkpoints": [
            {"source": part.source, "step": part.step, "share": part.factor / total}
            for part in parts
        ],
    }
