# SPDX-License-Identifier: Apache-2.0
"""Laws of the comparison's report: intervals cover the truth, and words say what was measured."""

import math

import numpy as np
import pytest

from t5x_lite.comparison import claims, measurements, quality, report


def seeds(draw, count, examples, mean, between):
    """Measured runs whose metric is the mean of `examples` numbers, by the same examples.

    Args:
      draw: random generator.
      count: number of runs.
      examples: numbers in a run.
      mean: expected metric.
      between: standard deviation of runs.
    """
    measured = []
    shared = draw.normal(size=examples)
    for _ in range(count):
        values = mean + shared + draw.normal(0, between)
        groups = np.array_split(values, quality.GROUPS)
        without = [np.concatenate(groups[:i] + groups[i + 1 :]).mean() for i in range(len(groups))]
        measured.append({"metrics": {"bleu": values.mean()}, "without": {"bleu": without}})
    return measured


def test_the_jackknife_of_a_mean_is_its_standard_error():
    draw = np.random.default_rng(0)
    values = draw.normal(size=20)
    without = [(values.sum() - value) / 19 for value in values]
    estimate = quality.combine_estimates([values.mean()], [without])
    from scipy import stats

    half = stats.t.ppf(0.975, 19) * values.std(ddof=1) / math.sqrt(20)
    assert estimate.half == pytest.approx(half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        estimate = quality.estimate_metric(seeds(draw, 3, 100, 5.0, 0.2), "bleu")
        inside += abs(estimate.value - 5.0) <= estimate.half
    # Binomial of 400 at 0.95 has a standard deviation of 1.1 %; Welch is a little cautious.
    assert 0.92 <= inside / 400 <= 0.995


def test_a_difference_is_taken_on_the_same_examples():
    draw = np.random.default_rng(2)
    some = seeds(draw, 2, 200, 5.0, 0.0)
    better = [
        {
            "metrics": {"bleu": each["metrics"]["bleu"] + 0.01},
            "without": {"bleu": [value + 0.01 for value in each["without"]["bleu"]]},
        }
        for each in some
    ]
    assert quality.estimate_metric(some, "bleu").half > 0.05
    gap = quality.estimate_difference(better, some, "bleu")
    assert gap.value == pytest.approx(0.01)
    assert gap.beyond_noise
    assert not quality.estimate_difference(some, some, "bleu").beyond_noise


@pytest.mark.parametrize(
    "metric, value, word", [("per", -1.0, "better"), ("per", 1.0, "worse"), ("bleu", 1.0, "better")]
)
def test_better_and_worse_follow_the_metric(metric, value, word):
    narrow = quality.MetricEstimate(value, 0.5)
    sentence = claims.describe_gap(metric, "causal_decoder", narrow, 3)
    assert (
        f"causal decoder is {word}" in sentence and "for other runs and test examples" in sentence
    )
    once = claims.describe_gap(metric, "causal_decoder", narrow, 1)
    assert "for other test examples, not other runs" in once
    wide = quality.MetricEstimate(value, 2.0)
    assert "beyond noise" in claims.describe_gap(metric, "causal_decoder", wide, 3)
    alone = quality.MetricEstimate(value, math.nan)
    assert "nan" not in claims.describe_gap(metric, "causal_decoder", alone, 1)
    assert "nan" not in claims.format_estimate(alone)


def scored(**metrics):
    """Measurements of one run per twin: the metrics of the encoder-decoder and of the other."""
    twins = "encoder_decoder", "causal_decoder"
    return {
        twin: [
            {
                "metrics": {name: pair[number] for name, pair in metrics.items()},
                "without": {name: [pair[number]] * 20 for name, pair in metrics.items()},
                "quantized": {},
            }
        ]
        for number, twin in enumerate(twins)
    }


def test_the_verdict_comes_first_with_unit_and_direction():
    runs_by_twin = scored(per=(30.0, 25.0), exact_match=(40.0, 45.0), loss=(1.0, 0.9))
    first, *rest = claims.verdict(runs_by_twin, ["exact_match", "loss", "per"])
    assert first == (
        "By per (% of phonemes, lower is better) the causal decoder is better than the "
        "encoder-decoder: 25 against 30."
    )
    assert rest == ["One run each: another seed may turn this around."]
    same = claims.verdict(scored(bleu=(30.0, 30.0)), ["bleu"])
    assert "0 to 100, higher is better" in same[0] and "does not differ beyond noise" in same[0]
    assert report.quality_table({"quality": runs_by_twin, "metrics": ["per"]})[0] == [
        "",
        "per (% of phonemes, lower is better)",
    ]
    assert set(quality.LEADING) <= quality.UNITS.keys()


def test_where_nothing_was_learned_the_report_says_so_and_finds_nothing_else():
    """Error rates may pass 100 %, and the loss falls before any word is right."""
    runs_by_twin = scored(per=(100.0, 104.0), exact_match=(0.0, 0.0), loss=(5.0, 4.0))
    metrics = ["exact_match", "loss", "per"]
    assert claims.verdict(runs_by_twin, metrics)[0].startswith("Nothing was learned: by every rate")
    sentences = claims.describe_differences(runs_by_twin, metrics)
    assert [line for line in sentences if "nothing to compare" in line] == [
        sentences[0],
        sentences[2],
    ]
    half = scored(per=(100.0, 20.0), exact_match=(0.0, 50.0))
    assert claims.verdict(half, ["per"])[0] == "The encoder-decoder learned nothing."
    assert not claims.learned_nothing([{"metrics": {"loss": 9.0}, "without": {}}])


def test_every_piece_of_work_says_how_long_the_rest_takes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(measurements.time, "monotonic", lambda: now[0])
    stages = measurements.Stages("training", 4)
    for seconds, needed in ((600, True), (1, False), (100, True), (0, True)):
        stages.begin("runs/a", needed)
        now[0] += seconds
    assert capsys.readouterr().out.splitlines() == [
        "training 1 of 4: runs/a",
        "training 3 of 4: runs/a; all of training ends in about 20:00",
        "training 4 of 4: runs/a; all of training ends in about 5:50",
    ]


def test_it_is_said_which_intervals_know_nothing_of_other_examples():
    draw = np.random.default_rng(5)

    def drawn():
        return [run | {"quantized": {}} for run in seeds(draw, 2, 200, 50.0, 0.1)]

    runs_by_twin = {"encoder_decoder": drawn(), "causal_decoder": drawn()}
    record = {"quality": runs_by_twin, "metrics": ["bleu"], "seeds": 2}
    assert not any("whole split" in line for line in report.describe_results(record))
    for number, run in enumerate(run for runs in runs_by_twin.values() for run in runs):
        run["metrics"]["loss"] = 2.0 + number
    sentences = report.describe_results(record | {"metrics": ["bleu", "loss"]})
    assert sentences[-1].startswith("loss: one number for the whole split")


def test_what_rounding_harms_is_said_and_what_it_does_not_is_not():
    draw = np.random.default_rng(3)
    whole = seeds(draw, 2, 200, 50.0, 0.1)
    worse = [
        {
            "metrics": {"bleu": each["metrics"]["bleu"] - 1},
            "without": {"bleu": [value - 1 for value in each["without"]["bleu"]]},
        }
        for each in whole
    ]

    def runs(few):
        return [
            each | {"quantized": {"int4": other}} for each, other in zip(whole, few, strict=True)
        ]

    record = {"encoder_decoder": runs(whole), "causal_decoder": runs(worse)}
    (sentence,) = claims.describe_roundings(record, ["bleu"])
    assert sentence.startswith("int4 harms the causal decoder: bleu -1")
