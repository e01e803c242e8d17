# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint for a run with Model.readout: without what writes text, and without a
decoder where the run has none."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.checkpoint_io import CheckpointMismatchError
from t5x_lite.checkpoints.tensors import MappedTensors
from t5x_lite.checkpoints.weights import HEADS

# Parts of params that write text.
OUTPUTS = ("head", "logits_bias", HEADS)


def trunk_of(theirs: config.Model, ours: config.Model, path: Path) -> config.Model:
    """The part of a run's model that a checkpoint has weights for.

    Args:
      theirs: model of the checkpoint.
      ours: model of the run.
      path: of the checkpoint.

    Raises:
      CheckpointMismatchError: the checkpoint has another readout.
    """
    trunk = dataclasses.replace(ours, draft_heads=None)
    if ours.readout is None or theirs.readout is not None:
        check_readout(theirs.readout, ours.readout, path)
        return trunk
    return dataclasses.replace(trunk, readout=None, tied=True, logits_bias=False)


def check_readout(theirs: config.Readout | None, ours: config.Readout | None, path: Path) -> None:
    """Raises CheckpointMismatchError where a run cannot go on with the readout of a checkpoint.

    Args:
      theirs: readout of the checkpoint.
      ours: readout of the run.
      path: of the checkpoint.
    """
    if theirs is None:
        return
    if ours is None:
        raise CheckpointMismatchError(
            f"{path} has a readout ({describe_readout(theirs)}), and the run writes text: bind "
            "Model.readout as it has it, or begin with the model that it was fine-tuned from"
        )
    if (theirs.kind, theirs.labels) != (ours.kind, ours.labels):
        raise CheckpointMismatchError(
            f"{path} has a readout of {describe_readout(theirs)}, and the run one of "
            f"{describe_readout(ours)}. Bind Readout.labels as the checkpoint has them, or begin "
            "with the model that it was fine-tuned from, whose readout is then new"
        )


def describe_readout(readout: config.Readout) -> str:
    """Kind and labels of a readout, in words."""
    if not readout.labels:
        return f"kind {readout.kind}"
    shown = ", ".join(readout.labels[:5]) + (", ..." if len(readout.labels) > 5 else "")
    return f"kind {readout.kind} with {len(readout.labels)} labels ({shown})"


def without_outputs(stored: Mapping[str, Any], cfg: config.Model) -> dict[str, Any]:
    """Arrays or shapes of a checkpoint that a model with a readout may have; for any other model
    all of them.

    Args:
      stored: arrays by part, or shapes by dotted or slashed name.
      cfg: config of the run's model.
    """
    if cfg.readout is None:
        return dict(stored)
    left_out = [*OUTPUTS, *(["decoder"] if cfg.decoder is None else [])]
    return {
        name: value for name, value in stored.items() if re.split("[./]", name)[0] not in left_out
    }


def drop_parts(mapped: MappedTensors) -> MappedTensors:
    """Another library's tensors without those of parts that the model does not have, of which a
    decoder and what writes text may be left out."""
    cfg = mapped.model
    left_out = {"decoder"} if cfg.decoder is None else set()
    left_out |= {"head"} if cfg.tied else set()
    left_out |= set() if cfg.logits_bias else {"logits_bias"}
    dropped = [entry for entry in mapped.entries if entry.ours.split("/")[0] in left_out]
    names = [entry.theirs.replace("{layer}", "*") for entry in dropped]
    kept = [entry for entry in mapped.entries if entry not in dropped]
    return mapped._replace(entries=kept, ignored=(*mapped.ignored, *names))
