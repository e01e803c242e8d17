# SPDX-License-Identifier: Apache-2.0
"""Laws of a user's metric functions: their values are read as seqio's, their errors are reasons."""

import functools

import numpy as np
import pytest

pytest.importorskip("seqio")

import seqio
import tensorflow as tf

from t5x_lite import config
from t5x_lite.data import datasets, seqio_metrics

PAIRS = [{"inputs": "abc", "targets": "cab"}, {"inputs": "de", "targets": "ed"}]


def make_task(name: str, *metrics, **options) -> config.Data:
    """Data of a task that is registered by name, with these metrics and other options of seqio."""
    columns = {key: [pair[key] for pair in PAIRS] for key in ("inputs", "targets")}
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=0))
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
            splits=("train", "validation"),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=list(metrics),
        **options,
    )
    return config.Data(task=name, lengths={"inputs": 16, "targets": 16})


@pytest.fixture
def data_of(tmp_path, request):
    """Opens the validation split of a task with these metric functions."""

    def opened(*metrics, **options):
        name = "metrics_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
        try:
            data = make_task(name, *metrics, **options)
            data = config.Data(data.task, data.lengths, cache_dir=str(tmp_path))
            return datasets.open_dataset(data, "validation")
        finally:
            request.addfinalizer(lambda: seqio.TaskRegistry.remove(name))

    return opened


def returning(value):
    def mine(targets, predictions):
        return value

    return mine


VALUES = {
    "scalar": ({"s": seqio.metrics.Scalar(0.5)}, {"s": 0.5}),
    "numpy": (
        {"a": np.float32(2), "b": np.array(3), "c": np.array([[4.0]])},
        {"a": 2, "b": 3, "c": 4},
    ),
    "jax": ({"a": tf.constant(2.0)}, {"a": 2}),
    "nested": ({"by": {"a": 1.0, "b": {"c": 2}}}, {"by/a": 1, "by/b/c": 2}),
    "array": ({"recall": np.array([0.5, 1.0])}, {"recall/0": 0.5, "recall/1": 1}),
    "list": ({"recall": [1, 2]}, {"recall/0": 1, "recall/1": 2}),
    "bool": ({"right": True}, {"right": 1}),
    "nan": ({"x": float("inf")}, {"x": float("inf")}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_are_read_as_seqio_reads_them(case):
    value, expected = VALUES[case]
    assert seqio_metrics.read_values(value) == (expected, {})


UNREAD = {
    "text": {"t": seqio.metrics.Text("words")},
    "histogram": {"t": seqio.metrics.Histogram(np.zeros(9))},
    "digits": {"t": "0.5"},
    "none": {"t": None},
    "large": {"t": np.zeros(10_000)},
    "empty": {"t": np.zeros(0)},
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_a_number_is_named_and_the_rest_is_read(case):
    values, unread = seqio_metrics.read_values(UNREAD[case] | {"good": 1.0})
    assert values == {"good": 1.0}
    assert list(unread) == ["t"] and "not a number" in unread["t"]


def raising(error):
    def broken(targets, predictions):
        raise error

    return broken


@pytest.mark.parametrize("error", [KeyError("a"), ZeroDivisionError(), SystemExit(3)])
def test_a_function_that_raises_costs_only_its_own_values(data_of, error):
    dataset = data_of(raising(error), returning({"good": 1.0}))
    values, failures = dataset.score(["cab", "no"])
    assert values == {"good": 1.0}
    assert type(error).__name__ in failures["broken"] and __file__ in failures["broken"]


@pytest.mark.parametrize("value", [0.5, None, [("a", 1)]])
def test_a_result_that_is_no_mapping_is_a_failure(data_of, value):
    values, failures = data_of(returning(value)).score(["cab", "ed"])
    assert values == {} and "not a dict" in failures["mine"]


def test_a_postprocessor_that_raises_is_a_failure_of_every_metric(data_of):
    def broken(text, example=None, is_target=False):
        return [][1]

    dataset = data_of(returning({"a": 1}), postprocess_fn=broken)
    values, failures = dataset.score(["cab", "ed"])
    assert values == {} and "postprocess_fn" in failures["mine"]


def test_metrics_that_need_more_than_texts_are_named(data_of):
    def by_score(targets, scores):
        return {"s": 1.0}

    def with_aux(targets, predictions, aux_values):
        return {"s": 1.0}

    class Mine(seqio.metrics.Metric):
        pass

    metrics = by_score, functools.partial(with_aux), returning({"good": 1.0})
    dataset = data_of(*metrics, metric_objs=[Mine])
    reasons = dataset.unsupported_metrics
    assert reasons.keys() == {"by_score", "with_aux", "Mine"}
    assert "scores" in reasons["by_score"] and "aux_values" in reasons["with_aux"]
    assert dataset.score(["cab", "ed"]) == ({"good": 1.0}, {})
