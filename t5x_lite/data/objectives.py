# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets cut from running text, by any objective of `config`.

A `Cutter` works on a batch of windows, a window being a row of token ids of equal length, and is
decided by one key per window. The batch builder and the seqio preprocessor share it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.config.objectives import Objective
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import objective_ids, randomness
from t5x_lite.data.name_windows import NameWindows, make_name_windows
from t5x_lite.data.ragged import Ragged, column, side_by_side
from t5x_lite.data.spans import corrupt, noise_mask
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none


@dataclass(frozen=True)
class WindowPreprocessor:
    """An objective for given lengths and a vocabulary.

    Attributes:
      objective: its config.
      lengths: limits of the rows.
      window: tokens of a window of text.
      eos: id of the end.
      sentinels: ids of the sentinels [k]; of a masked language model that of its mask [1].
      mode: ids of the mode that inputs begin with [m].
      marks: ids of fill-in-the-middle's marks [3].
      seam: ids between two examples whose ends are not tokens of the text [n].
      names: finds names in windows of code; None for an objective that reads none.
    """

    objective: Objective
    lengths: LengthLimits
    window: int
    eos: int
    sentinels: np.ndarray
    mode: np.ndarray
    marks: np.ndarray
    seam: np.ndarray
    names: NameWindows | None = None

    @property
    def joins_examples(self) -> bool:
        """True if a window may hold more than one example."""
        return getattr(self.objective, "join", None) != "never"

    @property
    def keeps_ends(self) -> bool:
        """True if the ends of examples are tokens of the text; denoising and infilling add their
        own ends."""
        return isinstance(self.objective, config.CausalLM | config.PrefixLM)

    @property
    def min_tokens(self) -> int:
        """Least tokens of text: room for one span of the mean length."""
        if isinstance(self.objective, config.SpanCorruption):
            return int(np.ceil(self.objective.mean_span)) + 1
        return 2

    def __call__(
        self, texts: np.ndarray, keys: np.ndarray
    ) -> tuple[Ragged | None, Ragged, np.ndarray | float]:
        """Returns inputs, targets and the targets' weights in the loss.

        Args:
          texts: windows of token ids [b t]; t is `window` or, for a last window, less.
          keys: one uint64 per window [b].
        """
        if self.lengths.layout == "encoder_only":
            if self.names is not None:
                return self.names.align(texts, keys, self.mode)
            return self.masked_lm(texts, keys)
        return *self.parts(texts, keys), 1.0

    def mask(self, tokens: int, keys: np.ndarray) -> np.ndarray:
        """Mask of the tokens of each window that are hidden [b t]."""
        objective = self.objective
        assert isinstance(objective, config.SpanCorruption)
        density, span = objective.noise_density, objective.mean_span
        capped = objective.overflow == "cap" and self.lengths.layout != "encoder_only"
        most = len(self.sentinels) if capped else None
        return noise_mask(tokens, *windows.noise_and_spans(tokens, density, span, most), keys)

    def masked_lm(self, texts: np.ndarray, keys: np.ndarray) -> tuple[Ragged, Ragged, np.ndarray]:
        """Returns inputs with each hidden token replaced by the mask, and the text with loss on the
        hidden tokens (the masked language model of an encoder, with T5's spans)."""
        mask = self.mask(texts.shape[1], keys)
        mode = np.tile(self.mode.astype(texts.dtype), (len(texts), 1))
        inputs = np.hstack([mode, np.where(mask, self.sentinels[0], texts)])
        lengths = np.full(len(texts), inputs.shape[1])
        return (
            Ragged(inputs.reshape(-1), lengths),
            Ragged(np.hstack([mode, texts]).reshape(-1), lengths),
            np.hstack([np.zeros(mode.shape), mask]).reshape(-1).astype(np.float32),
        )

    def parts(self, texts: np.ndarray, keys: np.ndarray) -> tuple[Ragged | None, Ragged]:
        """Returns inputs and targets of windows [b t], with one key per window [b]."""
        rows, tokens = texts.shape
        end = column(np.array([self.eos], texts.dtype), rows)
        match self.objective:
            case config.CausalLM():
                return None, Ragged(texts.reshape(-1), np.full(rows, tokens))
            case config.SpanCorruption():
                inputs, targets = corrupt(texts, self.mask(tokens, keys), self.sentinels)
                pair = side_by_side(inputs, end), side_by_side(targets, end)
            case config.PrefixLM():
                least, most = self.targets(tokens)
                pair = split_prefix(texts, tokens - most, tokens - least, keys)
            case config.FillInTheMiddle(order=order):
                middle = draw_middles(tokens, *self.targets(tokens), keys)
                inputs, targets = fill_in(texts, middle, self.marks.astype(texts.dtype), order)
                pair = inputs, side_by_side(targets, end)
            case config.MaskedNames() | config.NameTags():
                inputs, targets = not_none(self.names).cut(texts, keys)
                pair = side_by_side(inputs, end), side_by_side(targets, end)
        if not len(self.mode):
            return pair
        return side_by_side(column(self.mode.astype(texts.dtype), rows), pair[0]), pair[1]

    def targets(self, tokens: int) -> tuple[int, int]:
        """Returns the least and most tokens of a window that are targets."""
        assert isinstance(self.objective, config.PrefixLM | config.FillInTheMiddle)
        return windows.target_range(self.objective, tokens, self.lengths, len(self.mode))


