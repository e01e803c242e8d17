# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: the built-ins, a user's Files, and what is registered in seqio.

A task says which splits it has, what its vocabularies are, how its examples are read, and what
right answers are measured with. seqio, and with it TensorFlow, is imported only when a name is
not one of ours.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from t5x_lite import config
from t5x_lite.data import cache, corpora, files, grown, pieces, vocabularies
from t5x_lite.data.cache import Chunk
from t5x_lite.data.corpora import Row
from t5x_lite.data.vocabularies import Vocabulary

CHUNK = 4096
CHUNK_CHARACTERS = 4_000_000


class Read(Protocol):
    """Gives chunks of ids from example `begin` of a split on; `epoch` varies what is random."""

    def __call__(self, split: str, begin: int = 0, epoch: int = 0) -> Iterator[Chunk]: ...


@dataclass(frozen=True)
class Task:
    """One source of examples.

    `source(split)` identifies what is read, so that a changed source is seen; `counts` is what
    reading counted so far. `score(split, predictions)` gives the task's own metrics of predictions
    for the first examples of a split, beside `metrics`, which are names of ours. `stamps(split)`
    has what `files.stamps` tells of the split's files, {} for a source without files.
    """

    name: str
    splits: tuple[str, ...]
    vocabularies: tuple[Vocabulary, Vocabulary]
    read: Read
    source: Callable[[str], str]
    has_inputs: bool
    metrics: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    score: Callable[[str, list[str]], dict[str, float]] | None = None
    stamps: Callable[[str], dict[str, list[int]]] = lambda split: {}


def unchanged(task: Task, split: str, before: dict[str, list[int]], source: str) -> None:
    """Returns if the task's source is still the one of which these are the stamps.

    Raises:
      ValueError: it is another one; its files that changed are named.
    """
    if task.source(split) == source:
        return
    found = files.changes(before, task.stamps(split)) or "the source is another one"
    raise ValueError(
        f"The data of {task.name} ({split}) changed while they were read: {found}. Put them back "
        "as they were, or begin in a new MODEL_DIR"
    )


