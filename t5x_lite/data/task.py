# SPDX-License-Identifier: Apache-2.0
"""A task: its splits, its vocabularies, the reader of its examples, and its metrics."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from t5x_lite.data import cache, files
from t5x_lite.data.cache import Chunk
from t5x_lite.data.corpora import TextExample
from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none

CHUNK = 4096
CHUNK_CHARACTERS = 4_000_000
TYPED_ENDS = "targets end in the end-of-sequence token as text, which is read once"


class ExampleReader(Protocol):
    """Reader of chunks of ids from example `begin` of a split on; `epoch` seeds random
    preprocessors."""

    def __call__(self, split: str, begin: int = 0, epoch: int = 0) -> Iterator[Chunk]: ...


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
      source: returns a digest of what a split is read from, to detect a changed source.
      has_inputs: false for text alone.
      metrics: names of metrics of ours.
      counts: counts of the reader in its last pass over a split (broken lines), by split and name.
      score: computes the task's own metrics, in addition to `metrics`, of predictions for the first
        examples of a split.
      unsupported_metrics: reasons by name of own metrics that `score` leaves out.
      stamps: returns `files.stamps` of a split's files, {} for a source without files.
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
    stamps: Callable[[str], dict[str, list[int]]] = lambda split: {}


def check_unchanged(task: Task, split: str, before: dict[str, list[int]], source: str) -> None:
    """Checks that the source of a split did not change while it was read.

    Args:
      task: the task.
      split: of the task.
      before: its stamps before reading.
      source: its digest before reading.

    Raises:
      DataChangedError: it changed; the message names the files.
    """
    if task.source(split) == source:
        return
    changes = files.describe_changes(before, task.stamps(split)) or "the source is another one"
    raise DataChangedError(
        f"The data of {task.name} ({split}) changed while they were read: {changes}. Put them back "
        "as they were, or begin in a new MODEL_DIR"
    )


def read_text(
    rows: Callable[[str], Iterable[TextExample]],
    pair: tuple[TextVocabulary, TextVocabulary],
    split: str,
    begin: int = 0,
    epoch: int = 0,
    *,
    counts: dict[str, dict[str, int]] | None = None,
) -> Iterator[Chunk]:
    """Tokenizes examples, some thousands at a time, or fewer where they are long.

    Args:
      rows: returns the examples of a split.
      pair: vocabularies of (inputs, targets).
      split: of the task.
      begin: number of the first example.
      epoch: unused; text is the same in every epoch.
      counts: receives, by split, the number of targets that had an end of their own.
    """
    examples = itertools.islice(rows(split), begin, None)
    typed = 0
    while batch := list(next_batch(examples)):
        shorter = [drop_typed_ends(pair[1], row) for row in batch]
        typed += sum(a.targets != b.targets for a, b in zip(batch, shorter, strict=True))
        if typed and counts is not None:
            counts[split][TYPED_ENDS] = typed
        inputs = None
        if batch[0].inputs is not None:
            inputs = vocabularies.encode_texts(pair[0], [not_none(row.inputs) for row in batch])
        targets = vocabularies.encode_texts(pair[1], [row.targets for row in shorter])
        yield Chunk(inputs, targets, shorter)


def drop_typed_ends(vocabulary: TextVocabulary, row: TextExample) -> TextExample:
    """An example whose answers do not end in the text of the end, which no prediction has."""
    references = tuple(vocabularies.drop_typed_end(vocabulary, text) for text in row.references)
    return row._replace(
        targets=vocabularies.drop_typed_end(vocabulary, row.targets), references=references
    )


def next_batch(rows: Iterator[TextExample]) -> Iterator[TextExample]:
    """Yields the next examples, up to CHUNK of them or CHUNK_CHARACTERS."""
    characters = 0
    for row in itertools.islice(rows, CHUNK):
        yield row
        characters += len(row.targets) + len(row.inputs or "")
        if characters > CHUNK_CHARACTERS:
            return


def cached_tokens(task: Task, split: str, cache_dir: str) -> cache.Tokens:
    """Opens the tokens of a split, written to the cache first if they are not there.

    Args:
      task: the task.
      split: of the task.
      cache_dir: folder of cached tokens.
    """
    source, stamps = task.source(split), task.stamps(split)

    def chunks() -> Iterator[Chunk]:
        yield from task.read(split)
        check_unchanged(task, split, stamps, source)

    identity = {
        "task": task.name,
        "split": split,
        "source": source,
        "vocabularies": [vocabularies.fingerprint(each) for each in task.vocabularies],
    }
    inputs, targets = task.vocabularies
    entry = cache.CacheEntry(
        name=f"{task.name}-{split}",
        identity=identity,
        chunks=chunks(),
        sizes=(inputs.size, targets.size),
        eos=(inputs.eos, targets.eos),
        counts=task.counts.get(split, {}),
        # Training text can be decoded from its ids; only evaluation needs it exactly.
        keep_rows=split != "train",
    )
    return cache.open_tokens(cache_dir, entry)
