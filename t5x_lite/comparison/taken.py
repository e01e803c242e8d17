# SPDX-License-Identifier: Apache-2.0
"""Twins that are trained already: finished runs, or checkpoints of other libraries."""

import dataclasses
from collections.abc import Sequence

from t5x_lite import config, data
from t5x_lite.adaptation import vocabulary_compatibility
from t5x_lite.checkpoints.kinds import CheckpointKind
from t5x_lite.checkpoints.opened_checkpoint import OpenedCheckpoint
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config.training_run import ComparisonRun
from t5x_lite.training.reporting.run_report import REPORT
from t5x_lite.utils import bounded_files
from t5x_lite.utils.paths import parse_path


def trained_model(run: ComparisonRun, name: str, paths: Sequence[str]) -> config.Model:
    """Config of the trained checkpoints of a twin.

    Args:
      run: config of the comparison.
      name: name of the twin.
      paths: a checkpoint per seed.

    Raises:
      ValueError: a checkpoint is missing, they differ, the twin has another layout, or their ids
        are not those of the run's data.
    """
    checkpoints = [open_checkpoint(path) for path in paths]
    models = [comparable_model(each, run.model.dtype) for each in checkpoints]
    for path, each in zip(paths, models, strict=True):
        if each != models[0]:
            raise ValueError(f"Compare.trained: {path} and {paths[0]} are not of the same model")
    kind = name.partition("@")[0]
    alone = kind in ("causal_decoder", "prefix_decoder", "tuned_prefix_decoder")
    layout = "decoder_only" if alone else "encoder_decoder"
    prefix = alone and kind != "causal_decoder"
    if models[0].layout != layout or models[0].prefix_lm != prefix:
        raise ValueError(f"Compare.trained: {paths[0]} is not a {name.replace('_', ' ')}")
    vocabularies = data.open_dataset(run.data, run.compare.split).vocabularies
    for path, opened in zip(paths, checkpoints, strict=True):
        assert opened.text is not None
        for there, here in zip(opened.text.vocabularies, vocabularies, strict=True):
            difference = vocabulary_compatibility.describe_difference(
                there, here
            ) or vocabulary_compatibility.describe_difference(here, there)
            if difference:
                raise ValueError(
                    f"Compare.trained: {path} has other ids than the data: {difference}"
                )
    return models[0]


def comparable_model(opened: OpenedCheckpoint, dtype: str) -> config.Model:
    """Config of a checkpoint; that of another library computes in `dtype`, as all twins do."""
    if opened.kind == CheckpointKind.OURS:
        return opened.model
    return dataclasses.replace(opened.model, dtype=dtype)


def read_report(path: str) -> dict:
    """The report at the end of training; {} if there is none.

    Raises:
      ValueError: the file is not a report.
    """
    written = parse_path(path) / REPORT
    return bounded_files.read_json_object(written) if written.is_file() else {}
