# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the same family of twins in several sizes, or with several kinds of positions."""

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.comparison import measurements, report, twins
from t5x_lite.comparison.example_losses import ExampleLosses, read_losses
from t5x_lite.config.resized import resize_model
from t5x_lite.config.training_run import ComparisonRun


class Variant(NamedTuple):
    """One comparison of a sweep.

    Attributes:
      name: name of its folder: "2x128", "alibi", "2x128-alibi".
      run: its config, a comparison that can be run alone.
      size: number of its size, from 0 on.
      positions: its positions; "" where they are not swept.
    """

    name: str
    run: ComparisonRun
    size: int
    positions: str


def list_variants(run: ComparisonRun) -> list[Variant]:
    """The comparisons of a sweep, smallest first; the run itself if nothing is swept.

    Raises:
      ValueError: a width does not divide evenly.
    """
    compare = run.compare
    if not compare.is_sweep:
        return [Variant("", run, 0, "")]
    sizes = list(zip(compare.depths, compare.widths, strict=True)) or [None]
    alone = dataclasses.replace(compare, depths=(), widths=(), positions=())
    variants = []
    for (number, size), positions in itertools.product(
        enumerate(sizes), compare.positions or ("",)
    ):
        model = run.model
        parts = []
        if size is not None:
            model = resize_model(model, *size)
            parts.append(f"{size[0]}x{size[1]}")
        if positions:
            model = with_positions(model, positions)
            parts.append(positions)
        name = "-".join(parts)
        here = dataclasses.replace(
            run, model=model, compare=alone, model_dir=str(Path(run.model_dir) / name)
        )
        variants.append(Variant(name, here, number, positions))
    return variants


def with_positions(cfg: config.Model, positions: str) -> config.Model:
    """The model with other positions in all of its stacks."""

    def changed(stack: config.Stack | None) -> config.Stack | None:
        return stack and dataclasses.replace(stack, positions=positions)

    return dataclasses.replace(cfg, encoder=changed(cfg.encoder), decoder=changed(cfg.decoder))


def run_variant(variant: Variant, modules: list[str]) -> dict:
    """Trains and measures one comparison, except for finished parts, and writes its report.

    Args:
      variant: the comparison.
      modules: Python modules that training imports first.

    Returns:
      Its record, with losses by example of each twin and seed as "losses".
    """
    run = variant.run
    family = twins.make_family(run)
    rows = [measurements.describe_twin(run, twin) for twin in family]
    record = {"matched": run.compare.matched, "twins": rows}
    record = measurements.measure_twins(run, family, record, modules)
    report.write_report(record, Path(run.model_dir))
    return record | {"variant": variant, "losses": collect_losses(run, family)}


def collect_losses(run: ComparisonRun, family: list[twins.Twin]) -> dict[str, list[ExampleLosses]]:
    """Losses by example of each twin and seed, as they were measured."""
    return {
        twin.name: [
            read_losses(measurements.losses_path(run, twin.name, seed))
            for seed in range(run.compare.seeds)
        ]
        for twin in family
    }
