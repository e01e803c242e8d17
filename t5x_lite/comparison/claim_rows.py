# SPDX-License-Identifier: Apache-2.0
"""Published claims as small studies: two twins, a statistic, and the side that the claim is on.

Each statistic is made so that the claim says: it is above `least`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.comparison import quality
from t5x_lite.comparison.example_losses import ExampleLosses
from t5x_lite.utils.nearest import suggest

BASE = "encoder_decoder"
REDLLM = "Zhang et al., 2025, arXiv 2510.26622"
T5GEMMA = "Zhang et al., 2025, arXiv 2504.06225"
T5GEMMA2 = "Zhang et al., 2025, arXiv 2512.14856"
SMALL = "Elfeki et al., 2025, arXiv 2501.16273"
LITTLE = 0.05  # share of the loss that counts as little
LEVEL = 0.05  # of all rows together
FEWEST_SEEDS = 5


class ClaimRow(NamedTuple):
    """A published claim, and the study that decides it.

    Attributes:
      text: the claim.
      source: its publication.
      number: the number in it; "" for none.
      twins: the twins of the study.
      statistic: estimate from the record of a comparison.
      meaning: the statistic in words, with its unit.
      least: the claim holds if the statistic is above this.
      lengths: true for one that needs Compare.lengths.
      speed: true for one that needs times, of Compare.repeats.
    """

    text: str
    source: str
    number: str
    twins: tuple[str, ...]
    statistic: Callable[[dict], quality.MetricEstimate]
    meaning: str
    least: float = 0.0
    lengths: bool = False
    speed: bool = False


def loss_gain(worse: str, better: str) -> Callable[[dict], quality.MetricEstimate]:
    """Statistic: the loss of one twin minus that of another."""

    def gain(some: ExampleLosses, others: ExampleLosses) -> float:
        return some.loss() - others.loss()

    return lambda record: quality.estimate_statistic(
        gain, record["losses"][worse], record["losses"][better]
    )


def small_cost(twin: str) -> Callable[[dict], quality.MetricEstimate]:
    """Statistic: LITTLE minus the share by which a twin's loss is above the encoder-decoder's."""

    def margin(changed: ExampleLosses, base: ExampleLosses) -> float:
        return LITTLE - (changed.loss() / base.loss() - 1)

    return lambda record: quality.estimate_statistic(
        margin, record["losses"][twin], record["losses"][BASE]
    )


def steeper_rise(twin: str) -> Callable[[dict], quality.MetricEstimate]:
    """Statistic: how much more a twin's loss rises beyond twice the length of training than the
    encoder-decoder's."""

    def statistic(record: dict) -> quality.MetricEstimate:
        first, *_, last = record["lengths"]

        def rise(losses: ExampleLosses) -> float:
            return losses.between(last + 1, math.inf).loss() - losses.between(1, first).loss()

        def difference(some: ExampleLosses, others: ExampleLosses) -> float:
            return rise(some) - rise(others)

        return quality.estimate_statistic(
            difference, record["losses"][twin], record["losses"][BASE]
        )

    return statistic


def time_ratio(
    share: Callable[[np.ndarray, np.ndarray], np.ndarray], rows: int = 1
) -> Callable[[dict], quality.MetricEstimate]:
    """Statistic: mean over turns of a quotient of times, in the case of the longest texts.

    Args:
      share: of the [turns 2] seconds to the first and last token of the encoder-decoder and of the
        causal decoder, which were timed in turns.
      rows: texts at once.
    """

    def statistic(record: dict) -> quality.MetricEstimate:
        cases = [each for each in record["speed"] if each["rows"] == rows]
        case = max((each["inputs"], each["outputs"]) for each in cases)
        turns = {
            each["twin"]: np.array(each["seconds"])
            for each in cases
            if (each["inputs"], each["outputs"]) == case
        }
        values = share(turns[BASE], turns["causal_decoder"])
        return quality.combine_estimates(values.tolist(), [[]] * len(values))

    return statistic


