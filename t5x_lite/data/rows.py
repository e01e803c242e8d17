# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch, filled from tokens: whole examples side by side, or windows of running text."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.data import objectives, packing, randomness
from t5x_lite.data.cache import Feature, Tokens
from t5x_lite.data.objectives import Ragged
from t5x_lite.data.vocabularies import Vocabulary

# Which permutation or draw a key is for.
ROW_ORDER, EXAMPLE_ORDER, SHIFT, NOISE = 1, 2, 3, 4


class Lengths(NamedTuple):
    """Tokens of a row: at most `inputs` and `targets` of an example, `row` in what is predicted."""

    inputs: int
    targets: int
    row: int


@dataclass(frozen=True)
class Shares:
    """What an epoch of rows holds. Fill is the share of places that are not padding."""

    rows: int
    examples: int
    tokens: dict[str, int]
    truncated: dict[str, int]


def row_lengths(lengths: dict[str, int], layout: str) -> Lengths:
    inputs, targets = lengths.get("inputs", 0), lengths["targets"]
    return Lengths(inputs, targets, inputs + targets if layout == "joined" else targets)


def empty(layout: str, rows: int, lengths: Lengths) -> Batch:
    """A batch of padding in this layout."""
    zeros = lambda length: np.zeros((rows, length), np.int32)
    batch = Batch(
        targets=zeros(lengths.row),
        target_segments=zeros(lengths.row),
        target_positions=zeros(lengths.row),
        loss_weights=np.zeros((rows, lengths.row), np.float32),
    )
    if layout == "joined":
        return batch._replace(prefix=np.zeros((rows, lengths.row), bool))
    length = lengths.inputs if layout == "pair" else lengths.row
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


def write(batch: Batch, row: np.ndarray, inputs: Ragged | None, targets: Ragged) -> None:
    """Lays examples side by side into rows of the batch, in the batch's own layout.

    Slot i goes to row[i], which does not fall; inputs None leaves all of a row to be predicted.
    """
    weights = batch.loss_weights.reshape(-1)
    if batch.prefix is not None:
        first = np.zeros_like(targets.lengths) if inputs is None else inputs.lengths
        begin, number = offsets_in_rows(row, first + targets.lengths)
        if inputs is not None:
            place = write_targets(batch, row, begin, number + 1, inputs)
            batch.prefix.reshape(-1)[place] = True
        weights[write_targets(batch, row, begin + first, number + 1, targets, first)] = 1.0
        return
    begin, number = offsets_in_rows(row, inputs.lengths)
    write_inputs(batch, row, begin, number + 1, inputs)
    begin, number = offsets_in_rows(row, targets.lengths)
    weights[write_targets(batch, row, begin, number + 1, targets)] = 1.0


