# SPDX-License-Identifier: Apache-2.0
"""Task of each row of a mixture, so that rates hold and any row can be computed by itself."""

import functools

import numpy as np

from t5x_lite.data import randomness

BLOCK = 8192  # rows in which the rates hold exactly, but for one row of each task


class MixtureSampler:
    """Draws rows from tasks: each block of rows takes counts[k] rows of task k, in random order."""

    def __init__(self, rates: list[float], key: int):
        """Raises ValueError for a rate that is not positive."""
        shares = np.array(rates, np.float64)
        if not (shares > 0).all() or not np.isfinite(shares).all():
            raise ValueError(f"Mixture rates must be positive numbers; got {rates}")
        self.shares, self.key = shares / shares.sum(), key
        self.counts = block_counts(self.shares)
        self.block = functools.lru_cache(maxsize=2)(self.order)

    def order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each place of a block the task, and the rank among the task's rows there."""
        size = int(self.counts.sum())
        place = randomness.permute(np.arange(size), size, randomness.key(self.key, block))
        first = np.concatenate([[0], np.cumsum(self.counts)])
        which = np.searchsorted(first, place, side="right") - 1
        rank = np.empty(size, np.int64)
        # Ranks rise with the place, so that streams are read forward.
        rank[np.argsort(which, kind="stable")] = np.arange(size)
        return which, rank - first[which]

    def draw(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each row, by its number, the task and the number of the task's row."""
        if len(self.counts) == 1:
            return np.zeros_like(turns), turns
        size = int(self.counts.sum())
        which, rank = np.empty_like(turns), np.empty_like(turns)
        for block in np.unique(turns // size):
            here = turns // size == block
            tasks, ranks = self.block(int(block))
            place = turns[here] % size
            which[here] = tasks[place]
            rank[here] = block * self.counts[tasks[place]] + ranks[place]
        return which, rank


def block_counts(shares: np.ndarray) -> np.ndarray:
    """Rows of a block for each share, at least one; the largest remainders get those left over."""
    exact = shares * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    left = max(0, BLOCK - int(counts.sum()))
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts
