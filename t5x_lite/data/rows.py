# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch, filled from tokens: whole examples side by side, or windows of running text."""

from dataclasses import dataclass

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.data import packing, randomness
from t5x_lite.data.cache import Feature, Tokens
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.objectives import Cutter, Ragged

# Which permutation or draw a key is for.
ROW_ORDER, EXAMPLE_ORDER, SHIFT, NOISE = 1, 2, 3, 4


@dataclass(frozen=True)
class Shares:
    """What an epoch of rows holds, before padding; `truncated` counts examples by feature."""

    rows: int
    examples: int
    tokens: dict[str, int]
    truncated: dict[str, int]


def empty(rows: int, lengths: Lengths) -> Batch:
    """A batch of padding in the layout of the lengths."""
    zeros = lambda length: np.zeros((rows, length), np.int32)
    batch = Batch(
        targets=zeros(lengths.row),
        target_segments=zeros(lengths.row),
        target_positions=zeros(lengths.row),
        loss_weights=np.zeros((rows, lengths.row), np.float32),
    )
    if lengths.layout == "joined":
        return batch._replace(prefix=np.zeros((rows, lengths.row), bool))
    length = lengths.inputs if lengths.layout == "pair" else lengths.row
    return batch._replace(
        inputs=zeros(length), input_segments=zeros(length), input_positions=zeros(length)
    )


def take(feature: Feature, examples: np.ndarray, most: int) -> Ragged:
    """The ids of examples, each cut to `most` tokens; a cut one keeps its end (as in T5's
    append_eos_after_trim)."""
    first = feature.offsets[examples]
    whole = feature.offsets[examples + 1] - first
    lengths = np.minimum(whole, most)
    tokens = feature.tokens[np.repeat(first, lengths) + packing.ranges(lengths)]
    if feature.ends:
        cut = (np.cumsum(lengths) - 1)[whole > most]
        tokens[cut] = feature.eos
    return Ragged(tokens, lengths)


