# SPDX-License-Identifier: Apache-2.0
"""Laws of the choice among several texts: by enumeration, by scipy, by reweighting."""

import itertools
import math
import sys

import numpy as np
import pytest
import scipy.stats

from t5x_lite import config
from t5x_lite.evaluation import choosing, metrics, rewards
from t5x_lite.evaluation.prediction import Prediction, naming_longest
from t5x_lite.utils.exit_status import OutOfMemoryError

TEXTS = ["a b c", "a b", "a b c", "x y", "a b d", "a"]
SCORES = [-1.0, -2.0, -1.0, -0.5, -3.0, -4.0]


def prediction(texts=TEXTS, scores=SCORES):
    return Prediction(
        texts=list(texts),
        scores=list(scores),
        log_probabilities=[2 * score for score in scores],
        tokens=[[len(text)] for text in texts],
        calls=[0],
        drafted_by=["model"],
    )


def never(path):
    raise AssertionError(path)


def length_utility(text, texts):
    """Prefers long texts; named by a dotted path in the test below."""
    return [len(each) for each in texts]


def two_numbers(text, texts):
    return [1.0, 2.0]


@pytest.mark.parametrize("metric", ["edit_distance", "per", "wer", "exact_match", "chrf", "rouge"])
def test_mbr_is_the_mean_metric_against_all_texts(metric):
    values = choosing.make_chooser(f"mbr:{metric}", never)(
        [choosing.Candidates("in", TEXTS, SCORES)]
    )[0]
    sign = -1 if metric in ("edit_distance", "per", "wer") else 1
    measure = metrics.METRICS[metric]
    for text, value in zip(TEXTS, values, strict=True):
        each = [np.mean([*measure([text], [[other]]).values()]) for other in TEXTS]
        assert value == pytest.approx(sign * np.mean(each))
    ordered = choosing.order_predictions(choosing.MinimumBayesRisk(metric), ["in"], [prediction()])[
        0
    ]
    assert ordered.texts[0] == TEXTS[int(np.argmax(values))]
    assert ordered.utilities == sorted(values, reverse=True)


def test_an_order_moves_everything_of_a_text_and_leaves_ties_as_they_were():
    ordered = choosing.order_predictions(choosing.rank_by_score, ["in"], [prediction()])[0]
    places = [3, 0, 2, 1, 4, 5]
    assert ordered.texts == [TEXTS[i] for i in places]
    assert ordered.scores == [SCORES[i] for i in places]
    assert ordered.tokens == [[len(TEXTS[i])] for i in places]
    assert ordered.calls == ordered.drafted_by == []  # of a text that is no longer the first


def test_rerank_scores_each_different_text_once_with_its_input():
    calls = []

    def load(path):
        def score(inputs, texts):
            calls.append((path, list(zip(inputs, texts, strict=True))))
            return [-abs(len(text) - len(input)) for input, text in zip(inputs, texts, strict=True)]

        return score

    chooser = choosing.make_chooser("rerank:runs/other", load)
    two = choosing.order_predictions(chooser, ["12", "12345"], [prediction(), prediction()])
    assert [each.texts[0] for each in two] == ["a b", "a b c"]
    assert len(calls) == 1 and calls[0][0] == "runs/other"
    assert sorted(calls[0][1]) == sorted(itertools.product(["12", "12345"], set(TEXTS)))


def test_a_function_of_the_user_chooses():
    chooser = choosing.make_chooser(f"function:{__name__}.length_utility", never)
    ordered = choosing.order_predictions(chooser, ["in"], [prediction()])[0]
    assert ordered.texts[0] == "a b c" and ordered.texts[-1] == "a"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mbr:blue", "no metric 'blue'"),
        ("function:no_such_module.f", "no function that can be imported"),
        ("function:math.no_such", "no function that can be imported"),
        ("function:alone", "no function that can be imported"),
        ("function:.f", "no function that can be imported"),
        ("function:math.pi", "math.pi is no function"),
    ],
)
def test_a_chooser_that_is_none_says_why(name, words):
    with pytest.raises(ValueError, match=words):
        choosing.make_chooser(name, never)


@pytest.mark.parametrize(
    "function",
    [
        two_numbers,
        lambda *_: None,
        lambda *_: ["a"] * 6,
        lambda *_: [math.nan] * 6,
        lambda *_: itertools.count(),
    ],
    ids=["too few", "none", "texts", "not a number", "without end"],
)
def test_utilities_that_are_no_numbers_are_refused(function):
    with pytest.raises(ValueError, match="must return a finite number for each of 6 texts"):
        choosing.UserUtility(function)([choosing.Candidates("in", TEXTS, SCORES)])


def ending(*_):
    sys.exit(3)


