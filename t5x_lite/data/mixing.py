# SPDX-License-Identifier: Apache-2.0
"""Which task each row comes from, so that rates hold and any row can be found by itself."""

from typing import NamedTuple

import numpy as np

from t5x_lite.data import randomness

BLOCK = 8192  # rows in which the rates hold exactly, to one row of each task


class Mixture(NamedTuple):
    """Every block of rows takes counts[k] rows of task k; first[k] is where they begin."""

    counts: np.ndarray
    first: np.ndarray


def mixture(rates: list[float]) -> Mixture:
    """Shares of a block in proportion to the rates, at least one row for each.

    Raises ValueError for a rate that is not positive.
    """
    shares = np.array(rates, np.float64)
    if not (shares > 0).all() or not np.isfinite(shares).all():
        raise ValueError(f"Mixture rates must be positive numbers; got {rates}")
    block = 1 if len(rates) == 1 else BLOCK
    exact = shares / shares.sum() * block
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    # The rows left over go to the largest remainders.
    left = block - counts.sum()
    if left > 0:
        counts[np.argsort(-(exact - counts), kind="stable")[:left]] += 1
    elif left < 0:
        counts[np.argmax(counts)] += left
    return Mixture(counts, np.concatenate([[0], np.cumsum(counts)]))


def draw(mixed: Mixture, turns: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row by its number: the task, and which of the task's own rows it is."""
    size = int(mixed.first[-1])
    block, place = turns // size, turns % size
    if len(mixed.counts) > 1:
        place = randomness.permute(place, size, randomness.keys(key, block))
    which = np.searchsorted(mixed.first, place, side="right") - 1
    return which, block * mixed.counts[which] + place - mixed.first[which]
