# SPDX-License-Identifier: Apache-2.0
"""Spans of windows that are hidden behind sentinels (T5: Raffel et al., 2020)."""

import numpy as np

from t5x_lite.data import randomness
from t5x_lite.data.ragged import Ragged


def segmentation(items: int, parts: int, keys: np.ndarray) -> np.ndarray:
    """Lengths [b parts] of a random partition into positive parts, all equally likely.

    Args:
      items: number of items.
      parts: number of parts.
      keys: one uint64 per partition [b].
    """
    draws = randomness.keys(0, keys[:, None] + np.arange(1, items, dtype=np.uint64))
    # The parts - 1 smallest draws say after which items the cuts come.
    cuts = np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1] if parts > 1 else draws[:, :0]
    cuts = np.sort(cuts.astype(np.int64), axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items)))
    return np.diff(edges, axis=1)


def noise_mask(tokens: int, noise: int, spans: int, keys: np.ndarray) -> np.ndarray:
    """Mask of the hidden tokens [b tokens]: spans alternate with text, text first (T5's
    random_spans_noise_mask).

    Args:
      tokens: length of a window.
      noise: number of hidden tokens.
      spans: number of hidden spans.
      keys: one uint64 per window [b].
    """
    hidden = segmentation(noise, spans, randomness.keys(1, keys))
    kept = segmentation(tokens - noise, spans, randomness.keys(2, keys))
    runs = np.stack([kept, hidden], axis=2).reshape(-1)
    flags = np.tile(np.array([False, True]), len(keys) * spans)
    return np.repeat(flags, runs).reshape(len(keys), tokens)


def replace_runs(windows: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> Ragged:
    """Replaces the k-th masked run of each window by the k-th sentinel.

    Args:
      windows: token ids [b t].
      mask: true where they are replaced [b t].
      sentinels: ids [k].
    """
    first = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    marked = np.array(windows)
    marked[first] = sentinels[(np.cumsum(first, axis=1) - 1)[first]]
    keep = first | ~mask
    return Ragged(marked[keep], keep.sum(axis=1))


def corrupt(windows: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> tuple[Ragged, Ragged]:
    """Inputs with the masked spans behind sentinels, targets with the rest, without ends.

    Args:
      windows: token ids [b t].
      mask: true where they are hidden [b t].
      sentinels: ids [k].
    """
    return replace_runs(windows, mask, sentinels), replace_runs(windows, ~mask, sentinels)
