# SPDX-License-Identifier: Apache-2.0
"""The rows of a split, by number: whole examples several to a row, or windows of running text.

Rows are numbered on and on over the epochs. Which examples a row holds is drawn for some thousand
rows at a time, because a draw costs the same for one row as for many.
"""

import functools
from dataclasses import dataclass

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.data import layout, packing, randomness
from t5x_lite.data.cache import Feature, Tokens
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.objectives import Cutter

DRAWN = 2048
# Which permutation or draw a key is for.
ROW_ORDER, EXAMPLE_ORDER, SHIFT, NOISE = 1, 2, 3, 4


@dataclass(frozen=True)
class Shares:
    """What an epoch of rows holds, before padding.

    `truncated` counts examples by feature, `whole` those that lost nothing.
    """

    rows: int
    examples: int
    whole: int
    tokens: dict[str, int]
    truncated: dict[str, int]


def drawn(numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Row numbers, which never fall, by the draw they belong to: its number, and places in it."""
    draws, first = np.unique(numbers // DRAWN, return_index=True)
    pieces = np.split(numbers % DRAWN, first[1:])
    return list(zip(draws.tolist(), pieces, strict=True))


def shuffled(numbers: np.ndarray, rows: int, key: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of each number; without a key rows keep their order."""
    epochs, places = numbers // rows, numbers % rows
    if key is not None:
        salt = randomness.keys(randomness.key(key, ROW_ORDER), epochs)
        places = randomness.permute(places, rows, salt)
    return epochs, places


class Examples:
    """Rows of whole examples, each cut to the lengths, several to a row if packed."""

    def __init__(self, tokens: Tokens, lengths: Lengths, pack: bool):
        self.tokens, self.lengths = tokens, lengths
        self.sides = {"targets": (tokens.targets, lengths.row)}
        if tokens.inputs is not None:
            inputs = lengths.inputs or lengths.targets
            self.sides = {
                "inputs": (tokens.inputs, inputs),
                "targets": (tokens.targets, lengths.targets),
            }
        cut = {
            name: np.minimum(feature.lengths, most) for name, (feature, most) in self.sides.items()
        }
        self.plan = packing.plan(*shapes(cut, lengths), pack)
        self.rows = self.plan.rows
        self.counts = shares_of(self.rows, self.sides, cut)
        self.draw = functools.lru_cache(maxsize=2)(self.draw_examples)

    def shares(self) -> Shares:
        return self.counts

    def draw_examples(self, draw: int, key: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a draw's rows, row after row, and where each row begins among them."""
        epochs, rows = shuffled(np.arange(draw * DRAWN, (draw + 1) * DRAWN), self.rows, key)
        order = None if key is None else randomness.key(key, EXAMPLE_ORDER)
        found = packing.find(self.plan, rows, epochs, order)
        return found.example, np.searchsorted(found.row, np.arange(DRAWN + 1))

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """The rows of these numbers, which never fall; key None keeps the order of the plan."""
        examples, counts = [], []
        for draw, places in drawn(numbers):
            every, first = self.draw(draw, key)
            count = first[places + 1] - first[places]
            examples.append(every[np.repeat(first[places], count) + packing.ranges(count)])
            counts.append(count)
        chosen = np.concatenate(examples)
        taken = {
            name: layout.take(feature, chosen, most) for name, (feature, most) in self.sides.items()
        }
        row = np.repeat(np.arange(len(numbers)), np.concatenate(counts))
        pair = taken.get("inputs"), taken["targets"]
        return layout.build(self.lengths, len(numbers), row, pair)


def shapes(cut: dict[str, np.ndarray], lengths: Lengths) -> tuple[np.ndarray, tuple[int, ...]]:
    """The room that examples need in a row [n d], and the room there is [d]."""
    if "inputs" not in cut:
        return cut["targets"][:, None], (lengths.row,)
    if lengths.layout == "pair":
        return np.stack([cut["inputs"], cut["targets"]], 1), (lengths.inputs, lengths.row)
    if lengths.layout == "joined":
        return (cut["inputs"] + cut["targets"])[:, None], (lengths.row,)
    check_aligned(cut["inputs"], cut["targets"])
    return cut["targets"][:, None], (lengths.row,)


def shares_of(rows: int, sides: dict, cut: dict[str, np.ndarray]) -> Shares:
    """What rows of examples hold whose sides are cut to these lengths."""
    lost = {name: feature.lengths > cut[name] for name, (feature, _) in sides.items()}
    examples = len(cut["targets"])
    return Shares(
        rows=rows,
        examples=examples,
        whole=examples - int(np.any(list(lost.values()), axis=0).sum()),
        tokens={name: int(length.sum()) for name, length in cut.items()},
        truncated={name: int(flags.sum()) for name, flags in lost.items()},
    )


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
        if self.stream.size < cutter.least:
            raise ValueError(
                f"{tokens.name} is too short for any window: it has {self.stream.size} tokens, "
                f"{type(cutter.objective).__name__} needs at least {cutter.least}"
            )
        whole, rest = divmod(self.stream.size, cutter.window)
        self.rows = whole + (1 if rest >= 2 else 0)
        self.draw = functools.lru_cache(maxsize=2)(self.draw_windows)

    def shares(self) -> Shares:
        """Tokens of an epoch, reckoned from its first rows: all but the last are alike."""
        rows = min(self.rows, 64)
        batch = self.batch(np.arange(rows), None)
        count = lambda segments: round(int((segments > 0).sum()) * self.rows / rows)
        tokens = {"targets": count(batch.target_segments)}
        if batch.inputs is not None:
            tokens = {"inputs": count(batch.input_segments)} | tokens
        return Shares(self.rows, self.rows, self.rows, tokens, {})

    def draw_windows(self, draw: int, key: int | None) -> tuple[np.ndarray, ...]:
        """Where the windows of a draw begin, their lengths, and the keys of their noise."""
        epochs, rows = shuffled(np.arange(draw * DRAWN, (draw + 1) * DRAWN), self.rows, key)
        begins = rows * self.cutter.window
        lengths = np.minimum(self.cutter.window, self.stream.size - begins)
        if key is not None:
            shift = randomness.keys(randomness.key(key, SHIFT), epochs)
            begins = begins + (shift % np.uint64(self.stream.size)).astype(np.int64)
        # Below 2**31 rows an epoch, (epoch, row) is one counter.
        noise = randomness.keys(randomness.key(key or 0, NOISE), epochs << 31 | rows)
        return begins, lengths, noise

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """The rows of these numbers, which never fall; key None keeps the order of the text, and
        draws the same noise every time."""
        found = [[each[places] for each in self.draw(draw, key)] for draw, places in drawn(numbers)]
        begins, lengths, noise = map(np.concatenate, zip(*found, strict=True))
        if (lengths == lengths[0]).all():
            return self.of_one_length(begins, int(lengths[0]), noise)
        batch = layout.empty(len(numbers), self.lengths)
        for length in np.unique(lengths):
            here = np.flatnonzero(lengths == length)
            layout.put(batch, here, self.of_one_length(begins[here], int(length), noise[here]))
        return batch

    def of_one_length(self, begins: np.ndarray, length: int, noise: np.ndarray) -> Batch:
        windows = self.stream.windows(begins, length)
        inputs, targets, weights = self.cutter(windows, noise)
        row = np.arange(len(windows))
        return layout.build(self.lengths, len(windows), row, (inputs, targets), weights)