@pytest.mark.parametrize("field", ["choose", "judge"])
@pytest.mark.parametrize(
    "function, words",
    [
        (lambda *_: {}["x"], "KeyError: 'x'"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda: [], "TypeError: .* takes 0 positional arguments"),
        (ending, "SystemExit: 3"),
        (lambda *_: (1 / each for each in (1, 0)), "ZeroDivisionError"),
    ],
    ids=["key", "division", "arguments", "exit", "generator"],
)
def test_a_function_that_fails_is_named_by_its_option(function, words, field):
    utility = choosing.UserUtility(function, field)
    with pytest.raises(ValueError, match=rf"Decode.{field}: the function failed .*'in' \({words}"):
        utility([choosing.Candidates("in", TEXTS, SCORES)])
    # A reward is fenced in the same way.
    group = rewards.Group("in", list(TEXTS), [])
    with pytest.raises(ValueError, match=f"Grpo.reward r failed on input 'in': {words}"):
        rewards.reward_group("r", lambda each: function(each.input, each.texts), group)


def test_a_function_cannot_change_the_texts():
    def overwriting(_, texts):
        texts[:] = ["other"] * len(texts)
        return range(len(texts))

    candidates = choosing.Candidates("in", [*TEXTS], SCORES)
    choosing.UserUtility(overwriting)([candidates])
    assert candidates.texts == [*TEXTS]


def test_a_lack_of_memory_names_the_longest_input():
    for error in (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()):
        with (
            pytest.raises(OutOfMemoryError, match="number 13, of 70,000 tokens, and 64 new ones"),
            naming_longest([3, 70_000], config.Decode(), [5, 12]),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="^another$"),
        naming_longest([1], config.Decode(), [0]),
    ):
        raise RuntimeError("another")


def test_rank_correlation_is_that_of_scipy():
    draw = np.random.default_rng(0)
    for size in (2, 3, 5, 16):
        one, other = draw.integers(0, size, size=(2, size)).tolist()
        expected = (
            scipy.stats.spearmanr(one, other).statistic if len({*one}) > 1 < len({*other}) else None
        )
        assert choosing.rank_correlation(one, other) == pytest.approx(expected)
    assert choosing.rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_the_report_has_the_best_texts_and_the_correlation():
    report = choosing.measure_choice("edit_distance", [prediction()], [["a b d e"]])
    unique = dict(zip(TEXTS, SCORES, strict=True))
    utilities = [-metrics.nearest_reference(text, ["a b d e"])[0] for text in unique]
    assert report["oracle/edit_distance"] == 1  # "a b d"
    assert report["candidates"] == 5
    expected = scipy.stats.spearmanr(list(unique.values()), utilities).statistic
    assert report["spearman/edit_distance"] == pytest.approx(expected)
    alike = prediction(["a"] * 3, [-1.0] * 3)
    assert choosing.measure_choice("wer", [alike], [["a"]]) == {"oracle/wer": 0, "candidates": 1}


def test_a_pair_is_the_best_and_the_worst():
    pair = choosing.preference_pair("in", TEXTS, SCORES)
    assert pair == {"prompt": "in", "chosen": "x y", "rejected": "a"}
    assert choosing.preference_pair("in", ["a", "a"], [1.0, 1.0]) is None


def test_importance_resampling_draws_by_the_tilted_law():
    texts, coefficients = ["", "a", "aa", "aaa"], [0.7]
    weights = np.exp(0.7 * np.arange(4))
    chooser = choosing.ImportanceResampling(lambda _, text: [len(text)], coefficients, seed=5)
    rows = chooser([choosing.Candidates("in", texts, [0.0] * 4)] * 20000)
    share = np.bincount(np.argmax(rows, axis=1), minlength=4)
    assert scipy.stats.chisquare(share, 20000 * weights / weights.sum()).pvalue > 1e-3
    again = choosing.ImportanceResampling(lambda _, text: [len(text)], coefficients, seed=5)
    assert again([choosing.Candidates("in", texts, [0.0] * 4)])[0] == rows[0]


def test_fitted_coefficients_give_the_means_of_the_references():
    draw = np.random.default_rng(1)
    features = [draw.normal(size=(n, 2)) for n in (5, 9, 3)]
    wanted = np.array([0.3, -0.2])
    coefficients = choosing.fit_coefficients(features, wanted)
    means = []
    for rows in features:
        weights = np.exp(rows @ coefficients)
        means.append(weights @ rows / weights.sum())
    np.testing.assert_allclose(np.mean(means, axis=0), wanted, atol=1e-7)
    with pytest.raises(ValueError, match="No weights of these samples have the mean features"):
        choosing.fit_coefficients(features, [9.0, 0.0])
