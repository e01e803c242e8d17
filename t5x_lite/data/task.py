# SPDX-License-Identifier: Apache-2.0
"""A task: its splits, its vocabularies, the reader of its examples, and its metrics."""

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_lite.data import cache, content
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.token_writer import FEATURES, CacheEntry, Chunk
from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import cache_folder

log = logging.getLogger(__name__)

CHUNK = 4096
CHARACTERS = 1000  # most of an example in a chunk, on average
BEGINNING = 200  # examples that are read again and compared
TYPED_ENDS = "targets end in the end-of-sequence token as text, which is read once"


class ExampleReader(Protocol):
    """Reader of chunks of ids from example `begin` of a split on; `epoch` seeds random
    preprocessors. A probe has chunks of BEGINNING examples, and counts nothing."""

    def __call__(
        self, split: str, begin: int = 0, epoch: int = 0, probe: bool = False
    ) -> Iterator[Chunk]: ...


class DataChangedError(ValueError):
    """The source of a split changed while it was read."""


class TaskScores(NamedTuple):
    """Results of metrics that the user wrote.

    Attributes:
      values: numbers by name.
      failures: reasons by name, where a function raised or a value is not a number.
    """

    values: dict[str, float]
    failures: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One source of examples.

    Attributes:
      name: of the task.
      splits: names of its splits.
      vocabularies: of (inputs, targets).
      read: reader of its examples.
      source: returns a digest of how a split is read, and of what it is read from besides `files`.
      has_inputs: false for text alone.
      metrics: names of metrics of ours.
      counts: counts of the reader in its last pass over a split (broken lines), by split and name.
      score: computes the task's own metrics, in addition to `metrics`, of predictions for the first
        examples of a split.
      unsupported_metrics: reasons by name of own metrics that `score` leaves out.
      files: returns the files that a split is read from, in their order; their content decides.
      remote: returns what else decides the content of a split, by name: a commit of the hub.
      paired: true if training examples come two by two, a chosen text and a rejected one.
      reference: yields the log-probabilities of each training pair under a reference model; None
        where the source has none.
    """

    name: str
    splits: tuple[str, ...]
    vocabularies: tuple[TextVocabulary, TextVocabulary]
    read: ExampleReader
    source: Callable[[str], str]
    has_inputs: bool
    metrics: tuple[str, ...] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    score: Callable[[str, list[str]], TaskScores] | None = None
    unsupported_metrics: dict[str, str] = field(default_factory=dict)
    files: Callable[[str], list[Path]] = lambda split: []
    remote: Callable[[str], dict[str, str]] = lambda split: {}
    paired: bool = False
    reference: Callable[[], Iterator[list[float]]] | None = None


class SplitFiles:
    """Files of a task's split as they are now, to detect a change.

    Attributes:
      digests: of their content, by path, in the order of reading.
    """

    def __init__(self, task: Task, split: str, cache_dir: Path | None, sampled: bool = False):
        """Reads the digests.

        Args:
          task: the task.
          split: of the task.
          cache_dir: folder that remembers digests.
          sampled: true to read samples of the files.
        """
        self.task, self.split, self.cache_dir, self.sampled = task, split, cache_dir, sampled
        self.stamps = content.file_stamps(task.files(split))
        self.digests = self.read_digests()

    def read_digests(self) -> dict[str, str]:
        files = content.digest_files(self.task.files(self.split), self.cache_dir, self.sampled)
        return files | self.task.remote(self.split)

    def check_unchanged(self) -> None:
        """Raises DataChangedError if the content has changed; the message names the files."""
        if content.file_stamps(self.task.files(self.split)) == self.stamps:
            return
        changes = content.describe_changes(self.digests, self.read_digests())
        if changes:
            raise DataChangedError(
                f"The data of {self.task.name} ({self.split}) changed while they were read: "
                f"{changes}. Put them back as they were, or begin in a new MODEL_DIR"
            )


def read_checked(
    task: Task, split: str, begin: int = 0, epoch: int = 0, probe: bool = False
) -> Iterator[Chunk]:
    """Reads examples and holds their ids against the vocabularies.

    Args:
      task: the task.
      split: of the task.
      begin: number of the first example.
      epoch: seed of random preprocessors.
      probe: true for a pass that reads the first chunk alone.

    Raises:
      ValueError: an example has an id that its vocabulary lacks.
    """
    for chunk in task.read(split, begin=begin, epoch=epoch, probe=probe):
        for name, side in FEATURES.items():
            examples, vocabulary = getattr(chunk, name), task.vocabularies[side]
            if examples is not None:
                check_ids(f"{task.name} ({split}), {name}", examples, vocabulary.size, begin)
        begin += len(chunk.targets)
        yield chunk


def check_ids(where: str, examples: list[np.ndarray], size: int, first: int) -> None:
    """Checks that examples are rows of ids of a vocabulary.

    Args:
      where: task, split and feature, for the message.
      examples: of the feature.
      size: number of ids of its vocabulary.
      first: number of the first example.

    Raises:
      ValueError: an example holds text, has another rank, or has an id out of range.
    """
    for number, ids in enumerate(examples, first):
        if ids.dtype.kind in "SUO":
            raise ValueError(
                f"{where}: example {number} holds text, not ids: add "
                "seqio.preprocessors.tokenize to the task's preprocessors"
            )
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise ValueError(
                f"{where}: example {number} is not a row of ids, but {ids.dtype.name} of shape "
                f"{ids.shape}"
            )
    flat = np.concatenate(examples)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < size:
        place = int(np.flatnonzero((flat < 0) | (flat >= size))[0])
        ends = np.cumsum([len(ids) for ids in examples])
        number = first + int(np.searchsorted(ends, place, side="right"))
        raise ValueError(
            f"{where}: example {number} has id {flat[place]}, but its vocabulary has the ids 0 to "
            f"{size - 1}. Give the feature the vocabulary that its ids are of"
        )


def digest_beginning(task: Task, split: str) -> str:
    """Digest of the first examples of a split as they are read now: their ids, and their text where
    it is kept.

    It sees what no name, code or file shows: a value that a preprocessor reads from elsewhere.
    """
    chunk = next(read_checked(task, split, probe=True), None)
    digest = hashlib.sha256()
    for name in FEATURES if chunk is not None else ():
        for ids in getattr(chunk, name) or ():
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    if chunk is not None and split != "train":
        digest.update(json.dumps(chunk.rows).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class TextReader:
    """Reader of text, which it tokenizes some thousands of examples at a time, or fewer where they
    are long.

    Attributes:
      rows: returns the examples of a split; receives the counts of this pass, or None.
      pair: vocabularies of (inputs, targets).
      counts: of the last pass over a split, by split and name.
      start: id that begins inputs, and targets that are texts, unless they have it already; None
        for none.
    """

    rows: Callable[[str, dict[str, int] | None], Iterable[TextExample]]
    pair: tuple[TextVocabulary, TextVocabulary]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    start: int | None = None

    def __call__(
        self, split: str, begin: int = 0, epoch: int = 0, probe: bool = False
    ) -> Iterator[Chunk]:
        counts = None if probe else self.counts.get(split)
        examples = itertools.islice(self.rows(split, counts), begin, None)
        typed = 0
        while batch := list(next_batch(examples, BEGINNING if probe else CHUNK)):
            shorter = [drop_typed_ends(self.pair[1], row) for row in batch]
            typed += sum(a.targets != b.targets for a, b in zip(batch, shorter, strict=True))
            if typed and counts is not None:
                counts[TYPED_ENDS] = typed
            inputs = None
            if batch[0].inputs is not None:
                texts = [not_none(row.inputs) for row in batch]
                inputs = vocabularies.encode_texts(self.pair[0], texts)
            inputs, negatives = self.begin_inputs(inputs), None
            if batch[0].negative is not None:
                texts = [not_none(row.negative) for row in shorter]
                negatives = vocabularies.encode_texts(self.pair[1], texts)
            targets = self.encode_targets(shorter, inputs)
            if not isinstance(self.pair[1], LabelVocabulary):
                targets, negatives = self.begin_inputs(targets), self.begin_inputs(negatives)
            yield Chunk(inputs, targets, shorter, negatives)

    def begin_inputs(self, inputs: Any) -> Any:
        """Ids of texts, or None, with `start` before those that do not begin with it."""
        if self.start is None or inputs is None:
            return inputs
        start = np.array([self.start], np.int32)
        begun = [len(ids) > 0 and ids[0] == self.start for ids in inputs]
        return [
            ids if has_start else np.concatenate([start, ids])
            for ids, has_start in zip(inputs, begun, strict=True)
        ]

    def encode_targets(
        self, rows: list[TextExample], inputs: list[np.ndarray] | None
    ) -> list[np.ndarray]:
        """Ids of the targets of examples; tags are one for each of the ids of their inputs."""
        labels = self.pair[1]
        if not isinstance(labels, LabelVocabulary) or labels.outputs != "tags":
            return vocabularies.encode_texts(labels, [row.targets for row in rows])
        tags = [labels.encode_tags(row.inputs or "", row.targets, self.pair[0]) for row in rows]
        return [
            np.pad(ids, (len(whole) - len(ids), 0), constant_values=labels.eos)
            for ids, whole in zip(tags, not_none(inputs), strict=True)
        ]


def drop_typed_ends(vocabulary: TextVocabulary, row: TextExample) -> TextExample:
    """An example whose answers do not end in the text of the end, which no prediction has."""
    references = tuple(vocabularies.drop_typed_end(vocabulary, text) for text in row.references)
    row = row._replace(
        targets=vocabularies.drop_typed_end(vocabulary, row.targets), references=references
    )
    if row.negative is None:
        return row
    return row._replace(negative=vocabularies.drop_typed_end(vocabulary, row.negative))


def next_batch(rows: Iterator[TextExample], size: int) -> Iterator[TextExample]:
    """Yields the next examples, up to `size` of them or CHARACTERS for each of these."""
    characters = 0
    for row in itertools.islice(rows, size):
        yield row
        characters += len(row.targets) + len(row.inputs or "") + len(row.negative or "")
        if characters > size * CHARACTERS:
            return


def cached_tokens(task: Task, split: str, cache_dir: str) -> cache.Tokens:
    """Opens the tokens of a split, written to the cache first if they are not there.

    They are those of its files' content, of the code that reads them, and of its first examples as
    that code reads them now.

    Args:
      task: the task.
      split: of the task.
      cache_dir: folder of cached tokens.
    """
    split_files = SplitFiles(task, split, cache_folder(cache_dir))

    def chunks() -> Iterator[Chunk]:
        yield from read_checked(task, split)
        split_files.check_unchanged()

    identity = {
        "task": task.name,
        "split": split,
        "source": task.source(split),
        "content": list(split_files.digests.values()),
        "beginning": digest_beginning(task, split),
        "vocabularies": [vocabularies.fingerprint(each) for each in task.vocabularies],
    }
    inputs, targets = task.vocabularies
    entry = CacheEntry(
        name=f"{task.name}-{split}",
        identity=identity,
        chunks=chunks(),
        sizes=(inputs.size, targets.size),
        eos=(inputs.eos, targets.eos),
        counts=task.counts.get(split, {}),
        # Training text can be decoded from its ids; only evaluation needs it exactly.
        keep_rows=split != "train",
    )
    other = cache.find_similar(cache_dir, entry, but="beginning")
    if other is not None and digest_beginning(task, split) != identity["beginning"]:
        log.warning(
            "The examples of %s (%s) differ each time they are read: a random preprocessor has no "
            "seed. Its tokens of %s are used; delete %s to read them again",
            task.name,
            split,
            cache.date_of(other),
            other,
        )
        with contextlib.suppress(cache.DamagedTokens):
            return cache.read_folder(other, entry.name)
    return cache.open_tokens(cache_dir, entry)
