# SPDX-License-Identifier: Apache-2.0
"""Quality of a trained twin, with the uncertainty of each metric.

Uncertainty has two parts: other test examples (a jackknife over groups of them, which corpus
metrics such as BLEU allow too) and another seed. They are added.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, data, decoding
from t5x_lite.analysis import geometry, reading
from t5x_lite.cli.progress import Progress
from t5x_lite.comparison import example_losses
from t5x_lite.comparison.example_losses import ExampleLosses
from t5x_lite.config.training_run import ComparisonRun, DataRun
from t5x_lite.decoding.drafters import registry
from t5x_lite.evaluation import evaluate, metrics
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.model import quantization

GROUPS = 20
STEPS = 16  # of which attention to the source is reported
WIDTH = 8  # of a drafted block: long enough for every draft token that could be accepted
UNITS = {
    "accuracy": "% of tokens",
    "bits_per_byte": "bits per byte",
    "bleu": "0 to 100",
    "chrf": "0 to 100",
    "edit_distance": "tokens per text",
    "exact_match": "% of texts",
    "loss": "nats per token",
    "per": "% of phonemes",
    "rouge1": "0 to 100",
    "rouge2": "0 to 100",
    "rougeLsum": "0 to 100",
    "wer": "% of words",
}
# The metric of the verdict is the first of these that was measured.
LEADING = ("per", "wer", "bleu", "rougeLsum", "chrf", "exact_match", "edit_distance", "loss")
# Error rates from here on, and scores up to here, are those of a model that learned nothing.
WORST_ERROR, WORST_SCORE = 99.0, 1.0


def evaluate_twin(
    run: DataRun, params: Any, step: int, compare: config.Compare, keep: Path | None = None
) -> dict:
    """Measures the run's weights on Compare.examples examples of Compare.split.

    Args:
      run: config of the twin's run.
      params: its weights.
      step: step of the weights.
      compare: config of the comparison.
      keep: file that losses by example are written to; None keeps none.

    Returns:
      "metrics" of all examples, and "without": metrics with each group of examples left out, a
      list by metric.
    """
    decoded = compare.examples if compare.decoded is None else compare.decoded
    settings = dataclasses.replace(run.evaluate, examples=decoded, batches=10**6)
    evaluator = evaluate.Evaluator(dataclasses.replace(run, evaluate=settings), compare.split)
    count = min(len(evaluator.dataset), compare.examples)
    with Progress("texts", min(count, decoded) if evaluator.has_predictions() else None) as report:
        numbers = evaluator(params, step, report)
    measured: dict[str, dict] = {"metrics": numbers, "without": {}}
    if evaluator.has_predictions() and count:
        losses = example_losses.measure_examples(evaluator, params, count)
        if keep is not None:
            example_losses.write_losses(keep, losses)
        numbers |= {"loss": losses.loss(), "perplexity": math.exp(min(losses.loss(), 700.0))}
        rest = [losses.choose(others).loss() for others in left_out(count)]
        measured["without"] = {"loss": rest} if rest else {}
    if evaluator.predictions_path is None:
        return measured
    with open(evaluator.predictions_path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = run.evaluate.metrics or evaluator.dataset.metrics
    measured["without"] |= jackknife_metrics(names, rows)
    return measured


def drafter_settings(run: config.Run, name: str) -> config.Decode:
    """Decoding with a drafter of Compare.drafters, in blocks of WIDTH tokens.

    Raises:
      ValueError: the name is unknown, or needs what the model lacks.
    """
    decode = dataclasses.replace(run.decode, beams=1, drafter=name, draft_length=0)
    registry.check_names(run.model, decode)
    return dataclasses.replace(decode, draft_length=WIDTH if registry.takes_width(name) else 0)


def check_measurements(run: ComparisonRun) -> None:
    """Raises ValueError now for what could not be measured after hours of training."""
    for name in run.compare.quantized:
        quantization.parse_quantization(name)
    for name in run.compare.drafters:
        drafter_settings(run, name)
    try:
        dataset = data.open_dataset(run.data, run.compare.split)
        evaluate.check_metrics(run, dataset)
    except ValueError as error:
        raise ValueError(f"Compare.split = {run.compare.split!r}: {error}") from error


def measure_drafters(run: DataRun, params: Any, compare: config.Compare) -> dict[str, dict]:
    """Measures the drafters of Compare.drafters on the test texts.

    Args:
      run: config of the twin's run.
      params: its weights.
      compare: config of the comparison.

    Returns:
      Acceptance statistics by drafter: tokens per forward pass, and the share of passes in which
      the first, second, ... draft token was accepted (`decoding.acceptance.stats`).
    """
    settings = dataclasses.replace(run.evaluate, examples=compare.examples, batches=0)
    evaluator = evaluate.Evaluator(dataclasses.replace(run, evaluate=settings), compare.split)
    count = min(len(evaluator.dataset), compare.examples)
    if not evaluator.has_predictions() or not count:
        return {}
    ids, _ = evaluator.inputs(count)
    rows, results = run.evaluate.batch_size, {}
    for name in compare.drafters:
        predictor = Predictor(run.model, params, evaluator.dataset.vocabularies, batch_size=rows)
        predictor.predict_ids(ids, drafter_settings(run, name))
        results[name] = predictor.tally.report()
    return results


def measure_quantized(
    run: DataRun, params: Any, step: int, compare: config.Compare
) -> dict[str, dict]:
    """Measures the quantized weights, for each kind of Compare.quantized.

    Args:
      run: config of the twin's run.
      params: its weights.
      step: step of the weights.
      compare: config of the comparison.

    Returns:
      `evaluate_twin` by kind; the predictions are kept in a folder per kind.
    """
    results = {}
    for name in compare.quantized:
        here = dataclasses.replace(run, model_dir=str(Path(run.model_dir) / "quantized" / name))
        rounded = quantization.quantize_params(params, quantization.parse_quantization(name))
        results[name] = evaluate_twin(here, rounded, step, compare)
    return results


def inspect_twin(run: DataRun, params: Any, compare: config.Compare) -> dict[str, list[float]]:
    """Attention to the source by step, and geometry of states by layer, of the right answers.

    Args:
      run: config of the twin's run.
      params: its weights.
      compare: config of the comparison.

    Returns:
      "source" and the fields of `geometry.StateGeometry`; {} where Compare.inspected is 0.
    """
    evaluator = evaluate.Evaluator(run, compare.split)
    count = min(len(evaluator.dataset), compare.inspected)
    if not count or not evaluator.has_predictions():
        return {}
    pairs = zip(*example_losses.example_ids(evaluator, count), strict=True)
    texts = [reading.explained_text(run.model, *pair) for pair in pairs]
    prepared = decoding.prepare_params(run.model, params)
    read = list(geometry.read_texts(run.model, prepared, texts))
    measures = geometry.measure_geometry(read)._asdict()
    steps = {"source": geometry.mean_by_step(read, STEPS)}
    return steps | {name: values.tolist() for name, values in measures.items()}


def metric_unit(metric: str) -> str:
    """Unit of a metric, and which of its values are better."""
    better = "lower is better" if metric in metrics.LESS_IS_BETTER else "higher is better"
    return ", ".join([UNITS[metric], better] if metric in UNITS else [better])


def is_worst(metric: str, value: float) -> bool:
    """True for a value of a rate or score that a model has which learned nothing."""
    if not UNITS.get(metric, "").startswith(("%", "0")):
        return False
    return value >= WORST_ERROR if metric in metrics.LESS_IS_BETTER else value <= WORST_SCORE


def left_out(count: int) -> list[np.ndarray]:
    """Numbers of the examples that are left without each of GROUPS groups; [] of one example."""
    groups = np.array_split(np.arange(count), min(GROUPS, count))
    return [np.setdiff1d(np.arange(count), group) for group in groups if len(group) < count]


def jackknife_metrics(names: Sequence[str], rows: Sequence[dict]) -> dict[str, list[float]]:
    """Each metric of the rows with one group of them left out, for each group (jackknife)."""
    results: dict[str, list[float]] = {}
    for rest in left_out(len(rows)):
        predictions = [rows[int(i)]["prediction"] for i in rest]
        references = [rows[int(i)]["references"] for i in rest]
        for name, value in metrics.measure_metrics(names, predictions, references).items():
            results.setdefault(name, []).append(value)
    return results


class MetricEstimate(NamedTuple):
    """A value with its uncertainty.

    Attributes:
      value: the value.
      half: half of its 95 % interval; NaN from one seed and no groups.
      error: its standard error.
      freedom: degrees of freedom of Student's t.
    """

    value: float
    half: float
    error: float = math.nan
    freedom: float = math.nan

    @property
    def beyond_noise(self) -> bool:
        """True if the interval excludes zero."""
        return abs(self.value) > self.half


def estimate_metric(measured: Sequence[dict], metric: str) -> MetricEstimate:
    """Mean of a metric over seeds; `measured` has the measurements of each."""
    return combine_estimates(
        [each["metrics"][metric] for each in measured],
        [each["without"].get(metric, []) for each in measured],
    )


def estimate_difference(
    some: Sequence[dict], others: Sequence[dict], metric: str
) -> MetricEstimate:
    """Estimates some minus others, seed by seed and on the same examples.

    Args:
      some: measurements of each seed.
      others: the same of another twin.
      metric: name of the metric.
    """
    pairs = list(zip(some, others, strict=True))
    values = [a["metrics"][metric] - b["metrics"][metric] for a, b in pairs]
    without = [
        np.subtract(a["without"].get(metric, []), b["without"].get(metric, [])) for a, b in pairs
    ]
    return combine_estimates(values, without)


def estimate_statistic(
    statistic: Callable[..., float], *twins: Sequence[ExampleLosses]
) -> MetricEstimate:
    """Estimates a statistic of one or more twins, seed by seed and on the same examples.

    Args:
      statistic: a function of the losses of each twin, in their order.
      twins: losses by example of each seed, for each of the twins.
    """
    seeds = list(zip(*twins, strict=True))
    groups = left_out(len(seeds[0][0].nats))
    values = [statistic(*runs) for runs in seeds]
    without = [
        [statistic(*(run.choose(rest) for run in runs)) for rest in groups] for runs in seeds
    ]
    return combine_estimates(values, without)


def combine_estimates(
    values: Sequence[float], without: Sequence[Sequence[float]]
) -> MetricEstimate:
    """Mean of values over seeds; without[seed] are the values with a group left out.

    The variance of the mean is that between seeds over their number, plus the jackknife's
    (n - 1) / n * sum of squares about the mean; Student's t with the degrees of freedom of
    Welch and Satterthwaite.
    """
    from scipy import stats

    parts = []
    if len(values) > 1:
        parts.append((np.var(values, ddof=1) / len(values), len(values) - 1))
    pooled = np.mean(without, axis=0) if len(without[0]) > 1 else []
    if len(pooled):
        count = len(pooled)
        spread = (count - 1) / count * np.sum((pooled - np.mean(pooled)) ** 2)
        parts.append((spread, count - 1))
    variance = sum(part for part, _ in parts)
    if not parts or variance == 0:
        return MetricEstimate(float(np.mean(values)), *((0.0, 0.0) if parts else (math.nan,)))
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts if part)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, freedom) * error)
    return MetricEstimate(float(np.mean(values)), half, error, float(freedom))
