# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets cut from running text, by any objective of `config`.

A `Cutter` works on a batch of windows, a window being a row of token ids of equal length, and is
decided by one key per window. The batch builder and the seqio preprocessor share it.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from t5x_lite import config, windows
from t5x_lite.data import spans, splits
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.ragged import Ragged, column, side_by_side
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.denoising import Objective


@dataclass(frozen=True)
class Cutter:
    """An objective fitted to lengths and a vocabulary: it wants windows of `window` tokens.

    `sentinels` [k], `mode` [m] and `marks` [3] (of fill-in-the-middle) are ids.
    """

    objective: Objective
    lengths: Lengths
    window: int
    eos: int
    sentinels: np.ndarray
    mode: np.ndarray
    marks: np.ndarray

    @property
    def runs_on(self) -> bool:
        """Whether the ends of examples are tokens of the text; denoising and infilling set their
        own ends."""
        return not isinstance(self.objective, config.SpanCorruption | config.FillInTheMiddle)

    @property
    def least(self) -> int:
        """The fewest tokens of text there must be: room for one span of the mean length."""
        if isinstance(self.objective, config.SpanCorruption):
            return int(np.ceil(self.objective.mean_span)) + 1
        return 2

    def __call__(
        self, texts: np.ndarray, keys: np.ndarray
    ) -> tuple[Ragged | None, Ragged, np.ndarray | float]:
        """Inputs, targets and the targets' weights in the loss, of windows [b t]; t is `window`
        or, for a last piece, less."""
        if self.lengths.layout == "aligned":
            return self.masked(texts, keys)
        return *self.parts(texts, keys), 1.0

    def mask(self, tokens: int, keys: np.ndarray) -> np.ndarray:
        """Which tokens of each window are hidden [b t]."""
        density, span = self.objective.noise_density, self.objective.mean_span
        capped = self.objective.overflow == "cap" and self.lengths.layout != "aligned"
        most = len(self.sentinels) if capped else None
        return spans.noise_mask(tokens, *windows.noise_and_spans(tokens, density, span, most), keys)

    def masked(self, texts: np.ndarray, keys: np.ndarray) -> tuple[Ragged, Ragged, np.ndarray]:
        """Each hidden token replaced by the first sentinel, and only those to be predicted (the
        masked language model of an encoder, with T5's spans)."""
        mask = self.mask(texts.shape[1], keys)
        told = np.tile(self.mode.astype(texts.dtype), (len(texts), 1))
        read = np.hstack([told, np.where(mask, self.sentinels[0], texts)])
        lengths = np.full(len(texts), read.shape[1])
        return (
            Ragged(read.reshape(-1), lengths),
            Ragged(np.hstack([told, texts]).reshape(-1), lengths),
            np.hstack([np.zeros(told.shape), mask]).reshape(-1).astype(np.float32),
        )

    def parts(self, texts: np.ndarray, keys: np.ndarray) -> tuple[Ragged | None, Ragged]:
        """Inputs and targets of windows [b t]."""
        rows, tokens = texts.shape
        end = column(np.array([self.eos], texts.dtype), rows)
        match self.objective:
            case config.CausalLM():
                return None, Ragged(texts.reshape(-1), np.full(rows, tokens))
            case config.SpanCorruption():
                read, asked = spans.corrupt(texts, self.mask(tokens, keys), self.sentinels)
                pair = side_by_side(read, end), side_by_side(asked, end)
            case config.PrefixLM():
                least, most = self.targets(tokens)
                pair = splits.cut(texts, tokens - most, tokens - least, keys)
            case config.FillInTheMiddle(order=order):
                middle = splits.middles(tokens, *self.targets(tokens), keys)
                read, asked = splits.fill_in(texts, middle, self.marks.astype(texts.dtype), order)
                pair = read, side_by_side(asked, end)
        if not len(self.mode):
            return pair
        return side_by_side(column(self.mode.astype(texts.dtype), rows), pair[0]), pair[1]

    def targets(self, tokens: int) -> tuple[int, int]:
        """The fewest and most tokens of a window that are targets."""
        return windows.target_range(self.objective, tokens, self.lengths, len(self.mode))