def with_edges(vocabulary: Vocabulary, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text with what begins and ends the vocabulary's sequences."""
    ids = vocabulary.encode_all(texts)
    start, end = vocabularies.edges(vocabulary)
    if not start and not end:
        return ids
    start, end = np.array(start, np.int32), np.array(end, np.int32)
    return [np.concatenate([start, each, end]) for each in ids]


def read_text(
    rows: Callable[[str], Iterable[Row]],
    pair: tuple[Vocabulary, Vocabulary],
    split: str,
    begin: int = 0,
    epoch: int = 0,
) -> Iterator[Chunk]:
    """Rows in ids, some thousands at a time, or fewer where they are long."""
    found = itertools.islice(rows(split), begin, None)
    while batch := list(some(found)):
        inputs = None
        if batch[0].inputs is not None:
            inputs = with_edges(pair[0], [row.inputs for row in batch])
        yield Chunk(inputs, with_edges(pair[1], [row.targets for row in batch]), batch)


def some(rows: Iterator[Row]) -> Iterator[Row]:
    """The next rows up to CHUNK of them, or CHUNK_CHARACTERS."""
    characters = 0
    for row in itertools.islice(rows, CHUNK):
        yield row
        characters += len(row.targets) + len(row.inputs or "")
        if characters > CHUNK_CHARACTERS:
            return


def tokens(task: Task, split: str, cache_dir: str) -> cache.Tokens:
    """The split's ids from the cache, made first if they are not there."""
    source, stamps = task.source(split), task.stamps(split)

    def chunks() -> Iterator[Chunk]:
        yield from task.read(split)
        unchanged(task, split, stamps, source)

    identity = {
        "task": task.name,
        "split": split,
        "source": source,
        "vocabularies": [vocabularies.fingerprint(each) for each in task.vocabularies],
    }
    inputs, targets = task.vocabularies
    entry = cache.Entry(
        name=f"{task.name}-{split}",
        identity=identity,
        chunks=chunks(),
        sizes=(inputs.size, targets.size),
        eos=(inputs.eos, targets.eos),
        counts=task.counts,
        # Training text can be read back from its ids; only evaluation needs it to the letter.
        keep_rows=split != "train",
    )
    return cache.tokens(cache_dir, entry)


@dataclass(frozen=True)
class BuiltIn:
    """A corpus that needs no download. `symbols` None is read as bytes with 100 sentinels."""

    rows: Callable[[str], Iterator[Row]]
    source: Callable[[str], str]
    symbols: list[str] | None
    has_inputs: bool
    metrics: tuple[str, ...]

    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        if self.symbols is None:
            return (vocabularies.Bytes(extra_ids=100),) * 2
        return (
            vocabularies.Symbols(self.symbols),
            vocabularies.Symbols(self.symbols, separator=" "),
        )


DOCSTRINGS = BuiltIn(
    rows=corpora.docstring_rows,
    source=corpora.stdlib_source,
    symbols=None,
    has_inputs=True,
    metrics=("rouge", "bleu", "chrf"),
)
BUILT_IN = {
    "cmudict_g2p": BuiltIn(
        rows=partial(corpora.cmudict_rows, stress=False),
        source=corpora.cmudict_source,
        symbols=corpora.LETTERS + corpora.PHONEMES,
        has_inputs=True,
        metrics=("per", "wer"),
    ),
    "cmudict_g2p_stress": BuiltIn(
        rows=partial(corpora.cmudict_rows, stress=True),
        source=corpora.cmudict_source,
        symbols=corpora.LETTERS + corpora.STRESSED,
        has_inputs=True,
        metrics=("per", "wer"),
    ),
    "python_stdlib": BuiltIn(
        rows=corpora.stdlib_rows,
        source=corpora.stdlib_source,
        symbols=None,
        has_inputs=False,
        metrics=(),
    ),
    "stdlib_docstrings": DOCSTRINGS,
    "stdlib_functions": dataclasses.replace(DOCSTRINGS, rows=corpora.function_rows),
}


def built_in(name: str, vocabulary: config.Vocabulary | None, cache_dir: str) -> Task:
    """The built-in task, with its own vocabulary unless another is given."""
    corpus = BUILT_IN[name]
    if vocabulary is None:
        pair = corpus.vocabularies()
    else:
        source = corpus.source("train")
        pair = make_pair(vocabulary, partial(corpus.rows, "train"), source, cache_dir)
    return Task(
        name=name,
        splits=corpora.SPLITS,
        vocabularies=pair,
        read=partial(read_text, corpus.rows, pair),
        source=corpus.source,
        has_inputs=corpus.has_inputs,
        metrics=corpus.metrics,
    )


def from_files(cfg: config.Files, cache_dir: str) -> Task:
    """A user's own files as a task."""
    counts: dict[str, int] = {}
    rows = lambda split: files.rows(cfg, split, counts)
    source = partial(files.source, cfg)
    pair = make_pair(cfg.vocabulary, lambda: rows("train"), source("train"), cache_dir)
    return Task(
        name=cfg.name,
        splits=files.splits(cfg),
        vocabularies=pair,
        read=partial(read_text, rows, pair),
        source=source,
        has_inputs=cfg.inputs is not None,
        metrics=cfg.metrics,
        counts=counts,
        stamps=partial(files.stamps, cfg),
    )


def make_pair(
    cfg: config.Vocabulary,
    rows: Callable[[], Iterator[Row]],
    source: str,
    cache_dir: str,
) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) that the config names: one for both, or a checkpoint's."""
    if cfg.kind != "checkpoint":
        made = make_vocabulary(cfg, rows, source, cache_dir)
        return made, made
    # Only here is anything read that training or another make has written.
    from t5x_lite.conversion import checkpoint

    inputs, targets = checkpoint.vocabularies(cfg.path)
    grow = partial(grown.grow, names=cfg.names, extra_ids=cfg.extra_ids, pattern=cfg.sentinels)
    return grow(inputs), grow(targets)


