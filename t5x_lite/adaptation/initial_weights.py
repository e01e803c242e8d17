# SPDX-License-Identifier: Apache-2.0
"""The first weights of a run that is adapted from other models."""

import warnings
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import mapping, report
from t5x_lite.adaptation.adapted_weights import AdaptedWeights
from t5x_lite.adaptation.mapping import AdaptationPlan
from t5x_lite.adaptation.report import Report
from t5x_lite.checkpoints import weights
from t5x_lite.checkpoints.opened_checkpoint import OpenedCheckpoint
from t5x_lite.checkpoints.opening import open_described
from t5x_lite.utils import hub_names


class MissingSource(ValueError):
    """Adaptation names a checkpoint that does not exist."""


class Sources(NamedTuple):
    """The checkpoints that Adaptation names; their weights are read later."""

    source: OpenedCheckpoint
    encoder_source: OpenedCheckpoint | None

    def weights(self) -> dict[str, weights.Weights]:
        """Readers of the weights, by field of Adaptation."""
        opened = {name: each for name, each in self._asdict().items() if each is not None}
        return {name: each.weights() for name, each in opened.items()}


def open_sources(adaptation: config.Adaptation) -> Sources:
    """Opens Adaptation.source and Adaptation.encoder_source.

    Raises:
      MissingSource: there is no such file or folder.
      ValueError: it is not a checkpoint; the message names the binding.
    """
    other = adaptation.encoder_source
    return Sources(
        open_source("source", adaptation.source),
        None if other is None else open_source("encoder_source", other),
    )


def open_source(field: str, path: str) -> OpenedCheckpoint:
    """Opens the checkpoint that a field of Adaptation names; errors name the field."""
    source = hub_names.parse_source(path)
    if not isinstance(source, hub_names.HubName) and not source.exists():
        raise MissingSource(f"Adaptation.{field}: there is no {path}")
    remedy = "convert it first (python -m t5x_lite.convert --help)"
    return open_described(f"Adaptation.{field}", path, remedy)


def plan_weights(run: config.Run, sources: Sources) -> AdaptationPlan:
    """Plans the origin of each weight of the run's model, with a warning per difference.

    Raises:
      ValueError: a tower cannot become the model's.
    """
    assert run.adaptation is not None
    other = sources.encoder_source
    plan = mapping.plan_adaptation(
        run.model, run.adaptation, sources.source.model, None if other is None else other.model
    )
    for message in plan.warnings:
        warnings.warn(message, stacklevel=3)
    return plan


def explain(run: config.Run) -> Report:
    """Reports what `initialize` would do, without reading a weight; raises the same errors."""
    assert run.adaptation is not None
    return report.make_report(plan_weights(run, open_sources(run.adaptation)), run.adaptation)


def initialize(run: config.Run) -> tuple[Any, Report]:
    """Params of run.model on the mesh in force, by Run.adaptation, and a report of their origins.

    Copied weights have the bits of the checkpoints (in float32), new ones are a function of
    Run.seed. One weight at a time is in the host's memory. Warns where the same weights compute
    something else than in their checkpoint.

    Raises:
      ValueError: a checkpoint cannot be read, or its towers cannot become the model's; the
        message has both values.
    """
    assert run.adaptation is not None
    sources = open_sources(run.adaptation)
    plan = plan_weights(run, sources)
    adapted = AdaptedWeights(plan, sources.weights(), run.adaptation.rows, run.seed)
    return weights.place_weights(adapted, run.model), report.make_report(plan, run.adaptation)
