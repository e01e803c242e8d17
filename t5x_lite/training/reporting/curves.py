# SPDX-License-Identifier: Apache-2.0
"""Learning curve of a run, as a picture."""

import itertools
from pathlib import Path

import numpy as np

from t5x_lite import processes
from t5x_lite.training.reporting import metric_writers

PICTURE = "learning_curve.png"
TRAINED = "#4c78a8"
# Of held-out losses, in turn.
HELD_OUT = ("#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d")


def try_to_draw(model_dir: Path) -> str:
    """Draws the learning curve; returns its path, or why there is none: a run is complete without
    it."""
    try:
        return str(draw_learning_curve(model_dir))
    except Exception as error:  # of matplotlib or the disk
        return f"no learning curve ({processes.describe_error(error)})"


def draw_learning_curve(model_dir: Path) -> Path | None:
    """Draws loss and held-out metrics against step; returns None if nothing was recorded."""
    values = metric_writers.read_metrics(model_dir)
    if "train/loss" not in values:
        return None
    from matplotlib.figure import Figure

    held_out = {name: curve for name, curve in values.items() if not name.startswith("train/")}
    losses = {name: points for name, points in held_out.items() if name.endswith("/loss")}
    others = {
        name: points for name, points in held_out.items() if name.split("/")[-1] in SHOWN_METRICS
    }
    # A single evaluation is a number, which report.json has; two make a curve.
    others = others if any(len(points) > 1 for points in others.values()) else {}
    panels = 1 + bool(others)
    figure = Figure(figsize=(6.4 * panels, 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels))
    draw_losses(axes[0], values["train/loss"], losses)
    if others:
        draw_metrics(axes[1], others)
    figure.suptitle(model_dir.resolve().name)
    with (model_dir / PICTURE).open("wb") as picture:
        figure.savefig(picture, dpi=130, format="png")
    return model_dir / PICTURE


SHOWN_METRICS = (
    "accuracy",
    "exact_match",
    "per",
    "wer",
    "edit_distance",
    "bleu",
    "chrf",
    "rougeLsum",
)


def draw_losses(axes, trained: dict[int, float], held_out: dict[str, dict[int, float]]) -> None:
    """Draws the losses.

    Args:
      axes: matplotlib axes.
      trained: training loss by step.
      held_out: held-out losses by name and step.
    """
    steps, losses = np.array(list(trained)), np.array(list(trained.values()))
    axes.plot(steps, losses, color=TRAINED, alpha=0.3, linewidth=1)
    axes.plot(steps, running_mean(losses), color=TRAINED, linewidth=1.8, label="training")
    for (name, points), color in zip(held_out.items(), itertools.cycle(HELD_OUT), strict=False):
        # A single point has no line: it is drawn large enough to be seen.
        style = dict(marker="o", markersize=4 if len(points) > 1 else 8, color=color, zorder=3)
        axes.plot(list(points), list(points.values()), label=name.removesuffix("/loss"), **style)
    finite = losses[np.isfinite(losses)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 5:
        use_log_scale(axes)
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    add_grid_and_legend(axes)


def use_log_scale(axes) -> None:
    """Makes the vertical axis logarithmic, its ticks numbers: 4, 2, 1, 0.5, 0.3."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def draw_metrics(axes, metrics: dict[str, dict[int, float]]) -> None:
    """Draws held-out metrics, given by name and step."""
    for name, points in sorted(metrics.items()):
        axes.plot(list(points), list(points.values()), "o-", markersize=4, label=name)
    axes.set(xlabel="step", ylabel="held-out metric")
    add_grid_and_legend(axes)


def add_grid_and_legend(axes) -> None:
    """Adds grid and legend."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve, weighted so that its beginning is not biased."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    out, weight, total = [], 0.0, 0.0
    for value in values:
        if np.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        out.append(total / weight if weight else np.nan)
    return np.array(out)