def cutter(objective: Objective, lengths: Lengths, vocabulary: Vocabulary) -> Cutter:
    """The objective with the longest window whose inputs and targets fit the lengths.

    Raises ValueError if none fits, the layout has no place for it, or the vocabulary has too few
    sentinels.
    """
    name = type(objective).__name__
    check_layout(objective, lengths)
    mode = np.array(vocabulary.encode(getattr(objective, "mode", None) or ""), np.int32)
    sentinels = vocabulary.sentinel_ids
    window = windows.window(objective, lengths, len(mode), len(sentinels))
    if window < 2:
        told = f"inputs {lengths.inputs}, targets {lengths.targets}"
        raise ValueError(
            f"Data.lengths ({told}) are too short for {name}: not even a window of 2 tokens fits"
        )
    windows.check_sentinels(objective, lengths, len(mode), len(sentinels))
    marks = marks_of(objective, vocabulary)
    return Cutter(objective, lengths, window, vocabulary.eos, sentinels, mode, marks)


def check_layout(objective: Objective, lengths: Lengths) -> None:
    """Raises ValueError unless a model of the layout can be trained so."""
    name, spans = type(objective).__name__, isinstance(objective, config.SpanCorruption)
    if lengths.layout == "aligned" and not spans:
        raise ValueError(
            f"{name} is for a model with a decoder; an encoder alone is trained with SpanCorruption"
        )
    if lengths.layout == "pair" and isinstance(objective, config.CausalLM):
        raise ValueError("CausalLM leaves the encoder nothing to read: use PrefixLM")
    wants_inputs = lengths.layout == "pair" or (spans and lengths.layout == "joined")
    if wants_inputs and not lengths.inputs:
        raise ValueError(f'{name} needs Data.lengths["inputs"]')


def marks_of(objective: Objective, vocabulary: Vocabulary) -> np.ndarray:
    """Ids of fill-in-the-middle's marks [3]: before the prefix, before the suffix, after both.

    Raises ValueError for a mark that is not one id.
    """
    if not isinstance(objective, config.FillInTheMiddle) or objective.marks is None:
        return vocabulary.sentinel_ids[: windows.MARKS]
    coded = [vocabulary.encode(name) for name in objective.marks]
    for name, ids in zip(objective.marks, coded, strict=True):
        if len(ids) != 1:
            raise ValueError(
                f"FillInTheMiddle.marks: {name!r} is {len(ids)} ids, not one: add it to "
                "Vocabulary.names, or leave marks out and sentinels are used"
            )
    return np.array(coded, np.int32).reshape(-1)


def denoisers(
    objective: Objective | config.Denoisers, vocabulary: Vocabulary
) -> list[tuple[str, Objective, float]]:
    """Name, objective and share of the windows of each denoiser; an objective alone has no name.

    Raises ValueError if two modes are the same ids.
    """
    if not isinstance(objective, config.Denoisers):
        return [("", objective, 1.0)]
    check_modes(objective, vocabulary)
    total, seen, found = sum(objective.rates), Counter(), []
    for part, rate in zip(objective.parts, objective.rates, strict=True):
        name = name_of(part)
        seen[name] += 1
        number = f" {seen[name]}" if seen[name] > 1 else ""
        found.append((name + number, part, rate / total))
    return found


def check_modes(objective: config.Denoisers, vocabulary: Vocabulary) -> None:
    """Raises ValueError where a vocabulary without such names makes two modes one."""
    modes = {getattr(part, "mode", None) for part in objective.parts} - {None}
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


def name_of(objective: Objective) -> str:
    """What a person calls the objective, with its mode and numbers: "[NLU] spans 0.15 3"."""
    match objective:
        case config.SpanCorruption(density, span):
            name = f"spans {density:g} {span:g}"
        case config.PrefixLM(share, split):
            name = "prefix" if share is None else f"prefix {split} {share:g}"
        case config.FillInTheMiddle(order=order):
            name = f"middle {order}"
        case _:
            name = "causal"
    mode = getattr(objective, "mode", None)
    return name if mode is None else f"{mode} {name}"
