# SPDX-License-Identifier: Apache-2.0
"""The first weights of a run that is adapted from other models."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import mapping, report
from t5x_lite.adaptation.adapted import Adapted
from t5x_lite.adaptation.mapping import Plan
from t5x_lite.adaptation.report import Report
from t5x_lite.conversion import origins, weights
from t5x_lite.conversion.origins import Origin


class MissingSource(ValueError):
    """Adaptation names a checkpoint that does not exist."""


class Sources(NamedTuple):
    """The checkpoints that Adaptation names; no weight of them is read yet."""

    source: Origin
    encoder_source: Origin | None

    def weights(self) -> dict[str, weights.Weights]:
        found = {name: origin for name, origin in self._asdict().items() if origin is not None}
        return {name: origin.weights(()) for name, origin in found.items()}


def open_sources(how: config.Adaptation) -> Sources:
    """What lies at Adaptation.source and Adaptation.encoder_source.

    Raises:
      ValueError: nothing that is read lies there; the binding is named.
    """
    other = how.encoder_source
    return Sources(
        open_source("source", how.source),
        None if other is None else open_source("encoder_source", other),
    )


def open_source(field: str, path: str) -> Origin:
    if not Path(path).expanduser().exists():
        raise MissingSource(f"Adaptation.{field}: there is no {path}")
    try:
        # Weights alone: a checkpoint without a tokenizer can be adapted too.
        origin = origins.open(path, origins.Asked(vocabulary="none"))
    except ValueError as error:
        raise ValueError(f"Adaptation.{field}: {error}") from error
    config.require(
        not origin.assumed,
        f"Adaptation.{field}: {path} does not say what model it is of: convert it first "
        "(python -m t5x_lite.convert --help)",
    )
    return origin


def planned(run: config.Run, sources: Sources) -> Plan:
    """Where each weight of the run's model comes from; ValueError where that cannot be."""
    other = sources.encoder_source
    made = mapping.plan(
        run.model, run.adaptation, sources.source.model, None if other is None else other.model
    )
    for told in made.warnings:
        warnings.warn(told, stacklevel=3)
    return made


def explain(run: config.Run) -> Report:
    """What `initialize` would do, without reading a weight; the same errors."""
    return report.of(planned(run, open_sources(run.adaptation)), run.adaptation)


def initialize(run: config.Run) -> tuple[Any, Report]:
    """The params of run.model on the mesh in force, as Run.adaptation says, and what they are.

    Copied weights have the bits of the checkpoints (in float32), new ones are a function of
    Run.seed. One weight at a time lies in the host's memory. Warns where the same weights will
    compute otherwise than in their checkpoint.

    Raises:
      ValueError: a checkpoint cannot be read, or its towers cannot become the model's; both values
        are named.
    """
    sources = open_sources(run.adaptation)
    plan = planned(run, sources)
    made = Adapted(plan, sources.weights(), run.adaptation.rows, run.seed)
    return weights.load(made, run.model), report.of(plan, run.adaptation)
