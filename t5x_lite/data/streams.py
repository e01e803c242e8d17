# SPDX-License-Identifier: Apache-2.0
"""Rows from a source too large to cache: read in order, some thousands of examples at a time.

Each such shard is tokenised, shuffled and packed by itself, just as a cached split is. Which
shard holds a row is known for those read so far; that short log is the state a checkpoint keeps,
and it is the same on every host, because each reads the whole source and takes its own rows.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.data import files, layout, randomness, tasks
from t5x_lite.data.cache import Chunk, Feature, Tokens
from t5x_lite.data.lengths import Lengths
from t5x_lite.data.rows import Examples, Shares, Windows
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Vocabulary

SHARD = 32_768  # examples that are shuffled and packed together
SHARD_TOKENS = 8_000_000  # where examples are long, fewer of them
REMEMBERED = 64  # shards in the log: many more than batches are made ahead


class Shard(NamedTuple):
    """Where a shard begins: its number, its epoch and example there, and its first row of all."""

    number: int
    epoch: int
    example: int
    row: int


class Loaded(NamedTuple):
    """A shard's rows, and the epoch and example that come after it."""

    part: Examples | Windows
    after: tuple[int, int]


class Streamed:
    """Rows of one task's split, read as they are needed; the same interface as rows.Examples."""

    def __init__(
        self,
        task: Task,
        split: str,
        lengths: Lengths,
        make: Callable[[Tokens], Examples | Windows],
    ):
        self.lengths = lengths
        self.task, self.split, self.make = task, split, make
        self.source, self.stamps = task.source(split), task.stamps(split)
        self.log = [Shard(0, 0, 0, 0)]
        self.loaded: dict[int, Loaded] = {}
        self.ahead: dict[int, Future] = {}  # the shard after the last one, being read meanwhile
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.chunks: Iterator[Chunk] = iter(())
        self.held: list[Chunk] = []  # taken from `chunks`, but of the next shard
        self.place: tuple[int, int] | None = None  # epoch and example that come next
        self.first = self.load(self.log[0]).part.shares()

    def shares(self) -> Shares:
        """Of the first shard: the rest is not known before it is read."""
        return self.first

    def state(self) -> dict:
        """The places of the last shards read."""
        shards = [list(shard) for shard in self.log]
        return {"source": self.source, "files": self.stamps, "shards": shards}

    def restore(self, state: dict) -> None:
        """Goes on from a state.

        Raises ValueError if the source is no longer what it was.
        """
        if state["source"] != self.source:
            before = state.get("files", {})
            changed = files.changes(before, self.stamps) if before else ""
            raise ValueError(
                f"The source of {self.task.name} has changed since the checkpoint was written "
                f"({changed or 'its files by name, size or time of change'}): put it back as it "
                "was, or begin in a new MODEL_DIR"
            )
        self.log = [Shard(*shard) for shard in state["shards"]]
        self.loaded.clear()
        self.ahead.clear()

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """The rows of these numbers, which never fall."""
        if numbers[0] < self.log[0].row:
            raise ValueError(
                f"Row {numbers[0]} of {self.task.name} was read too long ago: a stream goes "
                "forward. Restore the state that was saved at that step"
            )
        self.reach(int(numbers[-1]))
        begins = np.array([shard.row for shard in self.log])
        found = np.searchsorted(begins, numbers, side="right") - 1
        batch = None
        for index in np.unique(found):
            here, shard = np.flatnonzero(found == index), self.log[index]
            own = None if key is None else randomness.key(key, shard.number)
            part = self.load(shard).part.batch(numbers[here] - shard.row, own)
            if len(here) == len(numbers):
                return part
            batch = batch or layout.empty(len(numbers), self.lengths)
            layout.put(batch, here, part)
        return batch

    def reach(self, row: int) -> None:
        """Reads on until the log holds the row."""
        while row >= (end := self.log[-1].row + self.load(self.log[-1]).part.rows):
            epoch, example = self.load(self.log[-1]).after
            # A new list: a checkpoint may be reading the old one in another thread.
            following = Shard(self.log[-1].number + 1, epoch, example, end)
            self.log = [*self.log[1 - REMEMBERED :], following]

    def load(self, shard: Shard) -> Loaded:
        """The rows of a shard; the last two are kept, and the next is begun."""
        if shard.number not in self.loaded:
            found = self.ahead.pop(shard.number, None)
            found = found or self.reader.submit(self.read, shard.epoch, shard.example)
            self.loaded[shard.number] = loaded = found.result()
            self.ahead = {shard.number + 1: self.reader.submit(self.read, *loaded.after)}
            while len(self.loaded) > 2:
                del self.loaded[next(iter(self.loaded))]
        return self.loaded[shard.number]

    def read(self, epoch: int, example: int) -> Loaded:
        """The examples from here on, as many as a shard takes. Runs in the reader's thread."""
        if self.place != (epoch, example):
            self.chunks, self.held = self.task.read(self.split, begin=example, epoch=epoch), []
        taken, count, size = [], 0, 0
        self.place = None
        for chunk in itertools.chain(self.held, self.chunks):
            if count >= SHARD or size >= SHARD_TOKENS:
                self.held, self.place = [chunk], (epoch, example + count)
                break
            taken.append(chunk)
            count += len(chunk.targets)
            size += sum(map(len, chunk.targets)) + sum(map(len, chunk.inputs or ()))
        if not taken:
            raise ValueError(f"{self.task.name} has no example in {self.split}")
        tasks.unchanged(self.task, self.split, self.stamps, self.source)
        part = self.make(in_memory(taken, self.task, self.split))
        return Loaded(part, self.place or (epoch + 1, 0))


def in_memory(chunks: list[Chunk], task: Task, split: str) -> Tokens:
    """Chunks as the tokens of one split."""
    inputs = None
    if chunks[0].inputs is not None:
        inputs = feature([ids for chunk in chunks for ids in chunk.inputs], task.vocabularies[0])
    targets = feature([ids for chunk in chunks for ids in chunk.targets], task.vocabularies[1])
    name = f"{task.name}-{split}"
    return Tokens(name, inputs, targets, digest="", rows=None, counts=task.counts)


def feature(examples: list[np.ndarray], vocabulary: Vocabulary) -> Feature:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in examples])])
    ends = all(len(ids) and ids[-1] == vocabulary.eos for ids in examples)
    return Feature(np.concatenate(examples).astype(np.int32), offsets, vocabulary.eos, ends)
