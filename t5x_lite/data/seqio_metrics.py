# SPDX-License-Identifier: Apache-2.0
"""Metric functions of seqio Tasks: a user's code, whose errors are reported and never raised."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio

from t5x_lite.data.task import TaskScores
from t5x_lite.processes import describe_error

# The most elements of an array that are read as a metric each.
MOST_ELEMENTS = 100


def score_predictions(
    task: seqio.Task,
    load: Callable[..., Any],
    split: str,
    predictions: list[str],
) -> TaskScores:
    """Computes a task's own metrics of predictions.

    Args:
      task: of seqio.
      load: loads the examples of a split, as `seqio_tasks.load_dataset`.
      split: of the task.
      predictions: texts for the first examples of the split.
    """
    vocabulary = task.output_features["targets"].vocabulary
    try:
        targets, outputs = [], []
        examples = load(split=split, seed=0).as_numpy_iterator()
        for example, prediction in zip(examples, predictions, strict=False):
            right = vocabulary.decode([int(token) for token in example["targets"]])
            targets.append(task.postprocess_fn(right, example=example, is_target=True))
            outputs.append(task.postprocess_fn(prediction, example=example, is_target=False))
    except (Exception, SystemExit) as error:  # the user may call anything
        reason = f"postprocess_fn of {task.name} failed: {describe_error(error)}"
        return TaskScores({}, {metric_name(metric): reason for metric in task.predict_metric_fns})
    scores = TaskScores({}, {})
    for metric in task.predict_metric_fns:
        try:
            values, unread = read_values(metric(targets, outputs))
        except (Exception, SystemExit) as error:
            scores.failures[metric_name(metric)] = describe_error(error)
            continue
        scores.values.update(values)
        scores.failures.update(unread)
    return scores


def unsupported_metrics(task: seqio.Task) -> dict[str, str]:
    """Metrics of a task that are not computed here, with reasons."""
    reasons = {
        metric_name(metric): "it needs the argument `scores`, log-probabilities of the targets"
        for metric in task.score_metric_fns
    }
    reasons |= {
        metric_name(metric): "it needs the argument `aux_values`, outputs besides the text"
        for metric in task.predict_with_aux_metric_fns
    }
    # Behind the user's own seqio lists each function again.
    classes = task.metric_objs[: len(task.metric_objs) - len(task.metric_fns)]
    return reasons | {
        metric_name(metric): "metric_objs are not read: pass a function in metric_fns"
        for metric in classes
    }


def metric_name(metric: Any) -> str:
    """Name of a metric function, of a partial one too, or of a metric class."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__)


def read_values(result: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers of a metric's result by name, and reasons why other values are not read.

    Nested mappings and arrays of several elements give names with a slash: "by/a", "recall/0".

    Raises:
      TypeError: the result is not a mapping.
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"it returned {type(result).__name__}, not a dict of values by name")
    values, unread = {}, {}
    for name, value in flat_values("", result):
        try:
            # Text of digits is text: float would read it.
            number: Any = None if isinstance(value, (str, bytes)) else value
            values[name] = float(number)
        except (TypeError, ValueError):
            unread[name] = f"{type(value).__name__} is not a number"
    return values, unread


def flat_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of a metric's value with their names."""
    if isinstance(value, seqio.metrics.Scalar):
        value = value.value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat_values(f"{name}/{key}" if name else str(key), inner)
        return
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.size == 1:
            value = array.reshape(())[()]
        elif array.ndim == 1 and 0 < array.size <= MOST_ELEMENTS:
            yield from ((f"{name}/{i}", element) for i, element in enumerate(array))
            return
    yield name, value
