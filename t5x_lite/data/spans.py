# SPDX-License-Identifier: Apache-2.0
"""Span corruption: which tokens of a window are hidden, and what stands in their place.

Every function works on a batch of windows, a window being a row of token ids of equal length, and
is decided by one key per window.
"""

import numpy as np

from t5x_lite.data import randomness
from t5x_lite.data.ragged import Ragged


def segmentation(items: int, parts: int, keys: np.ndarray) -> np.ndarray:
    """Lengths [b parts] of `items` cut into positive parts, every way equally likely."""
    draws = randomness.keys(0, keys[:, None] + np.arange(1, items, dtype=np.uint64))
    # The parts - 1 smallest draws say after which items the cuts come.
    cuts = np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1] if parts > 1 else draws[:, :0]
    cuts = np.sort(cuts.astype(np.int64), axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items)))
    return np.diff(edges, axis=1)


def noise_mask(tokens: int, noise: int, spans: int, keys: np.ndarray) -> np.ndarray:
    """Which tokens are hidden [b tokens], `noise` of them: spans in turn with text, text first
    (T5)."""
    hidden = segmentation(noise, spans, randomness.keys(1, keys))
    kept = segmentation(tokens - noise, spans, randomness.keys(2, keys))
    runs = np.stack([kept, hidden], axis=2).reshape(-1)
    flags = np.tile(np.array([False, True]), len(keys) * spans)
    return np.repeat(flags, runs).reshape(len(keys), tokens)


def hide(windows: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> Ragged:
    """Windows with the k-th masked run of each replaced by the k-th sentinel."""
    first = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    marked = np.array(windows)
    marked[first] = sentinels[(np.cumsum(first, axis=1) - 1)[first]]
    keep = first | ~mask
    return Ragged(marked[keep], keep.sum(axis=1))


def corrupt(windows: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> tuple[Ragged, Ragged]:
    """Inputs with spans hidden behind sentinels, targets with the rest hidden, without ends."""
    return hide(windows, mask, sentinels), hide(windows, ~mask, sentinels)
