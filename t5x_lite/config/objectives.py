# SPDX-License-Identifier: Apache-2.0
"""Config of objectives: which part of a text is hidden, and predicted.

Each cuts inputs and targets from a window of running text; `data.objectives` does the cutting.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    Checked,
    Positive,
    Range,
    ShareAboveZero,
    ShareBetween,
    require,
)

Join = Literal["newline", "nothing", "never"]


@dataclass(frozen=True)
class SpanCorruption(Checked):
    """T5's denoising: spans of the text are hidden, and are the targets.

    Attributes:
      noise_density: share of the tokens that is hidden.
      mean_span: mean length of a hidden span.
      mode: text before the inputs that names the denoiser (UL2's [NLU]); None has none.
      overflow: where a window needs more spans than the vocabulary has sentinels: fail, or cap the
        spans at that number, which makes them longer.
      join: what stands between two examples in a window: a newline, where the vocabulary has one
        and the first does not end in it; nothing, as in t5 (whose pieces begin with a space); or
        examples are never joined (t5's merge_examples_to_reduce_padding = False).
      mask: name of the token that stands for a hidden token of a masked language model (an encoder
        alone, or a decoder whose layers are not causal); None takes the first sentinel.
    """

    noise_density: ShareBetween = 0.15
    mean_span: Annotated[float, Range(1)] = 3.0
    mode: str | None = None
    overflow: Literal["fail", "cap"] = "fail"
    join: Join = "newline"
    mask: str | None = None


@dataclass(frozen=True)
class PrefixLM(Checked):
    """Text cut in two: its first part is the inputs, the rest the targets.

    Attributes:
      share: share of a window that is targets; None draws the cut uniformly.
      split: the share holds exactly (fixed), or on average (uniform: drawn up to twice the share).
      mode: text before the inputs that names the denoiser; None has none.
    """

    share: ShareBetween | None = None
    split: Literal["uniform", "fixed"] = "uniform"
    mode: str | None = None

    def check(self):
        require(
            self.split == "uniform" or self.share is not None,
            'PrefixLM.split = "fixed" needs PrefixLM.share, the share of the targets',
        )
        require(
            self.split == "fixed" or self.share is None or self.share <= 0.5,
            "PrefixLM.share above 0.5 cannot be the mean of a uniform split: bind PrefixLM.split = "
            '"fixed", or leave out the share',
        )


@dataclass(frozen=True)
class CausalLM(Checked):
    """All of the text is targets."""


@dataclass(frozen=True)
class FillInTheMiddle(Checked):
    """A middle drawn uniformly is the targets; the text around it, marked, is the inputs.

    Attributes:
      order: prefix, suffix, middle (psm), or suffix, prefix, middle (spm) (Bavarian et al., 2022).
      marks: names of the tokens before the prefix, before the suffix and after both; None takes
        the first three sentinels.
      mode: text before the inputs that names the denoiser; None has none.
      join: what stands between two examples in a window; see `SpanCorruption`.
    """

    order: Literal["psm", "spm"] = "psm"
    marks: tuple[str, ...] | None = None
    mode: str | None = None
    join: Join = "newline"

    def check(self):
        require(
            self.marks is None or len(self.marks) == 3,
            f"FillInTheMiddle.marks are three names (prefix, suffix, middle); got {self.marks}",
        )


@dataclass(frozen=True)
class MaskedNames(Checked):
    """Identifiers of Python code are hidden, all occurrences of one behind the same sentinel, and
    are the targets (CodeT5: Wang et al., 2021, section 3.2).

    A window that Python's tokenizer does not read has spans hidden instead; a line reports how many
    did. Keywords and what stands inside f-strings are no identifiers.

    Attributes:
      share: share of the identifiers of a window that is hidden, drawn anew for each window; those
        for which `Data.lengths` or the sentinels have no room stay.
      noise_density: share of the tokens of other windows that is hidden.
      mean_span: mean length of a hidden span of other windows.
      mode: text before the inputs that names the denoiser; None has none.
      join: what stands between two examples in a window; see `SpanCorruption`.
    """

    share: ShareAboveZero = 1.0
    noise_density: ShareBetween = 0.15
    mean_span: Annotated[float, Range(1)] = 3.0
    mode: str | None = None
    join: Join = "newline"


@dataclass(frozen=True)
class NameTags(Checked):
    """Every token of Python code is tagged: the second sentinel where it belongs to an identifier,
    and else the first (CodeT5's identifier tagging; Wang et al., 2021, section 3.2).

    An encoder alone predicts the tag at each token; a decoder writes them one after the other.
    Tokens of a window that Python's tokenizer does not read bear no loss in an encoder alone, and
    with a decoder are tagged as no identifier; a line reports how many windows these are.

    Attributes:
      mode: text before the inputs that names the denoiser; None has none.
      join: what stands between two examples in a window; see `SpanCorruption`.
    """

    mode: str | None = None
    join: Join = "newline"


@dataclass(frozen=True)
class Denoisers(Checked):
    """Several objectives at once (UL2).

    Attributes:
      parts: the objectives.
      rates: the proportion in which windows go to each.
    """

    parts: tuple[
        SpanCorruption | PrefixLM | CausalLM | FillInTheMiddle | MaskedNames | NameTags, ...
    ]
    rates: tuple[Positive, ...]

    def check(self):
        require(len(self.parts) > 0, "Denoisers.parts is empty")
        require(
            len(self.parts) == len(self.rates),
            f"Denoisers.rates needs one rate for each of the {len(self.parts)} parts; got "
            f"{len(self.rates)}",
        )


Objective = SpanCorruption | PrefixLM | CausalLM | FillInTheMiddle | MaskedNames | NameTags
# Objectives that read Python code.
OF_NAMES = MaskedNames | NameTags
