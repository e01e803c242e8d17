# SPDX-License-Identifier: Apache-2.0
"""Twins that are not trained here: finished runs, or checkpoints of other makes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from t5x_lite import config, data
from t5x_lite.adaptation import agreement
from t5x_lite.conversion import checkpoint as foreign
from t5x_lite.training import restore
from t5x_lite.training.loop import REPORT


def model_of(run: config.Run, name: str, paths: Sequence[str]) -> config.Model:
    """The one model of which the checkpoints at paths are, a seed each, for the twin of that name.

    Raises:
      ValueError: there is no checkpoint, they differ, the twin's layout is another, or their ids
        are not those of the run's data.
    """
    models = [opened(path, run.model.activations) for path in paths]
    for path, each in zip(paths, models, strict=True):
        if each != models[0]:
            raise ValueError(f"Compare.trained: {path} and {paths[0]} are not of the same model")
    layout = "pair" if name in ("encoder_decoder", "shallow_decoder") else "joined"
    prefix = {"causal_decoder": False, "prefix_decoder": True}.get(name, models[0].prefix_lm)
    if models[0].layout != layout or models[0].prefix_lm != prefix:
        raise ValueError(f"Compare.trained: {paths[0]} is no {name.replace('_', ' ')}")
    vocabularies = data.open_dataset(run.data, run.compare.split).vocabularies
    for path in paths:
        for there, here in zip(foreign.vocabularies(path), vocabularies, strict=True):
            told = agreement.difference(there, here) or agreement.difference(here, there)
            if told:
                raise ValueError(f"Compare.trained: {path} has other ids than the data: {told}")
    return models[0]


def opened(path: str, activations: str) -> config.Model:
    """The model of a checkpoint; one of another make, which does not say in what it is computed,
    is so in `activations`, as the twins beside it are."""
    if not foreign.is_foreign(path):
        return restore.read_config(path).model
    return dataclasses.replace(foreign.open(path).model, activations=activations)


def report(path: str) -> dict:
    """What training ended with; {} where nothing says it."""
    written = Path(path) / REPORT
    return json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