def offsets_in_rows(row: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each slot begins in its row, and its number there from 0; slots are in row order."""
    begins = np.searchsorted(row, row, side="left")
    before = np.cumsum(lengths) - lengths
    return before - before[begins], np.arange(len(row)) - begins


def write_inputs(batch: Batch, row: np.ndarray, begin, segment, tokens: Ragged) -> None:
    """Lays tokens into the encoder's rows."""
    steps = packing.ranges(tokens.lengths)
    place = np.repeat(row * batch.inputs.shape[1] + begin, tokens.lengths) + steps
    batch.inputs.reshape(-1)[place] = tokens.tokens
    batch.input_segments.reshape(-1)[place] = np.repeat(segment, tokens.lengths)
    batch.input_positions.reshape(-1)[place] = steps


def write_targets(batch: Batch, row, begin, segment, tokens: Ragged, position=None) -> np.ndarray:
    """Lays tokens into the decoder's rows and returns their places in the flattened rows."""
    steps = packing.ranges(tokens.lengths)
    place = np.repeat(row * batch.targets.shape[1] + begin, tokens.lengths) + steps
    batch.targets.reshape(-1)[place] = tokens.tokens
    batch.target_segments.reshape(-1)[place] = np.repeat(segment, tokens.lengths)
    if position is not None:
        steps = steps + np.repeat(position, tokens.lengths)
    batch.target_positions.reshape(-1)[place] = steps
    return place


def write(
    batch: Batch,
    row: np.ndarray,
    inputs: Ragged | None,
    targets: Ragged,
    weights: np.ndarray | float = 1.0,
) -> None:
    """Lays examples side by side into rows of the batch, in the batch's own layout.

    Slot i goes to row[i], and slots of a row come one after the other; inputs None leaves all of a
    row to be predicted. `weights` are of the target tokens.
    """
    loss = batch.loss_weights.reshape(-1)
    if batch.prefix is not None:
        first = np.zeros_like(targets.lengths) if inputs is None else inputs.lengths
        begin, number = offsets_in_rows(row, first + targets.lengths)
        if inputs is not None:
            place = write_targets(batch, row, begin, number + 1, inputs)
            batch.prefix.reshape(-1)[place] = True
        loss[write_targets(batch, row, begin + first, number + 1, targets, first)] = weights
        return
    begin, number = offsets_in_rows(row, inputs.lengths)
    write_inputs(batch, row, begin, number + 1, inputs)
    begin, number = offsets_in_rows(row, targets.lengths)
    loss[write_targets(batch, row, begin, number + 1, targets)] = weights


class Examples:
    """Rows of whole examples, each cut to the lengths, several to a row if packed."""

    def __init__(self, tokens: Tokens, lengths: Lengths, pack: bool):
        self.tokens, self.lengths = tokens, lengths
        self.most = lengths.targets if tokens.inputs is not None else lengths.row
        full = tokens.targets.lengths
        targets = np.minimum(full, self.most)
        self.truncated = {"targets": int((full > targets).sum())}
        self.sizes = {"targets": int(targets.sum())}
        shape, capacity = targets[:, None], (lengths.row,)
        if tokens.inputs is not None:
            full = tokens.inputs.lengths
            inputs = np.minimum(full, lengths.inputs or lengths.targets)
            self.truncated = {"inputs": int((full > inputs).sum())} | self.truncated
            self.sizes = {"inputs": int(inputs.sum())} | self.sizes
            if lengths.layout == "aligned":
                check_aligned(inputs, targets)
            elif lengths.layout == "joined":
                shape = (inputs + targets)[:, None]
            else:
                shape, capacity = np.stack([inputs, targets], 1), (lengths.inputs, lengths.row)
        self.plan = packing.plan(shape, capacity, pack)
        self.rows = self.plan.rows

    def shares(self) -> Shares:
        return Shares(self.rows, len(self.tokens), self.sizes, self.truncated)

    def write(self, batch: Batch, places: np.ndarray, turns: np.ndarray, key: int | None) -> None:
        """Fills rows `places` of the batch with rows `turns`, counted over epochs; key None keeps
        the order of the plan."""
        epochs, rows = turns // self.rows, turns % self.rows
        order = None
        if key is not None:
            salt = randomness.keys(randomness.key(key, ROW_ORDER), epochs)
            rows = randomness.permute(rows, self.rows, salt)
            order = randomness.key(key, EXAMPLE_ORDER)
        slots = packing.find(self.plan, rows, epochs, order)
        targets, inputs = take(self.tokens.targets, slots.example, self.most), None
        if self.tokens.inputs is not None:
            most = self.lengths.inputs or self.lengths.targets
            inputs = take(self.tokens.inputs, slots.example, most)
        write(batch, places[slots.row], inputs, targets)


def check_aligned(inputs: np.ndarray, targets: np.ndarray) -> None:
    """Raises ValueError unless every example has as many targets as inputs."""
    unequal = np.flatnonzero(inputs != targets)
    if len(unequal):
        i = int(unequal[0])
        raise ValueError(
            f"An encoder alone predicts one target for each input, but {len(unequal)} examples "
            f"differ; number {i} has {inputs[i]} inputs and {targets[i]} targets. Use a model with "
            "a decoder, or Data.objective = SpanCorruption"
        )


class Stream:
    """All targets of a split end to end, as a circle; with or without the ends of examples."""

    def __init__(self, feature: Feature, keep_ends: bool):
        self.feature = feature
        self.skips = feature.ends and not keep_ends
        # Where each example begins once the ends before it are taken out.
        self.begins = feature.offsets - np.arange(len(feature.offsets)) if self.skips else None
        self.size = int(self.begins[-1] if self.skips else feature.offsets[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [b length] from each start on."""
        index = (starts[:, None] + np.arange(length)) % self.size
        if self.skips:
            index += np.searchsorted(self.begins, index, side="right") - 1
        return self.feature.tokens[index].astype(np.int32)


class Windows:
    """Rows made by an objective from windows of running text; every epoch begins elsewhere and
    covers every token once, but for a last piece of a single token."""

    def __init__(self, tokens: Tokens, cutter: Cutter):
        self.cutter, self.lengths = cutter, cutter.lengths
        self.stream = Stream(tokens.targets, keep_ends=cutter.runs_on)
        if self.stream.size < 2:
            raise ValueError("The text is too short for any window: it has fewer than 2 tokens")
        whole, rest = divmod(self.stream.size, cutter.window)
        self.rows = whole + (1 if rest >= 2 else 0)

    def shares(self) -> Shares:
        """Tokens of an epoch, reckoned from its first rows: all but the last are alike."""
        rows = min(self.rows, 64)
        batch = empty(rows, self.lengths)
        self.write(batch, np.arange(rows), np.arange(rows), None)
        count = lambda segments: round(int((segments > 0).sum()) * self.rows / rows)
        tokens = {"targets": count(batch.target_segments)}
        if batch.inputs is not None:
            tokens = {"inputs": count(batch.input_segments)} | tokens
        return Shares(self.rows, self.rows, tokens, {})

    def write(self, batch: Batch, places: np.ndarray, turns: np.ndarray, key: int | None) -> None:
        """Fills rows `places` of the batch with rows `turns`, counted over epochs; key None keeps
        the order of the text, and draws the same noise every time."""
        epochs, rows = turns // self.rows, turns % self.rows
        shift = np.zeros_like(turns)
        if key is not None:
            salt = randomness.keys(randomness.key(key, ROW_ORDER), epochs)
            rows = randomness.permute(rows, self.rows, salt)
            drawn = randomness.keys(randomness.key(key, SHIFT), epochs)
            shift = (drawn % np.uint64(self.stream.size)).astype(np.int64)
        # Below 2**31 rows an epoch, (epoch, row) is one counter.
        keys = randomness.keys(randomness.key(key or 0, NOISE), epochs << 31 | rows)
        starts = shift + rows * self.cutter.window
        lengths = np.minimum(self.cutter.window, self.stream.size - rows * self.cutter.window)
        for length in np.unique(lengths):
            chosen = lengths == length
            windows = self.stream.windows(starts[chosen], int(length))
            write(batch, places[chosen], *self.cutter(windows, keys[chosen]))