def make_preprocessor(
    objective: Objective, lengths: LengthLimits, vocabulary: TextVocabulary
) -> WindowPreprocessor:
    """Binds an objective to the longest window whose inputs and targets fit the lengths.

    Args:
      objective: its config.
      lengths: limits of the rows.
      vocabulary: of the text.

    Raises:
      ValueError: no window fits, the objective does not suit the layout, or the vocabulary has too
        few sentinels.
    """
    name = type(objective).__name__
    check_layout(objective, lengths)
    mode = np.array(vocabulary.encode(getattr(objective, "mode", None) or ""), np.int32)
    sentinels = objective_ids.mask_id(objective, lengths, vocabulary)
    window = windows.longest_window(objective, lengths, len(mode), len(sentinels))
    if window < 2:
        raise ValueError(
            f"Data.lengths (inputs {lengths.inputs}, targets {lengths.targets}) are too short for "
            f"{name}: not even a window of 2 tokens fits"
        )
    windows.check_sentinels(objective, lengths, len(mode), len(sentinels))
    marks = objective_ids.marks_of(objective, vocabulary)
    seam = (
        objective_ids.newline_ids(vocabulary)
        if getattr(objective, "join", None) == "newline"
        else []
    )
    return WindowPreprocessor(
        objective=objective,
        lengths=lengths,
        window=window,
        eos=vocabulary.eos,
        sentinels=sentinels,
        mode=mode,
        marks=marks,
        seam=np.array(seam, np.int32),
        names=make_name_windows(objective, lengths, vocabulary, len(mode)),
    )


def check_layout(objective: Objective, lengths: LengthLimits) -> None:
    """Raises ValueError unless a model of the layout can be trained with the objective."""
    name = type(objective).__name__
    spans = isinstance(objective, config.SpanCorruption | config.MaskedNames | config.NameTags)
    if lengths.layout == "encoder_only" and not spans:
        raise ValueError(
            f"{name} is for a model with a decoder; an encoder alone, and a decoder whose "
            "layers are not causal, are trained with SpanCorruption, MaskedNames or NameTags"
        )
    if lengths.layout == "encoder_decoder" and isinstance(objective, config.CausalLM):
        raise ValueError("CausalLM leaves the encoder nothing to read: use PrefixLM")
    wants_inputs = lengths.layout == "encoder_decoder" or (
        spans and lengths.layout == "decoder_only"
    )
    if wants_inputs and not lengths.inputs:
        raise ValueError(f'{name} needs Data.lengths["inputs"]')


def denoisers(
    objective: Objective | config.Denoisers, vocabulary: TextVocabulary
) -> list[tuple[str, Objective, float]]:
    """Name, objective and share of the windows of each denoiser; a single objective has no name.

    Raises ValueError if two modes have the same ids.
    """
    if not isinstance(objective, config.Denoisers):
        return [("", objective, 1.0)]
    check_modes(objective, vocabulary)
    total, repeats, result = sum(objective.rates), Counter(), []
    for part, rate in zip(objective.parts, objective.rates, strict=True):
        name = objective_name(part)
        repeats[name] += 1
        number = f" {repeats[name]}" if repeats[name] > 1 else ""
        result.append((name + number, part, rate / total))
    return result


