# SPDX-License-Identifier: Apache-2.0
"""Length of the windows of running text that an objective cuts, so that its examples fit in a row.

Exact integer arithmetic without arrays: config checks it before anything is read, and
`data.objectives` cuts by the same numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

from t5x_lite.config.objectives import (
    CausalLM,
    FillInTheMiddle,
    MaskedNames,
    NameTags,
    Objective,
    PrefixLM,
    SpanCorruption,
)

MARKS = 3  # tokens of fill-in-the-middle: before the prefix, before the suffix, after both


class LengthLimits(NamedTuple):
    """Room for an example, in tokens.

    Attributes:
      inputs: most tokens of its inputs.
      targets: most tokens of its targets.
      layout: that of config.Model; a decoder alone has inputs and targets in one row.
      negatives: true if rows have hard negatives, which are as long as targets.
      multiple: targets of examples are filled up with ends to a multiple of it.
    """

    inputs: int
    targets: int
    layout: str
    negatives: bool = False
    multiple: int = 1

    @property
    def row(self) -> int:
        """Most tokens of a row that is predicted."""
        return self.inputs + self.targets if self.layout == "decoder_only" else self.targets


def length_limits(lengths: dict[str, int], layout: str) -> LengthLimits:
    """Limits of Data.lengths for a layout; without "inputs", their limit is 0."""
    return LengthLimits(lengths.get("inputs", 0), lengths["targets"], layout)


class WindowShape(NamedTuple):
    """Lengths of the example that a window becomes, ends included.

    Attributes:
      tokens: tokens of the window.
      inputs: tokens of the inputs.
      targets: tokens of the targets.
      spans: hidden spans.
    """

    tokens: int
    inputs: int
    targets: int
    spans: int


def noise_and_spans(
    tokens: int, noise_density: float, mean_span: float, most: int | None = None
) -> tuple[int, int]:
    """Numbers of hidden tokens and of spans, as in T5 (random_spans_noise_mask of
    t5/data/preprocessors.py): at least one token is hidden and one is left.

    Args:
      tokens: tokens of the window.
      noise_density: share of them that is hidden.
      mean_span: mean length of a span.
      most: limit of the number of spans; None has none.
    """
    noise = min(max(int(round(tokens * noise_density)), 1), tokens - 1)
    # No more spans than tokens on either side: each span needs one of both.
    spans = min(max(int(round(noise / mean_span)), 1), noise, tokens - noise)
    return noise, spans if most is None else min(spans, most)


def span_shape(objective: SpanCorruption, tokens: int, mode: int, sentinels: int) -> WindowShape:
    """Shape of a window after span corruption: a sentinel per span, and an end on each side.

    Args:
      objective: the span corruption.
      tokens: tokens of the window.
      mode: number of tokens before the inputs that name the denoiser.
      sentinels: number of sentinels in the vocabulary.
    """
    most = sentinels if objective.overflow == "cap" else None
    noise, spans = noise_and_spans(tokens, objective.noise_density, objective.mean_span, most)
    return WindowShape(tokens, mode + tokens - noise + spans + 1, noise + spans + 1, spans)


def target_range(
    objective: PrefixLM | FillInTheMiddle, tokens: int, lengths: LengthLimits, mode: int
) -> tuple[int, int]:
    """Fewest and most tokens of a window that are targets; the number is drawn uniformly.

    Args:
      objective: what cuts the window.
      tokens: tokens of the window.
      lengths: limits of the row.
      mode: number of tokens before the inputs that name the denoiser.
    """
    if isinstance(objective, PrefixLM) and objective.share is not None:
        if objective.split == "fixed":
            least = most = round(tokens * objective.share)
        else:
            # From 1 on, so that the mean is the share: (1 + most) / 2.
            least, most = 1, round(2 * tokens * objective.share) - 1
    else:
        inputs, targets = side_limits(objective, lengths, mode)
        least, most = tokens - inputs, targets
    return max(least, 1) if least < tokens else tokens - 1, min(max(most, 1), tokens - 1)


def side_limits(objective: Objective, lengths: LengthLimits, mode: int) -> tuple[int, int]:
    """Most tokens of text in inputs and targets, beside ends, marks and mode.

    Args:
      objective: what cuts the window.
      lengths: limits of the row.
      mode: number of tokens before the inputs that name the denoiser.
    """
    marked = isinstance(objective, FillInTheMiddle)
    around, after = mode + (MARKS if marked else 0), 1 if marked else 0
    if lengths.layout == "decoder_only":
        most = lengths.row - around - after
        return most, most
    return lengths.inputs - around, lengths.targets - after


def longest_window(
    objective: Objective, lengths: LengthLimits, mode: int = 0, sentinels: int = 0
) -> int:
    """Tokens of the longest window whose inputs and targets always fit; less than 2 if none does.

    Args:
      objective: what cuts the window.
      lengths: limits of the row.
      mode: number of tokens before the inputs that name the denoiser.
      sentinels: number of sentinels in the vocabulary.
    """
    if lengths.layout == "encoder_only":
        return lengths.row - mode
    if isinstance(objective, SpanCorruption):

        def fits(tokens: int) -> bool:
            return fits_within(span_shape(objective, tokens, mode, sentinels), lengths)

        return largest_fitting(fits, lengths.inputs + lengths.targets)
    if isinstance(objective, NameTags):
        return min(lengths.inputs - mode, lengths.targets) - 1
    if isinstance(objective, MaskedNames):
        spans = spans_instead(objective)

        def holds(tokens: int) -> bool:
            shape = span_shape(spans, tokens, mode, sentinels)
            return fits_within(shape._replace(inputs=mode + tokens + 1), lengths)

        return largest_fitting(holds, lengths.inputs)
    inputs, targets = side_limits(objective, lengths, mode)
    if lengths.layout == "decoder_only":
        return lengths.row if isinstance(objective, CausalLM) else inputs
    if min(inputs, targets) < 1:
        return 0
    assert not isinstance(objective, CausalLM)
    if isinstance(objective, FillInTheMiddle):
        # One token is a target at least, so that as many as fit beside it are the inputs.
        return max(inputs, targets) + 1
    if objective.share is None:
        return max(inputs, targets)

    def fits(tokens: int) -> bool:
        least, most = target_range(objective, tokens, lengths, mode)
        return tokens - least <= inputs and most <= targets

    return largest_fitting(fits, lengths.inputs + lengths.targets)


def spans_instead(objective: MaskedNames) -> SpanCorruption:
    """The span corruption of windows that are no Python code."""
    return SpanCorruption(objective.noise_density, objective.mean_span, overflow="cap")


def fits_within(shape: WindowShape, lengths: LengthLimits) -> bool:
    """Returns whether inputs and targets fit."""
    return shape.inputs <= lengths.inputs and shape.targets <= lengths.targets


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """Largest of 2..most that fits, 0 if none; all below one that fits have to fit too."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 2 else 0


