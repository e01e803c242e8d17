# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets cut from running text: span corruption, prefix LM, causal LM.

Every function works on a batch of windows, a window being a row of token ids of equal length, and
is decided by one key per window. The batch builder and the seqio preprocessor share them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.data import randomness
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.vocabularies import Vocabulary

Objective = config.SpanCorruption | config.PrefixLM | config.CausalLM


class Shape(NamedTuple):
    """Of a window of `tokens`: the lengths of what it becomes, ends included, and its spans."""

    tokens: int
    inputs: int
    targets: int
    spans: int


class Ragged(NamedTuple):
    """Rows of different lengths, end to end."""

    tokens: np.ndarray
    lengths: np.ndarray


def spans_of(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and spans of a window (random_spans_helper of t5/data/preprocessors.py)."""
    noise = int(round(tokens * noise_density))
    return noise, int(round(noise / mean_span))


def span_corruption_shape(length: int, noise_density: float, mean_span: float) -> Shape:
    """The longest window whose inputs fit in `length` once its noise is hidden.

    One sentinel per span on each side and one end on each side. T5's tables count the spans of
    the longest window, before a density of 0.5 gives one token back; so does this.
    """

    def shape(tokens: int) -> Shape:
        noise, spans = spans_of(tokens, noise_density, mean_span)
        return Shape(tokens, tokens - noise + spans + 1, noise + spans + 1, spans)

    tokens = length - 1
    while shape(tokens + 1).inputs <= length:
        tokens += 1
    found = shape(tokens)
    if noise_density == 0.5 and found.targets > found.inputs:
        found = found._replace(tokens=tokens - 1, targets=found.targets - 1)
    return found


def exact_shape(tokens: int, noise_density: float, mean_span: float) -> Shape:
    """What corrupt_spans makes of a window of `tokens`: at least one token hidden and one left."""
    noise, spans = noise_and_spans(tokens, noise_density, mean_span)
    return Shape(tokens, tokens - noise + spans + 1, noise + spans + 1, spans)


def noise_and_spans(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    noise = min(max(int(round(tokens * noise_density)), 1), tokens - 1)
    # No more spans than tokens on either side: each span needs one of both.
    return noise, min(max(int(round(noise / mean_span)), 1), noise, tokens - noise)


def segmentation(items: int, parts: int, keys: np.ndarray) -> np.ndarray:
    """Lengths [b parts] of `items` cut into positive parts, every way equally likely."""
    draws = randomness.keys(0, keys[:, None] + np.arange(1, items, dtype=np.uint64))
    # The parts - 1 smallest draws say after which items the cuts come.
    cuts = np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1] if parts > 1 else draws[:, :0]
    cuts = np.sort(cuts.astype(np.int64), axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items)))
    return np.diff(edges, axis=1)


def noise_mask(tokens: int, noise_density: float, mean_span: float, keys: np.ndarray) -> np.ndarray:
    """Which tokens are hidden [b tokens]: spans in turn with text, text first (T5)."""
    noise, spans = noise_and_spans(tokens, noise_density, mean_span)
    hidden = segmentation(noise, spans, randomness.keys(1, keys))
    kept = segmentation(tokens - noise, spans, randomness.keys(2, keys))
    runs = np.stack([kept, hidden], axis=2).reshape(-1)
    flags = np.tile(np.array([False, True]), len(keys) * spans)
    return np.repeat(flags, runs).reshape(len(keys), tokens)


def hide(windows: np.ndarray, mask: np.ndarray, top: int) -> Ragged:
    """Windows with the k-th masked run of each replaced by one sentinel, top - k (k from 0)."""
    first = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    marked = np.where(first, top + 1 - np.cumsum(first, axis=1), windows)
    keep = first | ~mask
    return Ragged(marked[keep], keep.sum(axis=1))


def corrupt_spans(
    windows: np.ndarray, noise_density: float, mean_span: float, keys: np.ndarray, top: int
) -> tuple[Ragged, Ragged]:
    """Inputs with spans hidden behind sentinels, targets with the rest hidden, without ends."""
    mask = noise_mask(windows.shape[1], noise_density, mean_span, keys)
    return hide(windows, mask, top), hide(windows, ~mask, top)


def cut(windows: np.ndarray, least: int, most: int, keys: np.ndarray) -> tuple[Ragged, Ragged]:
    """Windows cut in two at a place drawn uniformly from least..most tokens."""
    place = least + randomness.uniform(3, keys, most - least + 1)
    before = np.arange(windows.shape[1]) < place[:, None]
    return (
        Ragged(windows[before], place),
        Ragged(windows[~before], windows.shape[1] - place),
    )


def with_end(rows: Ragged, eos: int) -> Ragged:
    """Rows with eos after each."""
    return Ragged(np.insert(rows.tokens, np.cumsum(rows.lengths), eos), rows.lengths + 1)


@dataclass(frozen=True)
class Cutter:
    """An objective fitted to lengths and a vocabulary: it wants windows of `window` tokens."""

    objective: Objective
    lengths: Lengths
    window: int
    eos: int
    top: int

    @property
    def runs_on(self) -> bool:
        """Whether the ends of examples are tokens of the text; denoising sets its own ends."""
        return not isinstance(self.objective, config.SpanCorruption)

    def __call__(
        self, windows: np.ndarray, keys: np.ndarray
    ) -> tuple[Ragged | None, Ragged, np.ndarray | float]:
        """Inputs, targets and the targets' weights in the loss, of windows [b t]; t is `window`
        or, for a last piece, less."""
        if self.lengths.layout == "aligned":
            return self.masked(windows, keys)
        return *self.parts(windows, keys), 1.0

    def masked(self, windows: np.ndarray, keys: np.ndarray) -> tuple[Ragged, Ragged, np.ndarray]:
        """Each hidden token replaced by the first sentinel, and only those to be predicted (the
        masked language model of an encoder, with T5's spans)."""
        tokens = windows.shape[1]
        density, span = self.objective.noise_density, self.objective.mean_span
        mask = noise_mask(tokens, density, span, keys).reshape(-1)
        whole, lengths = windows.reshape(-1), np.full(len(windows), tokens)
        return (
            Ragged(np.where(mask, self.top, whole), lengths),
            Ragged(whole, lengths),
            mask.astype(np.float32),
        )

    def parts(self, windows: np.ndarray, keys: np.ndarray) -> tuple[Ragged | None, Ragged]:
        """Inputs and targets of windows [b t]."""
        tokens = windows.shape[1]
        match self.objective:
            case config.SpanCorruption(density, span):
                pair = corrupt_spans(windows, density, span, keys, self.top)
                return with_end(pair[0], self.eos), with_end(pair[1], self.eos)
            case config.PrefixLM():
                least, most = 1, tokens - 1
                if self.lengths.layout == "pair":
                    least = max(1, tokens - self.lengths.targets)
                    most = min(most, self.lengths.inputs)
                return cut(windows, least, most, keys)
            case config.CausalLM():
                return None, Ragged(windows.reshape(-1), np.full(len(windows), tokens))


def cutter(objective: Objective, lengths: Lengths, vocabulary: Vocabulary) -> Cutter:
    """The objective with the longest window whose inputs and targets fit the lengths.

    Raises ValueError if none fits, or the vocabulary has too few sentinels.
    """
    if lengths.layout == "aligned":
        check_masking(objective, vocabulary)
        window = lengths.row
    elif isinstance(objective, config.SpanCorruption):
        window = span_window(objective, lengths, vocabulary)
    elif lengths.layout == "joined":
        window = lengths.row
    else:
        # Every split of it leaves both sides within their lengths, by the bounds in Cutter.
        window = max(lengths.inputs, lengths.targets)
    return Cutter(objective, lengths, window, vocabulary.eos, vocabulary.size - 1)


def check_masking(objective: Objective, vocabulary: Vocabulary) -> None:
    """Raises ValueError unless an encoder alone can be trained so."""
    if not isinstance(objective, config.SpanCorruption):
        raise ValueError(
            f"{type(objective).__name__} is for a model with a decoder; an encoder alone is "
            "trained with SpanCorruption"
        )
    if vocabulary.sentinels < 1:
        raise ValueError("SpanCorruption needs a sentinel: set Vocabulary.extra_ids to at least 1")


def span_window(objective: config.SpanCorruption, lengths: Lengths, vocabulary: Vocabulary) -> int:
    """Tokens of a window whose inputs fill Data.lengths["inputs"]."""
    if not lengths.inputs:
        raise ValueError('SpanCorruption needs Data.lengths["inputs"]')
    density, span = objective.noise_density, objective.mean_span
    tokens = span_corruption_shape(lengths.inputs, density, span).tokens
    if tokens < 2:
        raise ValueError(f'Data.lengths["inputs"] = {lengths.inputs} is too short to hide a span')
    shape = exact_shape(tokens, density, span)
    if shape.targets > lengths.targets:
        raise ValueError(
            f"SpanCorruption({density}, {span}) makes {shape.targets} targets from "
            f'{lengths.inputs} inputs: set Data.lengths["targets"] to at least that, not '
            f"{lengths.targets}"
        )
    if shape.spans > vocabulary.sentinels:
        raise ValueError(
            f"SpanCorruption({density}, {span}) hides {shape.spans} spans in {lengths.inputs} "
            f"inputs, but the vocabulary has {vocabulary.sentinels} sentinels: set "
            f"Vocabulary.extra_ids to at least {shape.spans}, or shorten the inputs"
        )
    return tokens
