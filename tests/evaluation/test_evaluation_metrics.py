# SPDX-License-Identifier: Apache-2.0
"""Laws of metrics: known values, bounds, the nearest reference, and names that are reported."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_lite.evaluation import metrics

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric(x, y, z):
    distance = metrics.edit_distance
    assert (distance(x, y) == 0) == (x == y)
    assert distance(x, y) == distance(y, x)
    assert distance(x, z) <= distance(x, y) + distance(y, z)
    assert abs(len(x) - len(y)) <= distance(x, y) <= max(len(x), len(y))


def test_edit_distance_counts_each_kind_of_edit_once():
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == metrics.edit_distance("abc", "") == 3


def test_error_rates_take_the_nearest_pronunciation_and_all_phonemes_together():
    predictions = ["T AH M AA T OW", "K AE T", "D AO"]
    references = [["T AH M EY T OW", "T AH M AA T OW"], ["K AE T"], ["D AO G"]]
    scores = metrics.measure_metrics(["per", "wer"], predictions, references)
    assert scores["per"] == pytest.approx(100 * 1 / (6 + 3 + 3))
    assert scores["wer"] == pytest.approx(100 / 3)


def test_a_word_counts_right_if_any_pronunciation_matches():
    scores = metrics.word_error_rate(["R EH D", "R IY D"], [["R IY D", "R EH D"], ["L IY D"]])
    assert scores == {"wer": 50.0}


def test_exact_match_ignores_outer_spaces_only():
    scores = metrics.exact_match([" yes ", "a b", "A"], [["yes"], ["a  b"], ["a"]])
    assert scores == {"exact_match": pytest.approx(100 / 3)}


def test_token_edit_distance_is_per_text():
    scores = metrics.token_edit_distance(["a b c", "x"], [["a c"], ["x"]])
    assert scores == {"edit_distance": 0.5}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_perfect_prediction_is_best_and_an_empty_one_is_worst(name):
    text = "the quick brown fox jumps over the lazy dog"
    best, worst = (metrics.measure_metrics([name], [each], [[text]]) for each in (text, ""))
    errors = name in ("per", "wer", "edit_distance")
    for measure, value in best.items():
        assert value == pytest.approx(0 if errors else 100)
        assert worst[measure] >= 9 if errors else worst[measure] == pytest.approx(0)


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_texts_may_have_different_numbers_of_references(name):
    texts = ["the cat sat on the mat today", "a dog ran across the wide street"]
    references = [["no words shared here", texts[0]], [texts[1]]]
    for value in metrics.measure_metrics([name], texts, references).values():
        assert value == pytest.approx(100)


def test_bleu_is_that_of_sacrebleu():
    import sacrebleu

    candidates, right = (
        ["the cat is on a mat", "there it was"],
        ["the cat is on the mat", "there it is"],
    )
    expected = sacrebleu.corpus_bleu(candidates, [right]).score
    assert metrics.bleu(candidates, [[text] for text in right]) == {"bleu": pytest.approx(expected)}


def test_a_misspelled_metric_is_reported_with_the_near_one():
    with pytest.raises(ValueError, match="no metric 'exact_mach': did you mean exact_match"):
        metrics.measure_metrics(["exact_mach"], ["a"], [["a"]])


def test_nothing_to_measure_and_missing_references_are_errors():
    with pytest.raises(ValueError, match="no predictions"):
        metrics.measure_metrics(["wer"], [], [])
    with pytest.raises(ValueError, match="Prediction 1 has no reference"):
        metrics.measure_metrics(["wer"], ["a", "b"], [["a"], []])