def make_vocabulary(
    cfg: config.Vocabulary,
    rows: Callable[[], Iterator[Row]],
    source: str,
    cache_dir: str,
) -> Vocabulary:
    """The vocabulary that the config names; `trained` learns it from rows, once per source."""
    if cfg.names or cfg.sentinels:
        # Names stand below the sentinels, so both are put on top of a vocabulary without any.
        bare = dataclasses.replace(cfg, extra_ids=0, names=(), sentinels=None)
        inner = make_vocabulary(bare, rows, source, cache_dir)
        return grown.grow(inner, cfg.names, cfg.extra_ids, cfg.sentinels)
    if cfg.kind == "bytes":
        return vocabularies.Bytes(cfg.extra_ids)
    if cfg.kind == "trained":
        model = trained_pieces(cfg.size, rows, source, cache_dir)
        return vocabularies.SentencePiece(model, cfg.extra_ids)
    path = Path(cfg.path).expanduser()
    if not path.is_file():
        raise ValueError(f"Vocabulary.path {cfg.path} is not a file")
    kind = vocabularies.KINDS[cfg.kind]
    try:
        return kind(path.read_bytes(), cfg.extra_ids)
    except Exception as error:  # each library raises its own classes, some of them plain Exception
        raise ValueError(f"Vocabulary.path {cfg.path} is no {cfg.kind} model: {error}") from error


def trained_pieces(
    size: int, rows: Callable[[], Iterator[Row]], source: str, cache_dir: str
) -> bytes:
    """A SentencePiece model of `size` pieces, kept in the cache by source and size."""
    identity = json.dumps([pieces.FORMAT, size, source]).encode()
    root = Path(cache_dir).expanduser()
    path = root / f"pieces-{size}-{hashlib.sha256(identity).hexdigest()[:20]}.model"
    if path.exists():
        return path.read_bytes()
    model = pieces.train((text for row in rows() for text in row[:2] if text), size)
    root.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    partial_path.write_bytes(model)
    os.replace(partial_path, path)
    return model


def resolve(cfg: config.Data) -> list[tuple[Task, float]]:
    """The tasks that Data.task stands for, with their rates; a task alone has rate 1.

    Raises ValueError for an unknown name, listing near ones, and for tasks of different
    vocabularies.
    """
    if not isinstance(cfg.task, config.Mixture):
        return found_tasks(cfg.task, cfg)
    parts = []
    for each, rate in zip(cfg.task.tasks, cfg.task.rates, strict=True):
        found = found_tasks(each, cfg)
        total = sum(inner for _, inner in found)
        parts += [(task, rate * inner / total) for task, inner in found]
    if len({task.name for task, _ in parts}) < len(parts):
        names = ", ".join(task.name for task, _ in parts)
        raise ValueError(f"Mixture.tasks names a task twice: {names}. Add up its rates instead")
    marks = {
        task.name: [vocabularies.fingerprint(each) for each in task.vocabularies]
        for task, _ in parts
    }
    different = [name for name in marks if marks[name] != marks[parts[0][0].name]]
    if different:
        raise ValueError(
            f"Mixture.tasks must share one vocabulary: {', '.join(different)} have another than "
            f"{parts[0][0].name}"
        )
    return parts


def found_tasks(task: str | config.Files, cfg: config.Data) -> list[tuple[Task, float]]:
    """One entry of Data.task, which may itself be a Mixture of seqio."""
    if isinstance(task, config.Files):
        if cfg.vocabulary is not None:
            raise ValueError("Data.vocabulary is for built-in tasks; here it is Files.vocabulary")
        return [(from_files(task, cfg.cache_dir), 1.0)]
    if task in BUILT_IN:
        return [(built_in(task, cfg.vocabulary, cfg.cache_dir), 1.0)]
    if importlib.util.find_spec("seqio"):
        from t5x_lite.data import seqio_tasks

        found, registered = seqio_tasks.find(task, cfg), seqio_tasks.names()
    else:
        found, registered = None, []
    if found is None:
        known = [*BUILT_IN, *registered]
        near = difflib.get_close_matches(task, known, n=5, cutoff=0.4)
        listed = f"near: {', '.join(near)}" if near else f"known: {', '.join(sorted(known)[:20])}"
        raise ValueError(
            f"Data.task {task!r} is not registered ({listed}). A seqio Task or Mixture of your own "
            'must be imported first: --import=your_module (and needs pip install "t5x_lite[seqio]")'
        )
    return found


def having(cfg: config.Data, split: str) -> list[tuple[Task, float]]:
    """Those of the tasks that have the split, as seqio's mixtures read it.

    Raises ValueError if none has it.
    """
    found = resolve(cfg)
    with_split = [(task, rate) for task, rate in found if split in task.splits]
    if not with_split:
        names = sorted({name for task, _ in found for name in task.splits})
        raise ValueError(
            f"{', '.join(task.name for task, _ in found)} has no split {split!r}; there are: "
            f"{', '.join(names) or 'none'}"
        )
    return with_split
