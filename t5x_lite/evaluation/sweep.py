# SPDX-License-Identifier: Apache-2.0
"""Sweep over settings of decoding: quality and speed of each, and the sensitivity to each field."""

import dataclasses
import io
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.config.training_run import DataRun
from t5x_lite.evaluation import choosing, metrics
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.not_none import not_none

# Colors that are distinguished without color vision (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
MARKERS = "os^DvPX"
LEGEND_ROWS = 45


class SweepPoint(NamedTuple):
    """One combination of settings, measured.

    Attributes:
      settings: fields of Decode and their values.
      values: metrics by name; empty if the combination contradicts itself.
      tokens_per_second: tokens written, those of all texts of an input, once all is compiled.
      reason: the contradiction.
    """

    settings: dict[str, Any]
    values: dict[str, float]
    tokens_per_second: float = 0.0
    reason: str = ""


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Reads values to try, such as "temperature=0,0.5,1", by field of Decode.

    Raises:
      ValueError: a text is no such list, or names no field.
    """
    known = [field.name for field in dataclasses.fields(config.Decode)]
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"Sweep {text!r} is no NAME=A,B,... such as temperature=0,0.5,1")
        if name not in known:
            raise ValueError(f"Sweep: Decode has no {name!r}: {suggest(name, known)}")
        if name in grid:
            raise ValueError(f"The sweep names {name} twice: put its values in one list")
        grid[name] = [parse_value(each) for each in values.split(",")]
    return grid


def parse_value(text: str) -> Any:
    """Reads a number, none, or else a text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None if text.lower() == "none" else text


def make_decode(decode: config.Decode, settings: dict[str, Any]) -> config.Decode | str:
    """Returns the config with other settings, or the reason why they contradict each other.

    Raises:
      ValueError: a value is not one of its field, whatever the others are.
    """
    try:
        return dataclasses.replace(decode, **settings)
    except TypeError as error:
        raise ValueError(f"Sweep: {error}") from None
    except ValueError as error:
        return str(error)


def run_sweep(
    run: DataRun,
    params: Any,
    split: str | None,
    grid: dict[str, list[Any]],
    on_point: Callable[[int], None] | None = None,
) -> list[SweepPoint]:
    """Measures every combination of a grid on the same examples.

    Args:
      run: config of the run, with the examples and metrics of Evaluate.
      params: weights of its model.
      split: name of the split; Data.eval_split if None.
      grid: values by field of Decode.
      on_point: called with the number of combinations done.

    Raises:
      ValueError: the run has no texts to predict or no metric, or no combination is possible.
    """
    evaluator = Evaluator(run, split)
    names = run.evaluate.metrics or evaluator.dataset.metrics
    count = min(len(evaluator.dataset), run.evaluate.examples)
    config.require(
        evaluator.has_predictions() and names and count,
        "A sweep measures texts: the run needs a decoder, inputs, examples and Evaluate.metrics",
    )
    sets = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    decodes = [make_decode(run.decode, settings) for settings in sets]
    reasons = [each for each in decodes if isinstance(each, str)]
    config.require(len(reasons) < len(sets), f"Sweep: {reasons and reasons[0]}")
    vocabularies = evaluator.dataset.vocabularies
    predictor = Predictor(run.model, params, vocabularies, batch_size=run.evaluate.batch_size)
    points = []
    for number, (settings, decode) in enumerate(zip(sets, decodes, strict=True), start=1):
        if isinstance(decode, str):
            points.append(SweepPoint(settings, {}, reason=decode))
        else:
            values, speed = measure_setting(evaluator, predictor, decode, count)
            points.append(SweepPoint(settings, values, speed))
        if on_point:
            on_point(number)
    return points


