# SPDX-License-Identifier: Apache-2.0
"""Rows from a source too large to cache: read in order, some thousands of examples at a time.

Each such shard is tokenized, shuffled and packed by itself, just as a cached split is. A short log
of the shards read so far maps rows to shards; it is the state that a checkpoint keeps, and it is
the same on every host, because each reads the whole source and takes its own rows.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.batch import Batch
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import content, layout, randomness
from t5x_lite.data.cache import Feature, Tokens
from t5x_lite.data.rows import EpochCounts, Examples, Windows
from t5x_lite.data.task import SplitFiles, Task, digest_beginning, read_checked
from t5x_lite.data.token_writer import FEATURES, Chunk
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none

log = logging.getLogger(__name__)

SHARD = 32_768  # examples that are shuffled and packed together
SHARD_TOKENS = 8_000_000  # where examples are long, fewer of them
REMEMBERED = 64  # shards in the log: many more than are prefetched


class StreamShard(NamedTuple):
    """Begin of a shard.

    Attributes:
      number: of the shard.
      epoch: of its first example.
      example: number of its first example in the split.
      row: number of its first row, through all shards.
    """

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
        lengths: LengthLimits,
        make: Callable[[Tokens], Examples | Windows],
    ):
        self.lengths = lengths
        self.task, self.split, self.make = task, split, make
        # A sample of each file: a source that is streamed is too large to be read twice.
        self.files = SplitFiles(task, split, cache_dir=None, sampled=True)
        self.source, self.beginning = task.source(split), digest_beginning(task, split)
        self.log = [StreamShard(0, 0, 0, 0)]
        self.loaded: dict[int, Loaded] = {}
        self.ahead: dict[int, Future] = {}  # the shard after the last one, being read meanwhile
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.chunks: Iterator[Chunk] = iter(())
        self.leftover: list[Chunk] = []  # taken from `chunks`, but of the next shard
        self.place: tuple[int, int] | None = None  # epoch and example that come next
        self.first = self.load(self.log[0]).part.epoch_counts()

    def epoch_counts(self) -> EpochCounts:
        """Counts of the first shard: the rest is not known before it is read."""
        return self.first

    def first_tokens(self) -> Tokens:
        """Tokens of the first shard."""
        return self.load(self.log[0]).part.tokens

    def state(self) -> dict:
        """Begins of the last shards read, and digests of the source, as JSON."""
        return {
            "source": self.source,
            "beginning": self.beginning,
            "files": self.files.digests,
            "shards": [list(shard) for shard in self.log],
        }

    def restore(self, state: dict) -> None:
        """Continues from a state.

        Raises ValueError if the content of the source has changed.
        """
        self.check_same(state)
        self.log = [StreamShard(*shard) for shard in state["shards"]]
        self.loaded.clear()
        self.ahead.clear()

    def check_same(self, state: dict) -> None:
        """Raises ValueError if the source of a state had other content; warns where that is not
        known."""
        name, files = self.task.name, state.get("files", {})
        if "beginning" not in state:
            log.warning("The checkpoint of %s is of an earlier version: not compared", name)
            return
        if list(files.values()) != list(self.files.digests.values()):
            changes = content.describe_changes(files, self.files.digests) or "another order"
            raise ValueError(
                f"The source of {name} has changed since the checkpoint was written ({changes}): "
                "put it back as it was, or begin in a new MODEL_DIR"
            )
        if state["beginning"] != self.beginning:
            if digest_beginning(self.task, self.split) == self.beginning:
                raise ValueError(
                    f"The first examples of {name} are not those of the checkpoint, although its "
                    "files are: put the code that reads them back as it was, or begin in a new "
                    "MODEL_DIR"
                )
            log.warning("The examples of %s differ each time they are read: not compared", name)
        elif state["source"] != self.source:
            log.warning(
                "The code or the options that read %s have changed since the checkpoint was "
                "written. Its files and first examples are the same, so the run continues",
                name,
            )

    def batch(self, numbers: np.ndarray, key: int | None) -> Batch:
        """Returns the rows of ascending numbers."""
        if numbers[0] < self.log[0].row:
            raise ValueError(
                f"Row {numbers[0]} of {self.task.name} was read too long ago: a stream goes "
                "forward. Restore the state that was saved at that step"
            )
        self.reach(int(numbers[-1]))
        begins = np.array([shard.row for shard in self.log])
        shards = np.searchsorted(begins, numbers, side="right") - 1
        batch = None
        for index in np.unique(shards):
            here, shard = np.flatnonzero(shards == index), self.log[index]
            shard_key = None if key is None else randomness.key(key, shard.number)
            part = self.load(shard).part.batch(numbers[here] - shard.row, shard_key)
            if len(here) == len(numbers):
                return part
            batch = batch or layout.empty_batch(len(numbers), self.lengths)
            layout.copy_rows(batch, here, part)
        return not_none(batch)

    def reach(self, row: int) -> None:
        """Reads on until the log holds the row."""
        while row >= (end := self.log[-1].row + self.load(self.log[-1]).part.rows):
            epoch, example = self.load(self.log[-1]).after
            # A new list: a checkpoint may be reading the old one in another thread.
            following = StreamShard(self.log[-1].number + 1, epoch, example, end)
            self.log = [*self.log[1 - REMEMBERED :], following]

    def load(self, shard: StreamShard) -> Loaded:
        """Returns the rows of a shard; the last two are kept, and the next is begun."""
        if shard.number not in self.loaded:
            future = self.ahead.pop(shard.number, None)
            future = future or self.reader.submit(self.read, shard.epoch, shard.example)
            self.loaded[shard.number] = loaded = future.result()
            self.ahead = {shard.number + 1: self.reader.submit(self.read, *loaded.after)}
            while len(self.loaded) > 2:
                del self.loaded[next(iter(self.loaded))]
        return self.loaded[shard.number]

    def read(self, epoch: int, example: int) -> Loaded:
        """Reads the examples of a shard. Runs in the reader's thread."""
        if self.place != (epoch, example):
            self.chunks = read_checked(self.task, self.split, begin=example, epoch=epoch)
            self.leftover = []
        taken, count, size = [], 0, 0
        self.place = None
        for chunk in itertools.chain(self.leftover, self.chunks):
            if count >= SHARD or size >= SHARD_TOKENS:
                self.leftover, self.place = [chunk], (epoch, example + count)
                break
            taken.append(chunk)
            count += len(chunk.targets)
            for name in FEATURES:
                size += sum(map(len, getattr(chunk, name) or ()))
        if not taken:
            raise ValueError(f"{self.task.name} has no examples in {self.split}")
        self.files.check_unchanged()
        part = self.make(join_chunks(taken, self.task, self.split))
        return Loaded(part, self.place or (epoch + 1, 0))


def join_chunks(chunks: list[Chunk], task: Task, split: str) -> Tokens:
    """Joins chunks to the tokens of one split.

    Args:
      chunks: consecutive examples, at least one chunk.
      task: that they are from.
      split: of the task.
    """
    features: dict[str, Any] = dict.fromkeys(FEATURES)
    for name, side in FEATURES.items():
        if getattr(chunks[0], name) is not None:
            examples = [ids for chunk in chunks for ids in getattr(chunk, name)]
            features[name] = join_feature(examples, task.vocabularies[side])
    name, counts = f"{task.name}-{split}", task.counts.get(split, {})
    return Tokens(name, **features, digest="", rows=None, counts=counts)


def join_feature(examples: list[np.ndarray], vocabulary: TextVocabulary) -> Feature:
    """Joins the ids of examples to one feature."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in examples])])
    ends = all(len(ids) and ids[-1] == vocabulary.eos for ids in examples)
    return Feature(np.concatenate(examples).astype(np.int32), offsets, vocabulary.eos, ends)
