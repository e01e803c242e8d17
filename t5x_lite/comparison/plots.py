# SPDX-License-Identifier: Apache-2.0
"""Plots of a comparison."""

import zlib
from pathlib import Path

import numpy as np

from t5x_lite.comparison import claims, quality

COLORS = {
    "encoder_decoder": "#4c78a8",
    "causal_decoder": "#e45756",
    "prefix_decoder": "#f2a541",
    "shallow_decoder": "#54a24b",
}

OTHER_COLORS = ("#b279a2", "#9d755d", "#439894", "#d67195", "#79706e", "#b6992d", "#83bcb6")
COLUMNS = 4  # of panels; more would be too small to read on a page


def draw_plots(record: dict, folder: Path) -> list[Path]:
    """Writes the plots of the record, without empty ones."""
    paths = [
        draw_quality(record, folder / "quality.png"),
        draw_curves(record, folder / "learning.png"),
        draw_speed(record, folder / "speed.png"),
    ]
    return [path for path in paths if path is not None]


def twin_color(name: str) -> str:
    """Color of a twin in all plots."""
    if name in COLORS:
        return COLORS[name]
    return OTHER_COLORS[zlib.crc32(name.encode()) % len(OTHER_COLORS)]


def make_panels(panels: int):
    """Makes a figure with a number of panels; returns both."""
    from matplotlib.figure import Figure

    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    every = np.ravel(figure.subplots(rows, columns))
    for left in every[panels:]:
        left.remove()
    return figure, every[:panels]


def style_axes(axes, **labels) -> None:
    """Applies the common style and the labels to a panel."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(**labels)


def draw_quality(record: dict, path: Path) -> Path | None:
    """Each metric with its 95 % interval, twins side by side, every seed a dot."""
    names = record["metrics"]
    if not names:
        return None
    figure, panels = make_panels(len(names))
    for axes, metric in zip(panels, names, strict=True):
        for place, (twin, measured) in enumerate(record["quality"].items()):
            estimate = quality.estimate_metric(measured, metric)
            half = 0.0 if np.isnan(estimate.half) else estimate.half
            look = {"color": twin_color(twin), "capsize": 4, "fmt": "o"}
            axes.errorbar([place], [estimate.value], yerr=[half], **look)
            seeds = [each["metrics"][metric] for each in measured]
            axes.plot([place + 0.18] * len(seeds), seeds, ".", color=twin_color(twin), alpha=0.5)
        labels = [claims.twin_label(twin).replace(" ", "\n") for twin in record["quality"]]
        axes.set_xticks(range(len(labels)), labels)
        axes.margins(x=0.15)
        style_axes(axes, title=metric)
    figure.savefig(path, dpi=130)
    return path


def draw_curves(record: dict, path: Path) -> Path | None:
    """Held-out loss against the examples seen, every run a line."""
    # A run measured at its end alone is not a curve, and another library's checkpoint has none.
    curves = {
        twin: [curve for curve in runs if len(curve) > 1] for twin, runs in record["curves"].items()
    }
    if not any(curves.values()):
        return None
    figure, (axes,) = make_panels(1)
    for twin, runs in curves.items():
        for number, curve in enumerate(runs):
            shares = np.array([step for step, _ in curve], float) / max(curve[-1][0], 1)
            label = claims.twin_label(twin) if not number else None
            losses = [loss for _, loss in curve]
            axes.plot(100 * shares, losses, color=twin_color(twin), label=label, alpha=0.8)
    axes.legend(frameon=False)
    style_axes(
        axes, xlabel="percent of the training examples", ylabel="held-out loss (nats a token)"
    )
    figure.savefig(path, dpi=130)
    return path


def draw_speed(record: dict, path: Path) -> Path | None:
    """Time to the first token against inputs, and speed afterwards, for every number of rows."""
    speed = record["speed"]
    if not speed:
        return None
    rows = sorted({each["rows"] for each in speed})
    longest = max(each["outputs"] for each in speed)
    figure, panels = make_panels(2 * len(rows))
    for number, count in enumerate(rows):
        first, after = panels[2 * number : 2 * number + 2]
        for twin in record["quality"]:
            line = sorted(
                (each["inputs"], each["first_token_ms"], each["tokens_per_second"])
                for each in speed
                if (each["twin"], each["rows"], each["outputs"]) == (twin, count, longest)
            )
            inputs, milliseconds, rates = zip(*line, strict=True)
            rates = [np.nan if rate is None else rate for rate in rates]
            look = {"color": twin_color(twin), "label": claims.twin_label(twin), "marker": "o"}
            first.plot(inputs, milliseconds, **look)
            after.plot(inputs, rates, **look)
        style_axes(first, xlabel="ids in", ylabel="ms to the first token", title=f"{count} at once")
        style_axes(after, xlabel="ids in", ylabel="tokens/s afterwards", title=f"{count} at once")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path
