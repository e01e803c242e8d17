# SPDX-License-Identifier: Apache-2.0
"""Page of a sweep: losses by size and length, and scaling laws with bootstrap intervals."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.comparison import claims, plots, quality, report, scaling
from t5x_lite.comparison.example_losses import ExampleLosses
from t5x_lite.utils.atomic_files import write_atomically

AXES = {
    "parameters": "parameters",
    "training_flops": "training FLOPs an example",
    "inference_flops": "inference FLOPs an example",
}


class Curve(NamedTuple):
    """Losses of a twin over sizes.

    Attributes:
      twin: its name.
      positions: its positions, "" if they are not swept.
      costs: cost of each size by axis of AXES.
      losses: losses by example of each size and seed.
      resampled: [r n] losses of resamples, the measured ones first.
    """

    twin: str
    positions: str
    costs: dict[str, list[float]]
    losses: list[list[ExampleLosses]]
    resampled: np.ndarray

    @property
    def label(self) -> str:
        """Its name in prose."""
        name = claims.twin_label(self.twin)
        return f"{name}, {self.positions}" if self.positions else name

    def fit(self, axis: str) -> scaling.PowerLaw:
        """The law of its losses against a cost."""
        return scaling.fit_law(self.costs[axis], self.resampled)


def collect_curves(records: Sequence[dict]) -> list[Curve]:
    """Curves of the twins of a sweep, from the records of `sweep.run_variant`."""
    curves = []
    for positions in dict.fromkeys(each["variant"].positions for each in records):
        sizes = [each for each in records if each["variant"].positions == positions]
        for number, twin in enumerate(each["name"] for each in sizes[0]["twins"]):
            losses = [each["losses"][twin] for each in sizes]
            costs = {axis: [each["twins"][number][axis] for each in sizes] for axis in AXES}
            # The same draws for every twin, so that differences are of the same examples.
            draw = np.random.default_rng(0)
            resampled = scaling.resample_losses(losses, draw, scaling.RESAMPLES)
            curves.append(Curve(twin, positions, costs, losses, resampled))
    return curves


def write_sweep(records: Sequence[dict], lengths: Sequence[int], folder: Path) -> Path:
    """Writes sweep.json, its plots and sweep.html; returns the path of the page.

    Args:
      records: records of `sweep.run_variant`, smallest first.
      lengths: Compare.lengths.
      folder: MODEL_DIR of the sweep.
    """
    curves = collect_curves(records)
    fitted = len(curves[0].losses) >= scaling.LEAST_SIZES
    tables = [("Losses (± half of the 95 % interval)", losses_table(records))]
    pictures = []
    if fitted:
        tables.append(("Scaling laws, L = E + A / N^a", laws_table(curves)))
        tables.append(
            ("Loss at equal cost, by the laws, minus the first twin's", gaps_table(curves))
        )
    if len(curves[0].losses) > 1:
        pictures.append(draw_laws(curves, fitted, folder / "scaling.png"))
    if lengths:
        buckets = length_buckets(lengths)
        tables.append(("By length of targets", lengths_table(records, buckets)))
        pictures.append(draw_lengths(records, buckets, folder / "lengths.png"))
    content = {head: rows for head, rows in tables}
    write_atomically(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    first = records[0]
    page = report.Page(
        title=f"{first['task']}: {len(records)} comparisons",
        verdict=[] if fitted else [f"No law is fitted: that takes {scaling.LEAST_SIZES} sizes."],
        note=report.report_note(first),
        words=sweep_words(first, fitted),
        tables=tables,
        pictures=pictures,
    )
    return report.write_page(page, folder / "sweep.html")


def sweep_words(record: dict, fitted: bool) -> list[str]:
    """Sentences on the meaning of the intervals, and on what a sweep leaves alike."""
    words = ["Learning rate, steps and examples are the same in every size."]
    if record["seeds"] == 1:
        words.append("One seed: intervals cover other test examples, not other training runs.")
    if fitted:
        words.append(
            f"Intervals of laws are of {scaling.RESAMPLES} bootstrap resamples of seeds and test "
            "examples. They hold within the sizes that were trained; the law may bend beyond."
        )
    return words


def losses_table(records: Sequence[dict]) -> list[list[str]]:
    """Cost and loss of every twin in every comparison."""
    rows = [["", "twin", "loss, nats a token", "texts right, %", *AXES.values(), "off the match"]]
    for each in records:
        for twin in each["twins"]:
            losses = each["losses"][twin["name"]]
            estimates = [
                quality.estimate_statistic(ExampleLosses.loss, losses),
                quality.estimate_statistic(ExampleLosses.accuracy, losses),
            ]
            cells = [claims.format_estimate(one, ".4g") for one in estimates]
            cells += [f"{twin[axis]:.3g}" for axis in AXES]
            label = claims.twin_label(twin["name"])
            rows.append([each["variant"].name, label, *cells, f"{twin['off']:+.1%}"])
    return rows


def laws_table(curves: Sequence[Curve]) -> list[list[str]]:
    """Exponent and floor of every curve, against every cost."""
    rows = [["", "N", "a", "E", "greatest error"]]
    for curve in curves:
        for axis, name in AXES.items():
            law = curve.fit(axis)
            predicted = [law.losses_at(cost)[0] for cost in curve.costs[axis]]
            error = np.abs(np.array(predicted) / curve.resampled[0] - 1).max()
            intervals = [scaling.bootstrap_interval(x) for x in (law.exponent, law.floor)]
            rows.append([curve.label, name, *map(str, intervals), f"{error:.1%}"])
    return rows


def gaps_table(curves: Sequence[Curve]) -> list[list[str]]:
    """Differences of the laws from that of the first twin, in the middle of their common costs."""
    rows = [["", "N", "at", "difference, nats a token"]]
    for positions in dict.fromkeys(curve.positions for curve in curves):
        base, *others = [curve for curve in curves if curve.positions == positions]
        for curve in others:
            for axis, name in AXES.items():
                pair = base.costs[axis], curve.costs[axis]
                low, high = max(map(min, pair)), min(map(max, pair))
                if low > high:
                    continue
                middle = math.sqrt(low * high)
                gap = curve.fit(axis).losses_at(middle) - base.fit(axis).losses_at(middle)
                cells = [f"{middle:.3g}", str(scaling.bootstrap_interval(gap))]
                rows.append([curve.label, name, *cells])
    return rows


def length_buckets(lengths: Sequence[int]) -> list[tuple[float, float]]:
    """First and last length of each bucket of Compare.lengths; the last one has no end."""
    starts = [1, *(end + 1 for end in lengths)]
    return list(zip(starts, [*lengths, math.inf], strict=True))


def bucket_label(bucket: tuple[float, float]) -> str:
    """A bucket in words: "1 to 10", "over 20"."""
    least, most = bucket
    return f"over {least - 1:g}" if math.isinf(most) else f"{least:g} to {most:g}"


def bucket_estimates(
    losses: Sequence[ExampleLosses], bucket: tuple[float, float]
) -> list[quality.MetricEstimate]:
    """Loss and share of right texts in a bucket."""

    def loss(run: ExampleLosses) -> float:
        return run.between(*bucket).loss()

    def accuracy(run: ExampleLosses) -> float:
        return run.between(*bucket).accuracy()

    return [quality.estimate_statistic(each, losses) for each in (loss, accuracy)]


def lengths_table(
    records: Sequence[dict], buckets: Sequence[tuple[float, float]]
) -> list[list[str]]:
    """Loss and texts right of every twin by length."""
    rows = [["", "twin", "tokens", "loss, nats a token", "texts right, %"]]
    for each in records:
        for twin, losses in each["losses"].items():
            for bucket in buckets:
                if not len(losses[0].between(*bucket).nats):
                    continue
                estimates = bucket_estimates(losses, bucket)
                cells = [claims.format_estimate(one, ".3g") for one in estimates]
                label = claims.twin_label(twin)
                rows.append([each["variant"].name, label, bucket_label(bucket), *cells])
    return rows


def draw_laws(curves: Sequence[Curve], fitted: bool, path: Path) -> Path:
    """Losses against every cost, with the laws; every seed a dot.

    Args:
      curves: the curves.
      fitted: draws the laws and their 95 % intervals.
      path: of the picture.
    """
    figure, panels = plots.make_panels(len(AXES))
    for axes, (axis, name) in zip(panels, AXES.items(), strict=True):
        for curve in curves:
            color = plots.twin_color(curve.twin + curve.positions)
            draw_curve(axes, curve, axis, color, fitted)
        axes.set_xscale("log")
        plots.style_axes(axes, xlabel=name, ylabel="loss, nats a token")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def draw_curve(axes: Any, curve: Curve, axis: str, color: str, fitted: bool) -> None:
    """Draws one curve.

    Args:
      axes: the panel.
      curve: the curve.
      axis: its cost, of AXES.
      color: its color.
      fitted: draws the law and its 95 % interval.
    """
    costs = curve.costs[axis]
    for cost, runs in zip(costs, curve.losses, strict=True):
        axes.plot([cost] * len(runs), [run.loss() for run in runs], ".", color=color, alpha=0.6)
    if not fitted:
        axes.plot(costs, curve.resampled[0], color=color, label=curve.label)
        return
    law = curve.fit(axis)
    grid = np.geomspace(min(costs), max(costs), 50)
    lines = np.array([law.losses_at(cost) for cost in grid])
    low, high = np.percentile(lines[:, 1:], [2.5, 97.5], axis=1)
    axes.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(grid, lines[:, 0], color=color, label=curve.label)


def draw_lengths(
    records: Sequence[dict], buckets: Sequence[tuple[float, float]], path: Path
) -> Path:
    """Share of right texts by length, a panel for each twin and a line for each comparison.

    Args:
      records: records of the comparisons.
      buckets: first and last length of each bucket.
      path: of the picture.
    """
    names = list(records[0]["losses"])
    figure, panels = plots.make_panels(len(names))
    for axes, twin in zip(panels, names, strict=True):
        for each in records:
            estimates = [bucket_estimates(each["losses"][twin], bucket)[1] for bucket in buckets]
            halves = [0.0 if np.isnan(one.half) else one.half for one in estimates]
            label = each["variant"].name or claims.twin_label(twin)
            values = [one.value for one in estimates]
            axes.errorbar(range(len(buckets)), values, yerr=halves, capsize=3, label=label)
        axes.set_xticks(range(len(buckets)), [bucket_label(bucket) for bucket in buckets])
        plots.style_axes(axes, title=claims.twin_label(twin), ylabel="texts right, %")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path
