# SPDX-License-Identifier: Apache-2.0
"""Examples side by side in the rows of a batch: tokens, segments, positions and loss weights."""

from typing import Any, NamedTuple

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import packing
from t5x_lite.data.cache import Feature
from t5x_lite.data.ragged import Ragged
from t5x_lite.utils.not_none import not_none


class Tiles(NamedTuple):
    """Contents of the rows, in order: each row's examples and then its padding.

    Repeating a tile's value by its length gives whole rows.

    Attributes:
      lengths: tokens of each tile [tiles].
      numbers: number of the tile's example in its row, from 1; 0 for padding [tiles].
      examples: tile of each example [examples].
    """

    lengths: np.ndarray
    numbers: np.ndarray
    examples: np.ndarray

    def values(self, of_examples: np.ndarray) -> np.ndarray:
        """Returns a value for each tile, 0 for padding."""
        result = np.zeros(len(self.lengths), np.int32)
        result[self.examples] = of_examples
        return result


def make_tiles(row: np.ndarray, lengths: np.ndarray, rows: int, width: int) -> Tiles:
    """Lays examples out in rows.

    Args:
      row: row of each example, ascending [examples].
      lengths: tokens of each example [examples].
      rows: number of rows.
      width: tokens of a row.
    """
    counts = np.bincount(row, minlength=rows)
    padding = np.cumsum(counts) + np.arange(rows)
    examples = np.arange(len(row)) + row
    every = np.empty(len(row) + rows, np.int64)
    every[examples] = lengths
    every[padding] = width - np.bincount(row, lengths, minlength=rows).astype(np.int64)
    numbers = np.zeros(len(every), np.int32)
    numbers[examples] = packing.ranges(counts) + 1
    return Tiles(every, numbers, examples)


def segments_and_positions(tiles: Tiles, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Number of each token's example in its row (0 is padding), and its place in the example, both
    int32 of `shape`."""
    segments = np.repeat(tiles.numbers, tiles.lengths)
    begins = (np.cumsum(tiles.lengths) - tiles.lengths).astype(np.int32)
    positions = np.arange(len(segments), dtype=np.int32) - np.repeat(begins, tiles.lengths)
    positions *= segments > 0
    return segments.reshape(shape), positions.reshape(shape)


def lay_out_side(
    row: np.ndarray, ragged: Ragged, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions of one side of pairs, int32 of `shape`.

    Args:
      row: row of each example, ascending [examples].
      ragged: ids of the examples.
      shape: rows, and tokens of a row.
    """
    tiles = make_tiles(row, ragged.lengths, *shape)
    segments, positions = segments_and_positions(tiles, shape)
    tokens = np.zeros(shape, np.int32)
    tokens[segments > 0] = ragged.tokens
    return tokens, segments, positions


def build_batch(
    lengths: LengthLimits,
    rows: int,
    row: np.ndarray,
    examples: tuple[Ragged | None, Ragged],
    weights: np.ndarray | float = 1.0,
) -> Batch:
    """Builds a batch in the layout of the lengths.

    Args:
      lengths: limits of the rows.
      rows: number of rows.
      row: row of each example, ascending [examples].
      examples: inputs and targets; inputs None leaves all of a row to be predicted.
      weights: of the target tokens in the loss, end to end.
    """
    inputs, targets = examples
    if lengths.layout == "decoder_only":
        return join_pairs(lengths, rows, row, inputs, targets)
    wide = lengths.inputs if lengths.layout == "encoder_decoder" else lengths.row
    read, written = (
        lay_out_side(row, not_none(inputs), (rows, wide)),
        lay_out_side(row, targets, (rows, lengths.row)),
    )
    loss = np.zeros((rows, lengths.row), np.float32)
    loss[written[1] > 0] = weights
    return Batch(*written, loss, *read)


def join_pairs(
    lengths: LengthLimits, rows: int, row: np.ndarray, inputs: Ragged | None, targets: Ragged
) -> Batch:
    """Batch of a decoder-only model: inputs and targets one after the other, loss on targets.

    Args:
      lengths: limits of the rows.
      rows: number of rows.
      row: row of each example, ascending [examples].
      inputs: ids of the inputs, or None.
      targets: ids of the targets.
    """
    shape = rows, lengths.row
    first = np.zeros_like(targets.lengths) if inputs is None else inputs.lengths
    tiles = make_tiles(row, first + targets.lengths, *shape)
    segments, positions = segments_and_positions(tiles, shape)
    prefix = positions < np.repeat(tiles.values(first), tiles.lengths).reshape(shape)
    written = (segments > 0) & ~prefix
    tokens = np.zeros(shape, np.int32)
    if inputs is not None:
        tokens[prefix] = inputs.tokens
    tokens[written] = targets.tokens
    return Batch(tokens, segments, positions, written.astype(np.float32), prefix=prefix)


def empty_batch(rows: int, lengths: LengthLimits) -> Batch:
    """A batch of padding."""
    none = Ragged(np.zeros(0, np.int32), np.zeros(0, np.int64))
    row = np.zeros(0, np.int64)
    batch = build_batch(lengths, rows, row, (none, none))
    return add_negatives(batch, row, none, lengths)


def add_negatives(
    batch: Batch, row: np.ndarray, negatives: Ragged | None, lengths: LengthLimits
) -> Batch:
    """The batch with the hard negatives of its rows, if rows have such.

    Args:
      batch: inputs and targets.
      row: row of each example, ascending [examples].
      negatives: ids of the negatives; None for a task without them.
      lengths: limits of the rows.
    """
    if not lengths.negatives:
        return batch
    rows = len(batch.targets)
    if negatives is None:
        negatives = Ragged(np.zeros(0, np.int32), np.zeros(len(row), np.int64))
    tokens, segments, positions = lay_out_side(row, negatives, (rows, lengths.row))
    return batch._replace(
        negatives=tokens, negative_segments=segments, negative_positions=positions
    )


def copy_rows(batch: Batch, places: np.ndarray, part: Batch) -> None:
    """Writes the rows of a part to their places in a batch.

    Args:
      batch: changed in place.
      places: rows of the batch [rows of part].
      part: the rows to write.
    """
    arrays: Any = zip(batch, part, strict=True)
    for whole, rows in arrays:
        if whole is not None:
            whole[places] = rows


def take_examples(feature: Feature, examples: np.ndarray, most: int) -> Ragged:
    """Ids of examples, truncated; a truncated one keeps its end (T5's append_eos_after_trim).

    Args:
      feature: ids of all examples.
      examples: numbers of the examples to take.
      most: greatest length.
    """
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


def fill_ends(ragged: Ragged, eos: int, lengths: np.ndarray) -> Ragged:
    """Fills examples up with ends.

    Args:
      ragged: ids of the examples.
      eos: id that ends a text.
      lengths: new length of each example, at least the old one [examples].
    """
    tokens = np.full(int(lengths.sum()), eos, ragged.tokens.dtype)
    begins = np.cumsum(lengths) - lengths
    tokens[np.repeat(begins, ragged.lengths) + packing.ranges(ragged.lengths)] = ragged.tokens
    return Ragged(tokens, lengths)