class Examples:
    """Rows of whole examples, each cut to the lengths, several to a row if packed."""

    def __init__(self, tokens: Tokens, layout: str, lengths: Lengths, pack: bool):
        self.tokens, self.lengths = tokens, lengths
        self.inputs = tokens.inputs
        full = tokens.targets.lengths
        targets = np.minimum(full, lengths.targets if self.inputs else lengths.row)
        self.truncated = {"targets": int((full > targets).sum())}
        shape, capacity = targets[:, None], (lengths.row,)
        self.sizes = {"targets": int(targets.sum())}
        if self.inputs is not None:
            full = self.inputs.lengths
            inputs = np.minimum(full, lengths.inputs)
            self.truncated["inputs"] = int((full > inputs).sum())
            self.sizes["inputs"] = int(inputs.sum())
            shape = (inputs + targets)[:, None]
            if layout == "pair":
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
        most = self.lengths.targets if self.inputs is not None else self.lengths.row
        targets = take(self.tokens.targets, slots.example, most)
        inputs = None
        if self.inputs is not None:
            inputs = take(self.inputs, slots.example, self.lengths.inputs)
        write(batch, places[slots.row], inputs, targets)


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

    def __init__(
        self,
        tokens: Tokens,
        layout: str,
        lengths: Lengths,
        objective: config.SpanCorruption | config.PrefixLM | config.CausalLM,
        vocabulary: Vocabulary,
    ):
        self.objective, self.lengths, self.layout = objective, lengths, layout
        self.eos, self.top = vocabulary.eos, vocabulary.size - 1
        denoising = isinstance(objective, config.SpanCorruption)
        self.stream = Stream(tokens.targets, keep_ends=not denoising)
        if denoising:
            self.window = span_window(objective, lengths, layout, vocabulary)
        else:
            self.window = max(lengths.inputs, lengths.targets)
            self.window = lengths.row if layout == "joined" else self.window
        if self.stream.size < 2:
            raise ValueError("The text is too short for any window: it has fewer than 2 tokens")
        whole, rest = divmod(self.stream.size, self.window)
        self.rows = whole + (1 if rest >= 2 else 0)

    def shares(self) -> Shares:
        batch = empty(self.layout, self.rows if self.rows < 64 else 64, self.lengths)
        rows = len(batch.targets)
        self.write(batch, np.arange(rows), np.arange(rows), None)
        scale = self.rows / rows
        tokens = {"targets": int((batch.target_segments > 0).sum() * scale)}
        if batch.inputs is not None:
            tokens["inputs"] = int((batch.input_segments > 0).sum() * scale)
        return Shares(self.rows, self.rows, tokens, {})

    def write(self, batch: Batch, places: np.ndarray, turns: np.ndarray, key: int | None) -> None:
        """Fills rows `places` of the batch with rows `turns`, counted over epochs; key None keeps
        the order of the text, and draws the same noise every time."""
        epochs, rows = turns // self.rows, turns % self.rows
        shift = np.zeros_like(turns)
        if key is not None:
            salt = randomness.keys(randomness.key(key, ROW_ORDER), epochs)
            rows = randomness.permute(rows, self.rows, salt)
            shift = randomness.keys(randomness.key(key, SHIFT), epochs) % np.uint64(
                self.stream.size
            )
        # Below 2**31 rows an epoch, (epoch, row) is one counter.
        keys = randomness.keys(randomness.key(key or 0, NOISE), epochs << 31 | rows)
        starts = shift.astype(np.int64) + rows * self.window
        lengths = np.minimum(self.window, self.stream.size - rows * self.window)
        for length in np.unique(lengths):
            chosen = lengths == length
            windows = self.stream.windows(starts[chosen], int(length))
            inputs, targets = self.cut(windows, keys[chosen])
            write(batch, places[chosen], inputs, targets)

    def cut(self, windows: np.ndarray, keys: np.ndarray) -> tuple[Ragged | None, Ragged]:
        """Inputs and targets of windows of one length."""
        length = windows.shape[1]
        match self.objective:
            case config.SpanCorruption(noise_density, mean_span):
                pair = objectives.corrupt_spans(windows, noise_density, mean_span, keys, self.top)
                return tuple(with_end(each, self.eos) for each in pair)
            case config.PrefixLM():
                most = min(length - 1, self.lengths.inputs) if self.layout == "pair" else length - 1
                least = max(1, length - self.lengths.targets) if self.layout == "pair" else 1
                return objectives.cut(windows, least, most, keys)
            case config.CausalLM():
                return None, Ragged(windows.reshape(-1), np.full(len(windows), length))


def with_end(rows: Ragged, eos: int) -> Ragged:
    """Rows with eos after each."""
    return Ragged(np.insert(rows.tokens, np.cumsum(rows.lengths), eos), rows.lengths + 1)


def span_window(
    objective: config.SpanCorruption, lengths: Lengths, layout: str, vocabulary: Vocabulary
) -> int:
    """Tokens of a window whose inputs fill Data.lengths["inputs"].

    Raises ValueError if its targets do not fit, or it has more spans than there are sentinels.
    """
    if not lengths.inputs:
        raise ValueError('SpanCorruption needs Data.lengths["inputs"]')
    density, span = objective.noise_density, objective.mean_span
    shape = objectives.span_corruption_shape(lengths.inputs, density, span)
    if shape.tokens < 2:
        raise ValueError(f'Data.lengths["inputs"] = {lengths.inputs} is too short to hide a span')
    exact = objectives.exact_shape(shape.tokens, density, span)
    if exact.targets > lengths.targets:
        raise ValueError(
            f"SpanCorruption({density}, {span}) makes {exact.targets} targets from "
            f'{lengths.inputs} inputs: set Data.lengths["targets"] to at least that, not '
            f"{lengths.targets}"
        )
    if exact.spans > vocabulary.sentinels:
        raise ValueError(
            f"SpanCorruption({density}, {span}) hides {exact.spans} spans in {lengths.inputs} "
            f"inputs, but the vocabulary has {vocabulary.sentinels} sentinels: set "
            f"Vocabulary.extra_ids to at least {exact.spans}, or shorten the inputs"
        )
    return shape.tokens
