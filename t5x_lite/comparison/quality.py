# SPDX-License-Identifier: Apache-2.0
"""What a trained twin's answers are worth, with what chance alone could have made of them.

Uncertainty has two parts: other test examples (a jackknife over groups of them, which corpus
metrics such as BLEU allow too) and another seed. They are added.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, quantization
from t5x_lite.evaluation import evaluate, metrics
from t5x_lite.evaluation.predict import Predictor

GROUPS = 20
WIDTH = 8  # of a drafted block: every guess that could hold is tried
# Of these less is better; of all other metrics more.
LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "per", "wer", "edit_distance")


def measure(run: config.Run, params: Any, step: int, asked: config.Compare) -> dict:
    """Metrics of the run's weights on asked.examples of asked.split, whole ("metrics") and with
    each group of examples left out ("without": a list by metric)."""
    settings = dataclasses.replace(run.evaluate, examples=asked.examples, batches=10**6)
    evaluator = evaluate.Evaluator(dataclasses.replace(run, evaluate=settings), asked.split)
    numbers = evaluator(params, step)
    measured = {"metrics": numbers, "without": {}}
    if evaluator.kept is None:
        return measured
    with open(evaluator.kept, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = run.evaluate.metrics or evaluator.dataset.metrics
    return measured | {"without": left_out(names, rows)}


def drafted(run: config.Run, params: Any, asked: config.Compare) -> dict[str, dict]:
    """Of each drafter of asked.drafters what its guesses were worth on the test texts: tokens per
    call and in which share of calls the first, second, ... guess held (`decoding.tally`)."""
    settings = dataclasses.replace(run.evaluate, examples=asked.examples, batches=0)
    evaluator = evaluate.Evaluator(dataclasses.replace(run, evaluate=settings), asked.split)
    count = min(len(evaluator.dataset), asked.examples)
    if not evaluator.decodes() or not count:
        return {}
    ids, _ = evaluator.inputs(count)
    rows, found = run.evaluate.batch_size, {}
    for name in asked.drafters:
        made = Predictor(run.model, params, evaluator.dataset.vocabularies, batch_size=rows)
        made.continued(ids, dataclasses.replace(run.decode, beams=1, decoder=name, width=WIDTH))
        found[name] = made.tally.report()
    return found


def quantised(run: config.Run, params: Any, step: int, asked: config.Compare) -> dict[str, dict]:
    """`measure` of the weights in few bits, for each way of asked.quantised; what is written with
    them is kept apart, in a folder of that name."""
    found = {}
    for name in asked.quantised:
        here = dataclasses.replace(run, model_dir=str(Path(run.model_dir) / "quantised" / name))
        few = quantization.quantised(params, quantization.kind(name))
        found[name] = measure(here, few, step, asked)
    return found


def left_out(names: Sequence[str], rows: Sequence[dict]) -> dict[str, list[float]]:
    """Each metric of rows without one group of them, for each group in turn."""
    groups = np.array_split(np.arange(len(rows)), min(GROUPS, len(rows)))
    found: dict[str, list[float]] = {}
    for group in groups:
        rest = np.setdiff1d(np.arange(len(rows)), group)
        if not len(rest):
            continue
        predictions = [rows[i]["prediction"] for i in rest]
        references = [rows[i]["references"] for i in rest]
        for name, value in metrics.measure(names, predictions, references).items():
            found.setdefault(name, []).append(value)
    return found


class Estimate(NamedTuple):
    """A number and the half of its 95 % interval (nan: from one seed and no groups)."""

    value: float
    half: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.value) > self.half


def estimate(measured: Sequence[dict], metric: str) -> Estimate:
    """The mean of a metric over seeds, which measured lists."""
    return combined(
        [each["metrics"][metric] for each in measured],
        [each["without"].get(metric, []) for each in measured],
    )


def difference(some: Sequence[dict], others: Sequence[dict], metric: str) -> Estimate:
    """some minus others, seed by seed and on the same examples."""
    pairs = list(zip(some, others, strict=True))
    values = [a["metrics"][metric] - b["metrics"][metric] for a, b in pairs]
    without = [
        np.subtract(a["without"].get(metric, []), b["without"].get(metric, [])) for a, b in pairs
    ]
    return combined(values, without)


def combined(values: Sequence[float], without: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values over seeds; without[seed] are values with a group left out.

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
        return Estimate(float(np.mean(values)), 0.0 if parts else math.nan)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts if part)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    return Estimate(float(np.mean(values)), float(half))
