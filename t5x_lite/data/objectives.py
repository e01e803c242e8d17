# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets cut from running text: span corruption, prefix LM, causal LM.

Every function works on a batch of windows, a window being a row of token ids of equal length, and
is decided by one key per window.
"""

from typing import NamedTuple

import numpy as np

from t5x_lite.data import randomness


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