def check_modes(objective: config.Denoisers, vocabulary: TextVocabulary) -> None:
    """Raises ValueError if two modes have the same ids in this vocabulary, or one has none."""
    modes: set[Any] = {getattr(part, "mode", None) for part in objective.parts} - {None}
    coded: dict[tuple, str] = {}
    for mode in sorted(modes):
        ids = tuple(vocabulary.encode(mode))
        if ids in coded or not ids:
            raise ValueError(
                f"Denoisers.parts: the mode {mode!r} is "
                f"{f'the same ids as {coded[ids]!r}' if ids else 'no id at all'} in this "
                "vocabulary: add it to Vocabulary.names"
            )
        coded[ids] = mode


def objective_name(objective: Objective) -> str:
    """Name of an objective in reports, with its mode and numbers: "[NLU] spans 0.15 3"."""
    match objective:
        case config.SpanCorruption(density, span):
            name = f"spans {density:g} {span:g}"
        case config.PrefixLM(share, split):
            name = "prefix" if share is None else f"prefix {split} {share:g}"
        case config.FillInTheMiddle(order=order):
            name = f"middle {order}"
        case config.MaskedNames():
            name = "names"
        case config.NameTags():
            name = "name tags"
        case _:
            name = "causal"
    mode = getattr(objective, "mode", None)
    return name if mode is None else f"{mode} {name}"


def split_prefix(
    windows: np.ndarray, least: int, most: int, keys: np.ndarray
) -> tuple[Ragged, Ragged]:
    """Splits windows at a place drawn uniformly.

    Args:
      windows: token ids [b t].
      least: smallest length of the first part.
      most: greatest length of it.
      keys: one uint64 per window [b].
    """
    place = least + randomness.uniform(3, keys, most - least + 1)
    before = np.arange(windows.shape[1]) < place[:, None]
    return (
        Ragged(windows[before], place),
        Ragged(windows[~before], windows.shape[1] - place),
    )


def draw_middles(
    tokens: int, least: int, most: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Begin and length [b] of a random run of tokens, every run equally likely.

    Args:
      tokens: length of a window.
      least: smallest length of a run.
      most: greatest length of a run.
      keys: one uint64 per window [b].
    """
    lengths = np.arange(least, most + 1)
    # The number of places of each length.
    ends = np.cumsum(tokens - lengths + 1)
    # 53 bits: all integers that a float holds exactly, whatever the number of runs.
    share = (randomness.keys(4, keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    drawn = np.floor(share * ends[-1]).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    return ends[which] - 1 - drawn, lengths[which]


def fill_in(
    windows: np.ndarray, middle: tuple[np.ndarray, np.ndarray], marks: np.ndarray, order: str
) -> tuple[Ragged, Ragged]:
    """Prefix and suffix of each window with their marks, and the middle.

    Args:
      windows: token ids [b t].
      middle: begin and length of the middle of each window [b].
      marks: ids before the prefix, before the suffix, and after both [3].
      order: of prefix "p" and suffix "s" in the inputs; "m" is ignored.
    """
    begin, length = (each[:, None] for each in middle)
    place = np.arange(windows.shape[1])
    before, after = place < begin, place >= begin + length
    pieces = {
        "p": (column(marks[:1], len(windows)), select_tokens(windows, before)),
        "s": (column(marks[1:2], len(windows)), select_tokens(windows, after)),
    }
    around = [part for name in order.replace("m", "") for part in pieces[name]]
    inputs = side_by_side(*around, column(marks[2:], len(windows)))
    return inputs, select_tokens(windows, ~before & ~after)


def select_tokens(windows: np.ndarray, chosen: np.ndarray) -> Ragged:
    """Tokens of windows [b t] where `chosen` [b t] is true."""
    return Ragged(windows[chosen], chosen.sum(axis=1))
