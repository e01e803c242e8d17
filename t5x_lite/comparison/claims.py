# SPDX-License-Identifier: Apache-2.0
"""Findings of a comparison in sentences: differences beyond noise, and published claims."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from t5x_lite.comparison import quality
from t5x_lite.evaluation.metrics import LESS_IS_BETTER

BASE = "encoder_decoder"


class Claim(NamedTuple):
    """A published claim beside the measurements of this comparison.

    Attributes:
      text: the claim.
      source: its publication.
      measured: the measurements here, in words.
    """

    text: str
    source: str
    measured: str


def twin_label(name: str) -> str:
    """Name of a twin in prose."""
    return {"encoder_decoder": "encoder-decoder"}.get(name, name.replace("_", " "))


def format_estimate(estimate: quality.MetricEstimate, form: str = "+.3g") -> str:
    """Formats a value, with half of its 95 % interval if that is known."""
    value = f"{estimate.value:{form}}"
    return f"{value} ± {estimate.half:.2g}" if math.isfinite(estimate.half) else value


def verdict(measured: dict[str, list[dict]], metrics: Sequence[str]) -> list[str]:
    """The result in one or two sentences, by the leading metric; or that nothing was learned."""
    unlearned = [twin for twin in measured if learned_nothing(measured[twin])]
    if len(unlearned) == len(measured):
        return [
            "Nothing was learned: by every rate and score all twins are at the worst. Train longer "
            "(TRAIN_STEPS) or on other data; the tables compare noise."
        ]
    sentences = [f"The {twin_label(twin)} learned nothing." for twin in unlearned]
    metric = next((name for name in quality.LEADING if name in metrics), None)
    if metric is None:
        return sentences
    base = quality.estimate_metric(measured[BASE], metric).value
    for twin in measured:
        if twin == BASE or twin in unlearned or not has_metric(measured, twin, metric):
            continue
        gap = quality.estimate_difference(measured[twin], measured[BASE], metric)
        word = compare_word(metric, gap)
        sentences.append(
            f"By {metric} ({quality.metric_unit(metric)}) the {twin_label(twin)} {word} the "
            f"encoder-decoder: {base + gap.value:.4g} against {base:.4g}."
        )
    if len(measured[BASE]) == 1:
        sentences.append("One run each: another seed may turn this around.")
    return sentences


def learned_nothing(runs: Sequence[dict]) -> bool:
    """True if all rates and scores of a twin are at the worst, in every run."""
    values = [pair for run in runs for pair in run["metrics"].items()]
    rates = [pair for pair in values if quality.UNITS.get(pair[0], "").startswith(("%", "0"))]
    written = [pair for pair in rates if pair[0] != "accuracy"] or rates
    return bool(written) and all(quality.is_worst(*pair) for pair in written)


def compare_word(metric: str, gap: quality.MetricEstimate) -> str:
    """The verb of a comparison with the encoder-decoder: is better than, does not differ from."""
    if math.isnan(gap.half) or not gap.beyond_noise:
        return "does not differ beyond noise from"
    better = (gap.value < 0) == (metric in LESS_IS_BETTER)
    return "is better than" if better else "is worse than"


def describe_differences(measured: dict[str, list[dict]], metrics: Sequence[str]) -> list[str]:
    """A sentence for each metric and each twin other than the encoder-decoder."""
    sentences = []
    for metric in metrics:
        values = [
            each["metrics"][metric]
            for runs in measured.values()
            for each in runs
            if metric in each["metrics"]
        ]
        if all(quality.is_worst(metric, value) for value in values):
            sentences.append(f"{metric}: nothing to compare, every twin is at the worst")
            continue
        for name in measured:
            if name == BASE or not has_metric(measured, name, metric):
                continue
            gap = quality.estimate_difference(measured[name], measured[BASE], metric)
            sentences.append(describe_gap(metric, name, gap, len(measured[name])))
    return sentences


def has_metric(measured: dict[str, list[dict]], name: str, metric: str) -> bool:
    """True if every run of a twin and of the encoder-decoder has the metric.

    Args:
      measured: measurements of each run, by twin.
      name: name of the twin.
      metric: name of the metric.
    """
    return all(metric in each["metrics"] for each in measured[name] + measured[BASE])


def describe_gap(metric: str, name: str, gap: quality.MetricEstimate, seeds: int) -> str:
    """Describes a difference from the encoder-decoder.

    Args:
      metric: name of the metric.
      name: name of the twin.
      gap: twin minus encoder-decoder.
      seeds: number of runs of each twin.
    """
    if math.isnan(gap.half):
        return f"{metric}: {twin_label(name)} {gap.value:+.3g}; one seed gives no interval"
    scope = "other test examples, not other runs" if seeds == 1 else "other runs and test examples"
    interval = f"{gap.value:+.3g} (95 % interval for {scope}: {gap.value - gap.half:+.3g} to "
    interval += f"{gap.value + gap.half:+.3g})"
    if not gap.beyond_noise:
        pair = f"{twin_label(name)} and encoder-decoder"
        return f"{metric}: {pair} do not differ beyond noise, {interval}"
    better = (gap.value < 0) == (metric in LESS_IS_BETTER)
    word = "better" if better else "worse"
    return f"{metric}: {twin_label(name)} is {word} than the encoder-decoder, {interval}"


def rounding_effect(runs: Sequence[dict], name: str, metric: str) -> quality.MetricEstimate:
    """Change of a metric by rounding the weights of a twin.

    Args:
      runs: measurements of the twin's runs.
      name: kind of rounding, from Compare.quantized.
      metric: name of the metric.
    """
    return quality.estimate_difference([run["quantized"][name] for run in runs], runs, metric)


def describe_roundings(measured: dict[str, list[dict]], metrics: Sequence[str]) -> list[str]:
    """A sentence for each twin and kind of rounding that harms metrics beyond noise."""
    sentences = []
    for twin, runs in measured.items():
        for name in runs[0]["quantized"]:
            gaps = {metric: rounding_effect(runs, name, metric) for metric in metrics}
            harmed = [
                f"{metric} {format_estimate(gap)}"
                for metric, gap in gaps.items()
                if gap.beyond_noise and (gap.value > 0) == (metric in LESS_IS_BETTER)
            ]
            if harmed:
                sentences.append(f"{name} harms the {twin_label(twin)}: " + ", ".join(harmed))
    return sentences


def published_claims(record: dict) -> list[Claim]:
    """The published claims, each with the measurements here."""
    return [
        quantization_claim(record["quality"], record["metrics"]),
        first_token_claim(record["speed"]),
        throughput_claim(record["speed"]),
        padding_claim(record["padding"]),
        shallow_decoder_claim(record["speed"]),
    ]


def quantization_claim(measured: dict[str, list[dict]], metrics: Sequence[str]) -> Claim:
    """Claim about 4-bit weights and activations."""
    name, others = "int4_activations", "causal_decoder"
    there = {BASE, others} <= measured.keys() and name in measured[BASE][0]["quantized"]
    measurements = []
    for metric in metrics if there else ():
        gaps = [rounding_effect(measured[twin], name, metric) for twin in (BASE, others)]
        measurements.append(f"{metric} {' and '.join(map(format_estimate, gaps))}")
    return Claim(
        "weights and activations in 4 bits hurt a decoder, and hardly an encoder-decoder",
        "Wu et al., 2023, arXiv 2301.12017",
        "encoder-decoder and causal decoder: " + "; ".join(measurements)
        if measurements
        else "not measured: no causal decoder, or int4_activations not in Compare.quantized",
    )


def first_token_claim(speed: Sequence[dict]) -> Claim:
    """Claim about the time to the first token."""
    measurements = []
    for case, here in group_by_case(speed).items():
        if {BASE, "causal_decoder"} <= here.keys() and case[0] == 1:
            ratio = here[BASE]["first_token_ms"] / here["causal_decoder"]["first_token_ms"]
            measurements.append(f"{1 - ratio:+.0%} at {case[1]} ids in and {case[2]} out")
    return Claim(
        "below a billion parameters, on edge devices, an encoder-decoder's first token comes 47 % "
        "sooner",
        "Elfeki et al., 2025, arXiv 2501.16273",
        "lower by " + "; ".join(measurements)
        if measurements
        else "not measured: no causal decoder, one at once",
    )


def throughput_claim(speed: Sequence[dict]) -> Claim:
    """Claim about tokens per second."""
    measurements = []
    for case, here in group_by_case(speed).items():
        if {BASE, "causal_decoder"} <= here.keys():
            pair = [here[twin]["tokens_per_second"] for twin in (BASE, "causal_decoder")]
            times = "lost in noise" if None in pair else f"{pair[0] / pair[1]:.2f} times"
            measurements.append(f"{times} at {case[0]} x ({case[1]} in, {case[2]} out)")
    return Claim(
        "and it writes 4.7 times as many tokens per second",
        "Elfeki et al., 2025, arXiv 2501.16273",
        "; ".join(measurements) if measurements else "not measured: no causal decoder",
    )


def padding_claim(shares: dict[str, float]) -> Claim:
    """Claim about padding."""
    measurements = "; ".join(f"{share:.0%} padded {method}" for method, share in shares.items())
    return Claim(
        "more than half of all tokens are padding without bucketing or packing",
        "claimed of encoder-decoder training; lengths of this task's training examples",
        measurements,
    )


def shallow_decoder_claim(speed: Sequence[dict]) -> Claim:
    """Claim about the time to the last token of a shallow decoder."""
    measurements = []
    for case, here in group_by_case(speed).items():
        if {BASE, "shallow_decoder"} <= here.keys():
            ratio = here[BASE]["last_token_ms"] / here["shallow_decoder"]["last_token_ms"]
            measurements.append(f"{ratio:.2f} times at {case[0]} x ({case[1]} in, {case[2]} out)")
    return Claim(
        "moving parameters from decoder to encoder answers 3 times as fast",
        "Kasai et al., 2021, arXiv 2006.10369, and the makers of small translators since",
        "; ".join(measurements) if measurements else "not measured: no shallow decoder",
    )


def group_by_case(speed: Sequence[dict]) -> dict[tuple[int, int, int], dict[str, dict]]:
    """Rows of the speed table by (rows, inputs, outputs) and twin."""
    groups: dict[tuple[int, int, int], dict[str, dict]] = {}
    for each in speed:
        case = (each["rows"], each["inputs"], each["outputs"])
        groups.setdefault(case, {})[each["twin"]] = each
    return groups