def check_sentinels(objective: Objective, lengths: LengthLimits, mode: int, sentinels: int) -> None:
    """Raises ValueError if the objective needs more sentinels in its longest window.

    Args:
      objective: what cuts the windows.
      lengths: limits of the row.
      mode: number of tokens before the inputs that name the denoiser.
      sentinels: number of sentinels in the vocabulary.
    """
    if isinstance(objective, FillInTheMiddle) and objective.marks is None and sentinels < MARKS:
        raise ValueError(
            f"FillInTheMiddle needs {MARKS} sentinels, but the vocabulary has {sentinels}: set "
            f"Vocabulary.extra_ids to at least {MARKS}, name pieces that are there by "
            'Vocabulary.sentinels = "<unused{}>", or name FillInTheMiddle.marks'
        )
    least = {MaskedNames: 1, NameTags: 2}.get(type(objective), 0)
    if sentinels < least:
        raise ValueError(
            f"{type(objective).__name__} needs {least} of the sentinels <extra_id_0>, "
            f"<extra_id_1> ..., and the vocabulary has {sentinels}: set Vocabulary.extra_ids to at "
            f"least {least}, or name pieces that are there by "
            'Vocabulary.sentinels = "<unused{}>"'
        )
    if not isinstance(objective, SpanCorruption):
        return
    if sentinels < 1 and objective.mask is None:
        raise ValueError(
            "SpanCorruption needs a sentinel, and the vocabulary has none named <extra_id_0>: set "
            "Vocabulary.extra_ids to at least 1, or name pieces that are there by "
            'Vocabulary.sentinels = "<unused{}>"'
        )
    tokens = longest_window(objective, lengths, mode, sentinels)
    if lengths.layout == "encoder_only" or tokens < 2 or sentinels < 1:
        return
    spans = span_shape(objective, tokens, mode, sentinels).spans
    if spans > sentinels:
        raise ValueError(
            f"SpanCorruption({objective.noise_density:g}, {objective.mean_span:g}) hides {spans} "
            f"spans in {lengths.inputs} inputs, but the vocabulary has {sentinels} sentinels: set "
            f"Vocabulary.extra_ids to at least {spans}, shorten the inputs, or bind "
            'SpanCorruption.overflow = "cap", which makes the spans fewer and longer'
        )
