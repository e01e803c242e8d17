# SPDX-License-Identifier: Apache-2.0
"""Rows of a split, by number: whole examples several to a row, or windows of running text.

Rows are numbered through all epochs. The examples of a row are drawn for some thousand rows at a
time, because a draw costs the same for one row as for many.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite.batch import Batch, PairReference
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import layout, packing, randomness
from t5x_lite.data.cache import Feature, Tokens
from t5x_lite.data.objectives import WindowPreprocessor

DRAWN = 2048
# Words that separate the keys of the permutations and draws.
ROW_ORDER, EXAMPLE_ORDER, SHIFT, NOISE = 1, 2, 3, 4


@dataclass(frozen=True)
class EpochCounts:
    """Counts of one epoch of rows, before padding.

    Attributes:
      rows: number of rows.
      examples: number of examples.
      tokens: number of tokens, by feature.
      truncated: examples that lost tokens, by feature.
    """

    rows: int
    examples: int
    tokens: dict[str, int]
    truncated: dict[str, int]


def group_by_draw(numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Groups ascending row numbers by draw: the number of the draw, and places in it."""
    draws, first = np.unique(numbers // DRAWN, return_index=True)
    pieces = np.split(numbers % DRAWN, first[1:])
    return list(zip(draws.tolist(), pieces, strict=True))


def shuffle_rows(numbers: np.ndarray, rows: int, key: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of each number.

    Args:
      numbers: of the rows, through all epochs [n].
      rows: number of rows of an epoch.
      key: random key of their order; None keeps the order of the plan.
    """
    epochs, places = numbers // rows, numbers % rows
    if key is not None:
        salt = randomness.keys(randomness.key(key, ROW_ORDER), epochs)
        places = randomness.permute(places, rows, salt)
    return epochs, places


class Examples:
    """Rows of whole examples, each cut to the lengths, several to a row if packed.

    Both texts of a pair stand in one row, the chosen one first, and each has half of its length.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: LengthLimits,
        pack: bool,
        *,
        paired: bool = False,
        reference: np.ndarray | None = None,
    ):
        """Plans the rows.

        Args:
          tokens: of the split.
          lengths: limits of the rows.
          pack: false gives every example, or pair, a row of its own.
          paired: true if examples 2 i and 2 i + 1 are a pair.
          reference: log-probability of each example under a reference model [examples]; None for
            none.
        """
        self.tokens, self.lengths, self.reference = tokens, lengths, reference
        self.texts = 2 if paired else 1
        self.sides = {"targets": (tokens.targets, lengths.row)}
        if tokens.inputs is not None:
            inputs = lengths.inputs or lengths.targets
            self.sides = {
                "inputs": (tokens.inputs, inputs),
                "targets": (tokens.targets, lengths.targets),
            }
        if tokens.negatives is not None and lengths.negatives:
            self.sides["negatives"] = tokens.negatives, lengths.targets
        self.sides = {name: (side, most // self.texts) for name, (side, most) in self.sides.items()}
        cut = {
            name: np.minimum(feature.lengths, most) for name, (feature, most) in self.sides.items()
        }
        if self.fills_targets:
            cut["targets"] = self.filled_lengths(cut["targets"])
        shapes, capacity = row_shapes(cut, lengths)
        whole = shapes.reshape(-1, self.texts, shapes.shape[1]).sum(axis=1)
        self.plan = packing.make_plan(whole, capacity, pack)
        self.rows = self.plan.rows
        self.counts = count_epoch(self.rows, self.sides, cut)
        self.draw = functools.lru_cache(maxsize=2)(self.draw_examples)

    @property
    def fills_targets(self) -> bool:
        """True if targets are filled up with ends; text that does not end is not."""
        return self.lengths.multiple > 1 and self.tokens.targets.ends

    def filled_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths of targets [n] that are filled up, as far as there is room."""
        _, most = self.sides["targets"]
        multiple = self.lengths.multiple
        return np.minimum(-(-lengths // multiple) * multiple, most)

    def epoch_counts(self) -> EpochCounts:
        return self.counts

    def first_tokens(self) -> Tokens:
        """Tokens of all examples; of a stream, those of its first shard."""
        return self.tokens

    def draw_examples(self, draw: int, key: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples of a draw's rows, row after row, and the begin of each row in
        them."""
        epochs, rows = shuffle_rows(np.arange(draw * DRAWN, (draw + 1) * DRAWN), self.rows, key)
        order = None if key is None else randomness.key(key, EXAMPLE_ORDER)
        slots = packing.find_slots(self.plan, rows, epochs, order)
        texts = self.texts * slots.example[:, None] + np.arange(self.texts)
        begins = np.searchsorted(slots.row, np.arange(DRAWN + 1))
        return texts.reshape(-1), self.texts * begins

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """Returns the rows of ascending numbers; key None keeps the order of the plan."""
        examples, counts = [], []
        for draw, places in group_by_draw(numbers):
            every, first = self.draw(draw, key)
            count = first[places + 1] - first[places]
            examples.append(every[np.repeat(first[places], count) + packing.ranges(count)])
            counts.append(count)
        chosen = np.concatenate(examples)
        taken = {
            name: layout.take_examples(feature, chosen, most)
            for name, (feature, most) in self.sides.items()
        }
        if self.fills_targets:
            targets = taken["targets"]
            filled = self.filled_lengths(targets.lengths)
            taken["targets"] = layout.fill_ends(targets, self.tokens.targets.eos, filled)
        counts = np.concatenate(counts)
        row = np.repeat(np.arange(len(numbers)), counts)
        pair = taken.get("inputs"), taken["targets"]
        batch = layout.build_batch(self.lengths, len(numbers), row, pair)
        batch = layout.add_negatives(batch, row, taken.get("negatives"), self.lengths)
        if self.reference is None:
            return batch
        scores = np.zeros(batch.targets.shape, np.float32)
        scores[row, packing.ranges(counts)] = self.reference[chosen]
        return batch._replace(teacher_data=PairReference(scores))


def row_shapes(
    cut: dict[str, np.ndarray], lengths: LengthLimits
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Tokens that examples need in a row [n d], and the capacity of a row [d]."""
    if "inputs" not in cut:
        return cut["targets"][:, None], (lengths.row,)
    if lengths.layout == "encoder_decoder":
        return np.stack([cut["inputs"], cut["targets"]], 1), (lengths.inputs, lengths.row)
    if lengths.layout == "decoder_only":
        return (cut["inputs"] + cut["targets"])[:, None], (lengths.row,)
    check_aligned(cut["inputs"], cut["targets"])
    return cut["targets"][:, None], (lengths.row,)


def count_epoch(rows: int, sides: dict, cut: dict[str, np.ndarray]) -> EpochCounts:
    """Counts of an epoch of rows of examples.

    Args:
      rows: number of rows.
      sides: feature and greatest length, by name.
      cut: lengths of the truncated examples [examples], by name.
    """
    lost = {name: feature.lengths > cut[name] for name, (feature, _) in sides.items()}
    return EpochCounts(
        rows=rows,
        examples=len(cut["targets"]),
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
    """All targets of a split end to end, as a circle.

    Where an objective does not keep the ends of examples, its seam stands in their place.
    """

    def __init__(self, feature: Feature, preprocessor: WindowPreprocessor):
        self.feature, self.seam = feature, preprocessor.seam
        # Tokens at the end of each example that are not text.
        self.dropped = int(feature.ends and not preprocessor.keeps_ends)
        sizes = feature.lengths - self.dropped
        if preprocessor.joins_examples and len(self.seam):
            sizes += len(self.seam) * self.needs_seam(sizes)
        # The begin of each example; None where they are those of the feature.
        same = not self.dropped and not len(self.seam)
        self.begins = None if same else np.concatenate([[0], np.cumsum(sizes)])
        self.size = int(sizes.sum())

    def needs_seam(self, sizes: np.ndarray) -> np.ndarray:
        """Flags of the examples that do not end in the seam as they are.

        Args:
          sizes: their lengths without ends [examples].
        """
        last = self.feature.tokens[np.maximum(self.feature.offsets[:-1] + sizes - 1, 0)]
        return (sizes > 0) & (last != self.seam[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns tokens [b length] from each start on."""
        index = (starts[:, None] + np.arange(length)) % self.size
        if self.begins is None:
            return self.feature.tokens[index].astype(np.int32)
        example = np.searchsorted(self.begins, index, side="right") - 1
        first, place = self.feature.offsets[example], index - self.begins[example]
        beyond = place - (self.feature.offsets[example + 1] - self.dropped - first)
        tokens = self.feature.tokens[first + np.where(beyond < 0, place, 0)].astype(np.int32)
        if len(self.seam):
            tokens = np.where(beyond < 0, tokens, self.seam[np.maximum(beyond, 0)])
        return tokens


class WindowPlan(NamedTuple):
    """Windows of an epoch.

    Attributes:
      begins: first token of each in the stream [n].
      lengths: tokens of each [n].
    """

    begins: np.ndarray
    lengths: np.ndarray


def plan_joined(size: int, window: int) -> WindowPlan:
    """Windows end to end; a rest of a single token is left out."""
    begins = np.arange(0, size - 1, window)
    return WindowPlan(begins, np.minimum(window, size - begins))


def plan_separate(edges: np.ndarray, window: int) -> WindowPlan:
    """Windows that hold one example, or a part of it; rests of a single token are left out.

    Args:
      edges: begin of each example in the stream, and the end of the last [examples + 1].
      window: most tokens of a window.
    """
    count = (np.diff(edges) + window - 2) // window
    number = packing.ranges(count)
    begins = np.repeat(edges[:-1], count) + number * window
    return WindowPlan(begins, np.minimum(window, np.repeat(edges[1:], count) - begins))


class Windows:
    """Rows of an objective over windows of running text; every epoch covers every token once,
    except for windows of a single token.

    Where windows run through examples, every epoch begins at another place.
    """

    def __init__(self, tokens: Tokens, preprocessor: WindowPreprocessor):
        self.tokens, self.preprocessor = tokens, preprocessor
        self.lengths = preprocessor.lengths
        self.stream = Stream(tokens.targets, preprocessor)
        if self.stream.size < preprocessor.min_tokens:
            raise ValueError(
                f"{tokens.name} is too short for any window: it has {self.stream.size} tokens, "
                f"{type(preprocessor.objective).__name__} needs at least {preprocessor.min_tokens}"
            )
        if preprocessor.joins_examples:
            self.plan = plan_joined(self.stream.size, preprocessor.window)
        else:
            edges = tokens.targets.offsets if self.stream.begins is None else self.stream.begins
            self.plan = plan_separate(edges, preprocessor.window)
        self.rows = len(self.plan.begins)
        if not self.rows:
            raise ValueError(
                f"{tokens.name} has no example of two tokens, which the shortest window holds"
            )
        self.draw = functools.lru_cache(maxsize=2)(self.draw_windows)

    def epoch_counts(self) -> EpochCounts:
        """Counts of an epoch, extrapolated from some rows: where windows run through examples, all
        but the last are alike."""
        rows = min(self.rows, 64)
        numbers = np.arange(rows)
        if not self.preprocessor.joins_examples:
            numbers = numbers * self.rows // rows
        batch = self.batch(numbers, None)
        if self.preprocessor.names is not None:
            self.preprocessor.names.report(self.tokens.name)

        def count(segments: np.ndarray) -> int:
            return round(int((segments > 0).sum()) * self.rows / rows)

        tokens = {"targets": count(batch.target_segments)}
        if batch.inputs is not None:
            tokens = {"inputs": count(batch.input_segments)} | tokens
        return EpochCounts(self.rows, self.rows, tokens, {})

    def first_tokens(self) -> Tokens:
        """Tokens of all examples; of a stream, those of its first shard."""
        return self.tokens

    def draw_windows(self, draw: int, key: int | None) -> tuple[np.ndarray, ...]:
        """Returns the begins of a draw's windows, their lengths, and the keys of their noise."""
        epochs, rows = shuffle_rows(np.arange(draw * DRAWN, (draw + 1) * DRAWN), self.rows, key)
        begins, lengths = self.plan.begins[rows], self.plan.lengths[rows]
        if key is not None and self.preprocessor.joins_examples:
            shift = randomness.keys(randomness.key(key, SHIFT), epochs)
            begins = begins + (shift % np.uint64(self.stream.size)).astype(np.int64)
        # Below 2**31 rows an epoch, (epoch, row) is one counter.
        noise = randomness.keys(randomness.key(key or 0, NOISE), epochs << 31 | rows)
        return begins, lengths, noise

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """Returns the rows of ascending numbers; key None keeps the order of the text, and draws
        the same noise every time."""
        draws = [
            [each[places] for each in self.draw(draw, key)]
            for draw, places in group_by_draw(numbers)
        ]
        begins, lengths, noise = map(np.concatenate, zip(*draws, strict=True))
        if (lengths == lengths[0]).all():
            return self.equal_length_batch(begins, int(lengths[0]), noise)
        batch = layout.empty_batch(len(numbers), self.lengths)
        for length in np.unique(lengths):
            here = np.flatnonzero(lengths == length)
            layout.copy_rows(
                batch, here, self.equal_length_batch(begins[here], int(length), noise[here])
            )
        return batch

    def equal_length_batch(self, begins: np.ndarray, length: int, noise: np.ndarray) -> Batch:
        """Builds the rows of windows of one length.

        Args:
          begins: first token of each window in the stream [n].
          length: tokens of each window.
          noise: random key of each window [n].
        """
        windows = self.stream.windows(begins, length)
        inputs, targets, weights = self.preprocessor(windows, noise)
        row = np.arange(len(windows))
        return layout.build_batch(self.lengths, len(windows), row, (inputs, targets), weights)