def first_token_gain(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the time to the first token that is saved, turn by turn."""
    return 1 - some[:, 0] / others[:, 0]


def throughput_ratio(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Quotient of tokens per second after the first token, turn by turn."""
    return (others[:, 1] - others[:, 0]) / (some[:, 1] - some[:, 0])


ROWS = {
    "length": ClaimRow(
        "beyond twice the length of training a decoder-only model degrades, an encoder-decoder "
        "smoothly",
        REDLLM,
        "",
        (BASE, "causal_decoder"),
        steeper_rise("causal_decoder"),
        "rise of the decoder's loss beyond twice that length, minus the encoder-decoder's, nats",
        lengths=True,
    ),
    "bidirectional_tuning": ClaimRow(
        "a decoder-only model gains by reading its inputs in both directions while it is tuned",
        REDLLM,
        "",
        (BASE, "causal_decoder", "tuned_prefix_decoder"),
        loss_gain("causal_decoder", "tuned_prefix_decoder"),
        "loss of the causal decoder minus that of the prefix LM, nats a token",
    ),
    "causal_encoder": ClaimRow(
        "a causal encoder costs quality",
        T5GEMMA,
        "4.1 points",
        (BASE, "causal_encoder"),
        loss_gain("causal_encoder", BASE),
        "loss of the causal encoder minus that of the bidirectional one, nats a token",
    ),
    "inference_flops": ClaimRow(
        "after tuning an encoder-decoder is better per inference FLOP",
        REDLLM,
        "",
        (BASE, "causal_decoder@inference"),
        loss_gain("causal_decoder@inference", BASE),
        "loss of the decoder minus that of the encoder-decoder, nats a token",
    ),
    "training_flops": ClaimRow(
        "a decoder-only model is better per training FLOP",
        REDLLM,
        "",
        (BASE, "causal_decoder@training"),
        loss_gain(BASE, "causal_decoder@training"),
        "loss of the encoder-decoder minus that of the decoder, nats a token",
    ),
    "first_token": ClaimRow(
        "below a billion parameters the first token comes 47 % sooner from an encoder-decoder",
        SMALL,
        "47 %",
        (BASE, "causal_decoder"),
        time_ratio(first_token_gain),
        "share of the decoder's time that is saved, one text at once",
        least=0.47,
        speed=True,
    ),
    "throughput": ClaimRow(
        "an encoder-decoder writes 4.7 times as many tokens per second",
        SMALL,
        "4.7 times",
        (BASE, "causal_decoder"),
        time_ratio(throughput_ratio),
        "quotient of tokens per second after the first, one text at once",
        least=4.7,
        speed=True,
    ),
    "deep_encoder": ClaimRow(
        "two thirds of the parameters belong in the encoder",
        SMALL,
        "2/3",
        (BASE, "shallow_decoder"),
        loss_gain(BASE, "shallow_decoder"),
        "loss of the even split minus that of the deeper encoder, nats a token",
    ),
    "averaging": ClaimRow(
        "the mean of the last weights is better than the last ones",
        "Vaswani et al., 2017, arXiv 1706.03762",
        "",
        (BASE, "averaged"),
        loss_gain(BASE, "averaged"),
        "loss of the last weights minus that of the mean of five, nats a token",
    ),
    "adapted": ClaimRow(
        "an encoder-decoder adapted from a decoder is better than one from scratch",
        T5GEMMA,
        "",
        (BASE, "adapted", "scratch"),
        loss_gain("scratch", "adapted"),
        "loss from scratch minus that of the adapted one, nats a token",
    ),
    "merged_attention": ClaimRow(
        "merged attention costs little",
        T5GEMMA2,
        "0.3 points",
        (BASE, "merged_attention"),
        small_cost("merged_attention"),
        f"{LITTLE:.0%} minus the share by which the loss is higher",
    ),
    "tied_embeddings": ClaimRow(
        "tied embeddings cost little",
        T5GEMMA2,
        "0.1 points",
        (BASE, "tied_embeddings"),
        small_cost("tied_embeddings"),
        f"{LITTLE:.0%} minus the share by which the loss is higher",
    ),
}


def check_rows(compare: config.Compare) -> None:
    """Raises ValueError for rows that a comparison cannot decide."""
    for name in compare.claims:
        config.require(
            name in ROWS, f"Compare.claims: there is no row {name!r}; {suggest(name, ROWS)}"
        )
        row = ROWS[name]
        config.require(
            not row.lengths or len(compare.lengths) > 1,
            f"Compare.claims: {name} needs Compare.lengths, the longest of training and twice that",
        )
        config.require(
            not row.speed or compare.repeats > 1,
            f"Compare.claims: {name} needs Compare.repeats of at least 2 to time twins in turns",
        )


def needed_twins(names: Sequence[str]) -> tuple[str, ...]:
    """The twins that rows need, the encoder-decoder first."""
    return tuple(dict.fromkeys([BASE, *(twin for name in names for twin in ROWS[name].twins)]))


class Decision(NamedTuple):
    """A row of the page, decided.

    Attributes:
      name: a key of ROWS.
      estimate: the statistic.
      p: two-sided p-value of the statistic being `least`; NaN where it has no interval.
      level: level of its test after Holm's correction.
      half: half of the interval of that level; NaN without one.
      verdict: "holds", "does not hold", or that it cannot be told.
    """

    name: str
    estimate: quality.MetricEstimate
    p: float
    level: float
    half: float
    verdict: str


def decide_rows(estimates: dict[str, quality.MetricEstimate], seeds: int) -> list[Decision]:
    """Decides all rows together: Holm's step-down test (1979), family-wise level LEVEL.

    The row with the k-th smallest of m p-values is tested at LEVEL / (m - k + 1); after the first
    that is not significant none is. The interval of that level excludes `least` where the test is
    significant.

    Args:
      estimates: the statistic of each row, keys of ROWS.
      seeds: runs of each twin; fewer than FEWEST_SEEDS decide nothing.
    """
    values = {name: p_value(each, ROWS[name].least) for name, each in estimates.items()}
    ranked = sorted(values, key=lambda name: (math.isnan(values[name]), values[name]))
    decisions, significant = {}, True
    for place, name in enumerate(ranked):
        level, estimate = LEVEL / (len(ranked) - place), estimates[name]
        significant = significant and values[name] <= level
        verdict = "cannot be told at this size"
        if seeds < FEWEST_SEEDS:
            verdict = f"cannot be told with {seeds} seed(s)"
        elif significant:
            verdict = "holds" if estimate.value > ROWS[name].least else "does not hold"
        half = interval_half(estimate, level)
        decisions[name] = Decision(name, estimate, values[name], level, half, verdict)
    return [decisions[name] for name in estimates]


def p_value(estimate: quality.MetricEstimate, least: float) -> float:
    """Two-sided p-value of Student's t for a statistic that is `least` in truth."""
    from scipy import stats

    if not estimate.error > 0:
        return math.nan
    t = (estimate.value - least) / estimate.error
    return float(2 * stats.t.sf(abs(t), estimate.freedom))


def interval_half(estimate: quality.MetricEstimate, level: float) -> float:
    """Half of the interval that covers with probability 1 - level."""
    from scipy import stats

    if not estimate.error > 0:
        return math.nan
    return float(stats.t.isf(level / 2, estimate.freedom) * estimate.error)