def measure_setting(
    evaluator: Evaluator, predictor: Predictor, decode: config.Decode, count: int
) -> tuple[dict[str, float], float]:
    """Metrics and tokens per second with one config of decoding.

    Decodes twice, of which the second time is measured: the first compiles.

    Args:
      evaluator: the examples and metrics.
      predictor: the model.
      decode: the config.
      count: number of examples.
    """
    dataset = evaluator.dataset
    ids, _ = evaluator.inputs(count)
    predictor.find_chooser(decode)
    predictions = evaluator.decode_inputs(predictor, decode, ids)
    began = time.perf_counter()
    evaluator.decode_inputs(predictor, decode, ids)
    seconds = time.perf_counter() - began
    tokens = sum(len(text) for each in predictions for text in each.tokens)
    inputs = [not_none(dataset.inputs_text(i)) for i in range(count)]
    predictions = predictor.order_texts(inputs, predictions, decode)
    references = [dataset.references(i) for i in range(count)]
    names = evaluator.run.evaluate.metrics or dataset.metrics
    values = evaluator.measure(names, [each.texts[0] for each in predictions], references)
    if decode.n_best > 1:
        for name in set(names) - evaluator.failures.keys():
            values |= choosing.measure_choice(name, predictions, references)
    return values, tokens / seconds


def sensitivity(points: Sequence[SweepPoint], metric: str) -> dict[str, float]:
    """Mean range of a metric along each field, all other fields fixed.

    Args:
      points: the measured combinations.
      metric: name of the value.

    Returns:
      The mean difference of highest and lowest value by field; without fields of one value.
    """
    measured = [point for point in points if metric in point.values]
    ranges = {}
    for name in points[0].settings:
        lines: dict[tuple, list[float]] = {}
        for point in measured:
            others = tuple((key, value) for key, value in point.settings.items() if key != name)
            lines.setdefault(others, []).append(point.values[metric])
        widths = [max(line) - min(line) for line in lines.values() if len(line) > 1]
        if widths:
            ranges[name] = metrics.mean_of(widths)
    return ranges


def format_table(points: Sequence[SweepPoint]) -> str:
    """The points as a table in Markdown, and the sensitivity of the first metric below it."""
    names = list(dict.fromkeys(name for point in points for name in point.values))
    fields = list(points[0].settings)
    head = ["", *fields, *names, "tokens/s"]
    rows = [head, ["---"] * len(head)]
    for number, point in enumerate(points, start=1):
        cells = [str(number), *map(str, point.settings.values())]
        if point.reason:
            rows.append([*cells, "not possible", *[""] * len(names)])
            continue
        cells += [f"{point.values[name]:.4g}" if name in point.values else "" for name in names]
        rows.append([*cells, f"{point.tokens_per_second:,.0f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if names:
        lines.append(f"\nsensitivity: range of {names[0]} along each setting, the others fixed")
        ranges = sensitivity(points, names[0])
        lines += [f"  {name:<24}{value:.4g}" for name, value in ranges.items()]
    return "\n".join(lines)


def draw_plot(points: Sequence[SweepPoint], path: Path) -> None:
    """Draws quality over speed: the first metric and tokens per second of every combination.

    Points have the numbers of the table's rows; colors are the values of the first setting that
    varies, markers those of the second.

    Args:
      points: the combinations.
      path: a file whose name ends in the format, or an address.
    """
    from matplotlib.figure import Figure

    metric = next(name for point in points for name in point.values)
    measured = [(n, point) for n, point in enumerate(points, start=1) if metric in point.values]
    values = {
        name: list(dict.fromkeys(point.settings[name] for _, point in measured))
        for name in points[0].settings
    }
    fixed = [f"{name}={each[0]}" for name, each in values.items() if len(each) == 1]
    varying = [name for name, each in values.items() if len(each) > 1]
    columns = math.ceil(len(measured) / LEGEND_ROWS)
    height = max(5, 0.17 * min(len(measured), LEGEND_ROWS))
    figure = Figure(figsize=(8 + (1 + len(varying)) * columns, height), layout="constrained")
    axes = figure.add_subplot()
    for number, point in measured:
        looks = [values[name].index(point.settings[name]) for name in varying[:2]]
        color, marker = [*looks, 0, 0][:2]
        place = point.tokens_per_second, point.values[metric]
        settings = " ".join(f"{name}={point.settings[name]}" for name in varying)
        axes.plot(
            *place,
            MARKERS[marker % len(MARKERS)],
            color=COLORS[color % len(COLORS)],
            label=f"{number}  {settings}",
        )
        axes.annotate(str(number), place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="tokens per second", ylabel=metric, title=" ".join(fixed))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, ncols=columns, frameon=False)
    drawing = io.BytesIO()
    figure.savefig(drawing, format=path.suffix[1:])
    write_atomically(path, drawing.getvalue())
