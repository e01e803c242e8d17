# SPDX-License-Identifier: Apache-2.0
"""What a comparison says in words: which twins differ beyond noise, and what is published."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from t5x_lite.comparison import quality

BASE = "encoder_decoder"


class Claim(NamedTuple):
    """A published statement, where it stands, and what these measurements say to it."""

    text: str
    source: str
    found: str


def spoken(name: str) -> str:
    return {"encoder_decoder": "encoder-decoder"}.get(name, name.replace("_", " "))


def told(found: quality.Estimate, form: str = "+.3g") -> str:
    """A number with the half of its 95 % interval where there is one."""
    known = math.isfinite(found.half)
    return f"{found.value:{form}} ± {found.half:.2g}" if known else f"{found.value:{form}}"


def differences(measured: dict[str, list[dict]], metrics: Sequence[str]) -> list[str]:
    """A sentence for each metric and twin beside the encoder-decoder."""
    sentences = []
    for metric in metrics:
        for name in measured:
            if name == BASE or not shared(measured, name, metric):
                continue
            gap = quality.difference(measured[name], measured[BASE], metric)
            sentences.append(sentence(metric, name, gap))
    return sentences


def shared(measured: dict[str, list[dict]], name: str, metric: str) -> bool:
    return all(metric in each["metrics"] for each in measured[name] + measured[BASE])


def sentence(metric: str, name: str, gap: quality.Estimate) -> str:
    """What a gap (twin minus encoder-decoder) says."""
    if math.isnan(gap.half):
        return f"{metric}: {spoken(name)} {gap.value:+.3g}; one seed tells no interval of it"
    interval = f"{gap.value:+.3g} (95 % interval {gap.value - gap.half:+.3g} to "
    interval += f"{gap.value + gap.half:+.3g})"
    if not gap.beyond_noise:
        return (
            f"{metric}: {spoken(name)} and encoder-decoder do not differ beyond noise, {interval}"
        )
    better = (gap.value < 0) == (metric in quality.LESS_IS_BETTER)
    word = "better" if better else "worse"
    return f"{metric}: {spoken(name)} is {word} than the encoder-decoder, {interval}"


def rounding(runs: Sequence[dict], name: str, metric: str) -> quality.Estimate:
    """What rounding weights in that way adds to a metric of a twin's runs."""
    return quality.difference([run["quantised"][name] for run in runs], runs, metric)


def roundings(measured: dict[str, list[dict]], metrics: Sequence[str]) -> list[str]:
    """A sentence for each twin, way of rounding and metric that it harms beyond noise."""
    sentences = []
    for twin, runs in measured.items():
        for name in runs[0]["quantised"]:
            gaps = {metric: rounding(runs, name, metric) for metric in metrics}
            harmed = [
                f"{metric} {told(gap)}"
                for metric, gap in gaps.items()
                if gap.beyond_noise and (gap.value > 0) == (metric in quality.LESS_IS_BETTER)
            ]
            if harmed:
                sentences.append(f"{name} harms the {spoken(twin)}: " + ", ".join(harmed))
    return sentences


def published(record: dict) -> list[Claim]:
    """The published claims beside what was measured here."""
    return [
        few_bits(record["quality"], record["metrics"]),
        first_token(record["speed"]),
        throughput(record["speed"]),
        padding(record["padding"]),
        shallow(record["speed"]),
    ]


def few_bits(measured: dict[str, list[dict]], metrics: Sequence[str]) -> Claim:
    name, others = "int4_activations", "causal_decoder"
    there = {BASE, others} <= measured.keys() and name in measured[BASE][0]["quantised"]
    found = []
    for metric in metrics if there else ():
        gaps = [rounding(measured[twin], name, metric) for twin in (BASE, others)]
        found.append(f"{metric} {' and '.join(map(told, gaps))}")
    return Claim(
        "weights and activations in 4 bits hurt a decoder, and hardly an encoder-decoder",
        "Wu et al., 2023, arXiv 2301.12017",
        "encoder-decoder and causal decoder: " + "; ".join(found)
        if found
        else "not measured: no causal decoder, or int4_activations not asked for",
    )


def first_token(speed: Sequence[dict]) -> Claim:
    found = []
    for case, here in by_case(speed).items():
        if {BASE, "causal_decoder"} <= here.keys() and case[0] == 1:
            ratio = here[BASE]["first_token_ms"] / here["causal_decoder"]["first_token_ms"]
            found.append(f"{1 - ratio:+.0%} at {case[1]} ids in and {case[2]} out")
    return Claim(
        "below a billion parameters, on edge devices, an encoder-decoder's first token comes 47 % "
        "sooner",
        "Elfeki et al., 2025, arXiv 2501.16273",
        "lower by " + "; ".join(found) if found else "not measured: no causal decoder, one at once",
    )


def throughput(speed: Sequence[dict]) -> Claim:
    found = []
    for case, here in by_case(speed).items():
        if {BASE, "causal_decoder"} <= here.keys():
            pair = [here[twin]["tokens_per_second"] for twin in (BASE, "causal_decoder")]
            times = "lost in noise" if None in pair else f"{pair[0] / pair[1]:.2f} times"
            found.append(f"{times} at {case[0]} x ({case[1]} in, {case[2]} out)")
    return Claim(
        "and it writes 4.7 times as many tokens per second",
        "Elfeki et al., 2025, arXiv 2501.16273",
        "; ".join(found) if found else "not measured: no causal decoder",
    )


def padding(shares: dict[str, float]) -> Claim:
    found = "; ".join(f"{share:.0%} filled up {how}" for how, share in shares.items())
    return Claim(
        "more than half of all tokens are padding without bucketing or packing",
        "claimed of encoder-decoder training; lengths of this task's training examples",
        found,
    )


def shallow(speed: Sequence[dict]) -> Claim:
    found = []
    for case, here in by_case(speed).items():
        if {BASE, "shallow_decoder"} <= here.keys():
            ratio = here[BASE]["last_token_ms"] / here["shallow_decoder"]["last_token_ms"]
            found.append(f"{ratio:.2f} times at {case[0]} x ({case[1]} in, {case[2]} out)")
    return Claim(
        "moving parameters from decoder to encoder answers 3 times as fast",
        "Kasai et al., 2021, arXiv 2006.10369, and the makers of small translators since",
        "; ".join(found) if found else "not measured: no shallow decoder",
    )


def by_case(speed: Sequence[dict]) -> dict[tuple[int, int, int], dict[str, dict]]:
    """Rows of the speed table by (rows, inputs, outputs) and twin."""
    found: dict[tuple[int, int, int], dict[str, dict]] = {}
    for each in speed:
        case = (each["rows"], each["inputs"], each["outputs"])
        found.setdefault(case, {})[each["twin"]] = each
    return found
