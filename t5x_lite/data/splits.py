# SPDX-License-Identifier: Apache-2.0
"""Windows cut where a key says: in two, or with a middle taken out."""

import numpy as np

from t5x_lite.data import randomness
from t5x_lite.data.ragged import Ragged, column, side_by_side


def cut(windows: np.ndarray, least: int, most: int, keys: np.ndarray) -> tuple[Ragged, Ragged]:
    """Windows cut in two at a place drawn uniformly from least..most tokens."""
    place = least + randomness.uniform(3, keys, most - least + 1)
    before = np.arange(windows.shape[1]) < place[:, None]
    return (
        Ragged(windows[before], place),
        Ragged(windows[~before], windows.shape[1] - place),
    )


def middles(tokens: int, least: int, most: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and length [b] of a run of least..most of the tokens, every such run equally likely."""
    lengths = np.arange(least, most + 1)
    # So many places there are for each length.
    ends = np.cumsum(tokens - lengths + 1)
    # 53 bits: all integers that a float holds exactly, whatever the number of runs.
    share = (randomness.keys(4, keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    drawn = np.floor(share * ends[-1]).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    return ends[which] - 1 - drawn, lengths[which]


def fill_in(
    windows: np.ndarray, middle: tuple[np.ndarray, np.ndarray], marks: np.ndarray, order: str
) -> tuple[Ragged, Ragged]:
    """What is around the middle of each window, in that order and marked, and the middle."""
    begin, length = (each[:, None] for each in middle)
    place = np.arange(windows.shape[1])
    before, after = place < begin, place >= begin + length
    pieces = {
        "p": (column(marks[:1], len(windows)), pick(windows, before)),
        "s": (column(marks[1:2], len(windows)), pick(windows, after)),
    }
    around = [part for name in order.replace("m", "") for part in pieces[name]]
    inputs = side_by_side(*around, column(marks[2:], len(windows)))
    return inputs, pick(windows, ~before & ~after)


def pick(windows: np.ndarray, chosen: np.ndarray) -> Ragged:
    return Ragged(windows[chosen], chosen.sum(axis=1))
