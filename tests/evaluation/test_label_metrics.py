# SPDX-License-Identifier: Apache-2.0
"""Laws of metrics of labels: each equals its definition, scipy, or scikit-learn if it is there."""

import itertools

import numpy as np
import pytest

from t5x_lite import config
from t5x_lite.evaluation import label_metrics, metrics
from t5x_lite.evaluation.label_metrics import LabeledOutputs
from t5x_lite.tokenizers.labels import TextSpan

DRAW = np.random.default_rng(0)
SCORES = DRAW.random((60, 4)).round(1)
CLASSES = LabeledOutputs(SCORES, SCORES.argmax(1), DRAW.integers(0, 4, 60))
TWO = LabeledOutputs(SCORES[:, :2], SCORES[:, :2].argmax(1), DRAW.integers(0, 2, 60))
SEVERAL = LabeledOutputs(SCORES, (SCORES > 0.5).astype(int), DRAW.integers(0, 2, (60, 4)))
NUMBERS = LabeledOutputs(
    scores=SCORES[:, 0], references=SCORES[:, 0] + DRAW.normal(size=60).round(1)
)


def f1_by_counting(ours: np.ndarray, theirs: np.ndarray) -> float:
    """F1 of flags, text by text."""
    right = sum(a and b for a, b in zip(ours, theirs, strict=True))
    precision, recall = right / max(sum(ours), 1), right / max(sum(theirs), 1)
    return 2 * precision * recall / (precision + recall) if right else 0.0


def auc_by_pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs of a positive and a negative that are in the right order."""
    pairs = itertools.product(scores[positive], scores[~positive])
    return float(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_metrics_of_classes_are_their_definitions():
    for outputs, count in ((CLASSES, 4), (TWO, 2)):
        ours, theirs = outputs.chosen, outputs.references
        assert label_metrics.accuracy(outputs) == np.mean(ours == theirs)
        each = [f1_by_counting(ours == label, theirs == label) for label in range(count)]
        assert label_metrics.f1_macro(outputs) == pytest.approx(np.mean(each))
        assert label_metrics.f1_micro(outputs) == pytest.approx(np.mean(ours == theirs))
        # The multi-class coefficient as a correlation of indicator matrices.
        one_hot = [np.eye(count)[side] - np.eye(count)[side].mean(0) for side in (ours, theirs)]
        products = [[np.sum(a * b) for b in one_hot] for a in one_hot]
        expected = products[0][1] / np.sqrt(products[0][0] * products[1][1])
        assert label_metrics.matthews(outputs) == pytest.approx(expected)
    assert label_metrics.f1_binary(TWO) == pytest.approx(
        f1_by_counting(TWO.chosen == 1, TWO.references == 1)
    )
    assert label_metrics.auc(TWO) == pytest.approx(
        auc_by_pairs(TWO.scores[:, 1], TWO.references == 1)
    )


def test_metrics_of_several_labels_are_their_definitions():
    ours, theirs = SEVERAL.chosen, SEVERAL.references
    assert label_metrics.accuracy(SEVERAL) == np.mean((ours == theirs).all(1))
    each = [f1_by_counting(ours[:, label], theirs[:, label]) for label in range(4)]
    assert label_metrics.f1_macro(SEVERAL) == pytest.approx(np.mean(each))
    assert label_metrics.f1_micro(SEVERAL) == pytest.approx(
        f1_by_counting(ours.ravel(), theirs.ravel())
    )
    areas = [auc_by_pairs(SCORES[:, label], theirs[:, label] > 0) for label in range(4)]
    assert label_metrics.auc(SEVERAL) == pytest.approx(np.mean(areas))


def test_correlations_are_those_of_scipy():
    from scipy import stats

    ours, theirs = NUMBERS.scores, NUMBERS.references
    assert label_metrics.pearson(NUMBERS) == pytest.approx(stats.pearsonr(ours, theirs)[0])
    assert label_metrics.spearman(NUMBERS) == pytest.approx(stats.spearmanr(ours, theirs)[0])


def test_metrics_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.metrics")
    pairs = CLASSES.references, CLASSES.chosen
    assert label_metrics.f1_macro(CLASSES) == pytest.approx(
        theirs.f1_score(*pairs, average="macro")
    )
    assert label_metrics.matthews(CLASSES) == pytest.approx(theirs.matthews_corrcoef(*pairs))
    for average, ours in (("macro", label_metrics.f1_macro), ("micro", label_metrics.f1_micro)):
        score = theirs.f1_score(SEVERAL.references, SEVERAL.chosen, average=average)
        assert ours(SEVERAL) == pytest.approx(score)
    assert label_metrics.auc(SEVERAL) == pytest.approx(
        theirs.roc_auc_score(SEVERAL.references, SEVERAL.scores)
    )


def test_spans_count_where_ends_and_name_are_right():
    a, b, c = TextSpan(0, 3, "x"), TextSpan(0, 3, "y"), TextSpan(4, 9, "x")
    outputs = LabeledOutputs(spans=[[a, c], [b], []], reference_spans=[[a], [a], [c]])
    assert label_metrics.span_f1(outputs) == pytest.approx(2 * 1 / (3 + 3))


def test_a_metric_that_is_not_defined_has_a_reason():
    # The mean of three float64 of 0.1 is another number.
    for number in (np.float64(1), np.float64(0.1), np.float32(1 / 3)):
        sides = np.full(3, number), np.arange(3.0)
        for scores, references in (sides, sides[::-1]):
            constant = LabeledOutputs(scores=scores, references=references)
            values, failures = label_metrics.measure_labels(["pearson", "spearman"], constant)
            assert values == {}
            assert all("the same number" in failures[name] for name in ("pearson", "spearman"))
    alike = TWO._replace(references=np.ones(60, int))
    values, failures = label_metrics.measure_labels(["auc"], alike)
    assert values == {} and "the ROC curve is not defined" in failures["auc"]
    with pytest.raises(ValueError, match="There is no metric 'f1' for a readout of kind classes"):
        label_metrics.check_label_metrics(["f1"], config.Readout("classes", labels=("a", "b")))


@pytest.mark.parametrize(
    "answer, references, exact, f1",
    [
        ("The Cat!", ["cat"], 100.0, 100.0),
        ("a black cat", ["the cat", "dog"], 0.0, 100 * 2 / 3),
        ("", [""], 100.0, 100.0),
        ("", ["x"], 0.0, 0.0),
        ("cat cat", ["cat"], 0.0, 100 * 2 / 3),
    ],
)
def test_answers_are_scored_as_by_the_script_of_squad(answer, references, exact, f1):
    values = metrics.measure_metrics(["squad"], [answer], [references])
    assert values == pytest.approx({"squad_exact_match": exact, "squad_f1": f1})
