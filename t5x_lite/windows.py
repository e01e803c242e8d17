# SPDX-License-Identifier: Apache-2.0
"""How long a window of running text may be, so that what an objective makes of it fits in a row.

Exact integer arithmetic without arrays: config checks it before anything is read, and
`data.objectives` cuts by the same numbers. `mode` is the number of tokens before the inputs that
name the denoiser, `sentinels` how many there are.
"""

from collections.abc import Callable
from typing import NamedTuple

from t5x_lite.denoising import CausalLM, FillInTheMiddle, Objective, PrefixLM, SpanCorruption

MARKS = 3  # of fill-in-the-middle: before the prefix, before the suffix, after both


class Lengths(NamedTuple):
    """An example has at most `inputs` and `targets` tokens; a row of what is predicted has `row`.

    `layout` is that of config.Model: a decoder alone has inputs and targets in one row.
    """

    inputs: int
    targets: int
    layout: str

    @property
    def row(self) -> int:
        return self.inputs + self.targets if self.layout == "joined" else self.targets


def lengths_of(lengths: dict[str, int], layout: str) -> Lengths:
    """Data.lengths for a layout; without "inputs" there are none."""
    return Lengths(lengths.get("inputs", 0), lengths["targets"], layout)


class Shape(NamedTuple):
    """Of a window of `tokens`: the lengths of what it becomes, ends included, and its spans."""

    tokens: int
    inputs: int
    targets: int
    spans: int


def noise_and_spans(
    tokens: int, noise_density: float, mean_span: float, most: int | None = None
) -> tuple[int, int]:
    """Hidden tokens and spans of a window, as T5 reckons them (random_spans_noise_mask of
    t5/data/preprocessors.py): one token at least is hidden and one left. No more than `most` spans.
    """
    noise = min(max(int(round(tokens * noise_density)), 1), tokens - 1)
    # No more spans than tokens on either side: each span needs one of both.
    spans = min(max(int(round(noise / mean_span)), 1), noise, tokens - noise)
    return noise, spans if most is None else min(spans, most)


def span_shape(objective: SpanCorruption, tokens: int, mode: int, sentinels: int) -> Shape:
    """What span corruption makes of a window: one sentinel per span and one end on each side."""
    most = sentinels if objective.overflow == "cap" else None
    noise, spans = noise_and_spans(tokens, objective.noise_density, objective.mean_span, most)
    return Shape(tokens, mode + tokens - noise + spans + 1, noise + spans + 1, spans)


def target_range(
    objective: PrefixLM | FillInTheMiddle, tokens: int, lengths: Lengths, mode: int
) -> tuple[int, int]:
    """The fewest and most tokens of a window that are targets; the number is drawn uniformly."""
    if isinstance(objective, PrefixLM) and objective.share is not None:
        if objective.split == "fixed":
            least = most = round(tokens * objective.share)
        else:
            # From 1 on, so that the mean is the share: (1 + most) / 2.
            least, most = 1, round(2 * tokens * objective.share) - 1
    else:
        inputs, targets = sides(objective, lengths, mode)
        least, most = tokens - inputs, targets
    return max(least, 1) if least < tokens else tokens - 1, min(max(most, 1), tokens - 1)


def sides(objective: Objective, lengths: Lengths, mode: int) -> tuple[int, int]:
    """The most tokens of text on either side once ends, marks and mode have their places."""
    marked = isinstance(objective, FillInTheMiddle)
    around, after = mode + (MARKS if marked else 0), 1 if marked else 0
    if lengths.layout == "joined":
        return (lengths.row - around - after,) * 2
    return lengths.inputs - around, lengths.targets - after


def window(objective: Objective, lengths: Lengths, mode: int = 0, sentinels: int = 0) -> int:
    """Tokens of the longest window of which every part fits; less than 2 where none does."""
    if lengths.layout == "aligned":
        return lengths.row - mode
    if isinstance(objective, SpanCorruption):
        fits = lambda tokens: within(span_shape(objective, tokens, mode, sentinels), lengths)
        return longest(fits, lengths.inputs + lengths.targets)
    inputs, targets = sides(objective, lengths, mode)
    if lengths.layout == "joined":
        return lengths.row if isinstance(objective, CausalLM) else inputs
    if min(inputs, targets) < 1:
        return 0
    if isinstance(objective, FillInTheMiddle):
        # One token is a target at least, so that as many as fit beside it are the inputs.
        return max(inputs, targets) + 1
    if objective.share is None:
        return max(inputs, targets)

    def fits(tokens: int) -> bool:
        least, most = target_range(objective, tokens, lengths, mode)
        return tokens - least <= inputs and most <= targets

    return longest(fits, lengths.inputs + lengths.targets)


def within(shape: Shape, lengths: Lengths) -> bool:
    return shape.inputs <= lengths.inputs and shape.targets <= lengths.targets


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 2..most that fits, 0 if none; whatever is shorter than one that fits, fits."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 2 else 0


def check_sentinels(objective: Objective, lengths: Lengths, mode: int, sentinels: int) -> None:
    """Raises ValueError if the objective needs more sentinels in its longest window."""
    if isinstance(objective, FillInTheMiddle) and objective.marks is None and sentinels < MARKS:
        raise ValueError(
            f"FillInTheMiddle needs {MARKS} sentinels, but the vocabulary has {sentinels}: set "
            f"Vocabulary.extra_ids to at least {MARKS}, or name FillInTheMiddle.marks"
        )
    if not isinstance(objective, SpanCorruption):
        return
    if sentinels < 1:
        raise ValueError("SpanCorruption needs a sentinel: set Vocabulary.extra_ids to at least 1")
    tokens = window(objective, lengths, mode, sentinels)
    if lengths.layout == "aligned" or tokens < 2:
        return
    spans = span_shape(objective, tokens, mode, sentinels).spans
    if spans > sentinels:
        raise ValueError(
            f"SpanCorruption({objective.noise_density:g}, {objective.mean_span:g}) hides {spans} "
            f"spans in {lengths.inputs} inputs, but the vocabulary has {sentinels} sentinels: set "
            f"Vocabulary.extra_ids to at least {spans}, shorten the inputs, or bind "
            'SpanCorruption.overflow = "cap", which makes the spans fewer and longer'
        )
