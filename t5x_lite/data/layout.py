# SPDX-License-Identifier: Apache-2.0
"""Examples side by side in the rows of a batch: tokens, segments, positions and loss weights."""

from typing import NamedTuple

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.data import packing
from t5x_lite.data.cache import Feature
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.ragged import Ragged


class Tiles(NamedTuple):
    """What stands in the rows, in order: each row's examples and then its padding.

    Lengths and values are of the tiles, so that repeating a value by its length gives whole rows.
    """

    lengths: np.ndarray
    numbers: np.ndarray
    examples: np.ndarray

    def values(self, of_examples: np.ndarray) -> np.ndarray:
        """A value for each tile, 0 for padding."""
        result = np.zeros(len(self.lengths), np.int32)
        result[self.examples] = of_examples
        return result


def tiles(row: np.ndarray, lengths: np.ndarray, rows: int, width: int) -> Tiles:
    """Tiles of `rows` rows of `width` tokens, example i of this length being in row[i], which
    never falls."""
    counts = np.bincount(row, minlength=rows)
    padding = np.cumsum(counts) + np.arange(rows)
    examples = np.arange(len(row)) + row
    every = np.empty(len(row) + rows, np.int64)
    every[examples] = lengths
    every[padding] = width - np.bincount(row, lengths, minlength=rows).astype(np.int64)
    numbers = np.zeros(len(every), np.int32)
    numbers[examples] = packing.ranges(counts) + 1
    return Tiles(every, numbers, examples)


def segments_and_positions(found: Tiles, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each token's example in its row, and its place in the example; 0 is padding."""
    segments = np.repeat(found.numbers, found.lengths)
    begins = (np.cumsum(found.lengths) - found.lengths).astype(np.int32)
    positions = np.arange(len(segments), dtype=np.int32) - np.repeat(begins, found.lengths)
    positions *= segments > 0
    return segments.reshape(shape), positions.reshape(shape)


def side(
    row: np.ndarray, ragged: Ragged, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions of one side of pairs."""
    found = tiles(row, ragged.lengths, *shape)
    segments, positions = segments_and_positions(found, shape)
    tokens = np.zeros(shape, np.int32)
    tokens[segments > 0] = ragged.tokens
    return tokens, segments, positions


def build(
    lengths: Lengths,
    rows: int,
    row: np.ndarray,
    examples: tuple[Ragged | None, Ragged],
    weights: np.ndarray | float = 1.0,
) -> Batch:
    """`rows` rows in the layout of the lengths, example i in row[i], which never falls.

    Inputs None leaves all of a row to be predicted. `weights` are of the target tokens.
    """
    inputs, targets = examples
    if lengths.layout == "joined":
        return joined(lengths, rows, row, inputs, targets)
    wide = lengths.inputs if lengths.layout == "pair" else lengths.row
    read, written = side(row, inputs, (rows, wide)), side(row, targets, (rows, lengths.row))
    loss = np.zeros((rows, lengths.row), np.float32)
    loss[written[1] > 0] = weights
    return Batch(*written, loss, *read)


def joined(
    lengths: Lengths, rows: int, row: np.ndarray, inputs: Ragged | None, targets: Ragged
) -> Batch:
    """Inputs and targets one after the other; the loss is on targets."""
    shape = rows, lengths.row
    first = np.zeros_like(targets.lengths) if inputs is None else inputs.lengths
    found = tiles(row, first + targets.lengths, *shape)
    segments, positions = segments_and_positions(found, shape)
    prefix = positions < np.repeat(found.values(first), found.lengths).reshape(shape)
    written = (segments > 0) & ~prefix
    tokens = np.zeros(shape, np.int32)
    if inputs is not None:
        tokens[prefix] = inputs.tokens
    tokens[written] = targets.tokens
    return Batch(tokens, segments, positions, written.astype(np.float32), prefix=prefix)


def empty(rows: int, lengths: Lengths) -> Batch:
    """A batch of padding."""
    none = Ragged(np.zeros(0, np.int32), np.zeros(0, np.int64))
    return build(lengths, rows, np.zeros(0, np.int64), (none, none))


def put(batch: Batch, places: np.ndarray, part: Batch) -> None:
    """Writes the rows of a part to their places in the batch."""
    for whole, rows in zip(batch, part, strict=True):
        if whole is not None:
            whole[places] = rows


def take(feature: Feature, examples: np.ndarray, most: int) -> Ragged:
    """The ids of examples, each cut to `most` tokens; a cut one keeps its end (as in T5's
    append_eos_after_trim)."""
    first = feature.offsets[examples]
    whole = feature.offsets[examples + 1] - first
    lengths = np.minimum(whole, most)
    ends = np.cumsum(lengths)
    index = np.repeat(first - ends + lengths, lengths)
    index += np.arange(len(index))
    tokens = feature.tokens[index]
    if feature.ends:
        tokens[(ends - 1)[whole > most]] = feature.eos
    return Ragged(tokens, lengths)
