# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens of different lengths, end to end."""

from typing import NamedTuple

import numpy as np

from t5x_lite.data import packing


class Ragged(NamedTuple):
    """Rows of different lengths, end to end."""

    tokens: np.ndarray
    lengths: np.ndarray


def column(ids: np.ndarray, rows: int) -> Ragged:
    """The same ids in every row."""
    return Ragged(np.tile(ids, rows), np.full(rows, len(ids)))


def side_by_side(*parts: Ragged) -> Ragged:
    """Row after row, that of each part in turn."""
    lengths = np.stack([part.lengths for part in parts], axis=1)
    begins = (np.cumsum(lengths) - lengths.reshape(-1)).reshape(lengths.shape)
    tokens = np.empty(int(lengths.sum()), parts[0].tokens.dtype)
    for number, part in enumerate(parts):
        begin = np.repeat(begins[:, number], part.lengths)
        tokens[begin + packing.ranges(part.lengths)] = part.tokens
    return Ragged(tokens, lengths.sum(axis=1))
