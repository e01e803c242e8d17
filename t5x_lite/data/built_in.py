# SPDX-License-Identifier: Apache-2.0
"""Tasks that the config describes: built-in corpora, a user's files, and their vocabularies."""

import dataclasses
import hashlib
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.checkpoints.sources import locate_file
from t5x_lite.checkpoints.text_settings import read_text_settings
from t5x_lite.data import content, corpora, files, hub_datasets
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.target_form import TEXT, TargetForm, describe_label
from t5x_lite.data.task import Task, TextReader
from t5x_lite.tokenizers import extended, languages, sentencepiece_training, vocabularies
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import cache_folder


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
    "letter_successors": BuiltIn(
        rows=corpora.successor_rows,
        source=corpora.successor_source,
        symbols=list(string.ascii_lowercase),
        has_inputs=True,
        metrics=("exact_match",),
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


def built_in_task(
    name: str, vocabulary: config.Vocabulary | None, cache_dir: str, form: TargetForm = TEXT
) -> Task:
    """Opens a built-in task.

    Args:
      name: a key of BUILT_IN.
      vocabulary: for both sides; None is that of the task.
      cache_dir: folder of trained vocabularies.
      form: of its examples.
    """
    corpus = BUILT_IN[name]
    if vocabulary is None:
        pair = corpus.vocabularies()
    else:
        text = TrainingText(partial(corpus.rows, "train"), partial(corpus.source, "train"))
        pair = vocabulary_pair(vocabulary, text, cache_dir)
    pair = form.label_targets(pair)
    return Task(
        name=name,
        splits=corpora.SPLITS,
        vocabularies=pair,
        read=TextReader(lambda split, counts: corpus.rows(split), pair, start=form.start),
        source=form.extend_source(corpus.source),
        has_inputs=corpus.has_inputs,
        metrics=corpus.metrics,
    )


class TrainingText(NamedTuple):
    """Text that a vocabulary may be trained on.

    Attributes:
      rows: returns its examples.
      source: returns a digest of it.
    """

    rows: Callable[[], Iterator[TextExample]]
    source: Callable[[], str]


def training_text(
    every: Sequence[config.TextSource], cache_dir: str, readout: config.Readout | None = None
) -> TrainingText:
    """Training text of one or more Files or datasets, one after the other.

    Args:
      every: the Files or datasets.
      cache_dir: folder that remembers digests.
      readout: what the targets are; None for text. Labels are no text to train on.
    """

    def rows() -> Iterator[TextExample]:
        for each in every:
            # Without counts: what is left out is counted where tokens are read.
            for row in read_training_rows(each, readout):
                yield row if readout is None else row._replace(targets="")

    def source() -> str:
        parts, folder = [], cache_folder(cache_dir)
        for each in every:
            if isinstance(each, config.Files):
                digests = content.digest_files(files.list_paths(each, "train"), folder)
                parts.append([files.source(each, "train"), *digests.values()])
            else:
                digests = content.digest_files(hub_datasets.list_paths(each, "train"), folder)
                digests |= hub_datasets.remote_identity(each, "train")
                parts.append([hub_datasets.source(each, "train"), *digests.values()])
        if readout is not None:
            parts.append(["inputs alone", readout.kind])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    return TrainingText(rows, source)


def read_training_rows(
    cfg: config.TextSource, readout: config.Readout | None = None
) -> Iterator[TextExample]:
    """Yields the training examples of Files or a dataset, as `files.read_rows` does."""
    if isinstance(cfg, config.Files):
        return files.read_rows(cfg, "train", readout=readout)
    return hub_datasets.read_rows(cfg, "train", readout=readout)


def from_hub(
    cfg: config.HubDataset,
    cache_dir: str,
    trained_on: Sequence[config.TextSource] = (),
    form: TargetForm = TEXT,
) -> Task:
    """A dataset of the hub as a task.

    Args:
      cfg: the dataset.
      cache_dir: folder of trained vocabularies.
      trained_on: sources whose text trains a `trained` vocabulary; none means `cfg` alone.
      form: of its examples.
    """
    splits = files.list_splits(cfg)
    counts: dict[str, dict[str, int]] = {split: {} for split in splits}
    pair = open_vocabulary_pair(cfg, cache_dir, trained_on, form)
    rows = partial(hub_datasets.read_rows, cfg, describe=describe_words(pair), readout=form.readout)
    return Task(
        name=hub_datasets.task_name(cfg),
        splits=splits,
        vocabularies=pair,
        read=TextReader(rows, pair, counts, form.start),
        source=form.extend_source(partial(hub_datasets.source, cfg)),
        has_inputs=cfg.inputs is not None,
        metrics=cfg.metrics,
        counts=counts,
        files=partial(hub_datasets.list_paths, cfg),
        remote=partial(hub_datasets.remote_identity, cfg),
        paired=cfg.rejected is not None,
    )


def from_files(
    cfg: config.Files,
    cache_dir: str,
    trained_on: Sequence[config.TextSource] = (),
    form: TargetForm = TEXT,
) -> Task:
    """A user's own files as a task.

    Args:
      cfg: the files.
      cache_dir: folder of trained vocabularies.
      trained_on: Files whose text trains a `trained` vocabulary; none means `cfg` alone.
      form: of its examples.
    """
    splits = files.list_splits(cfg)
    counts: dict[str, dict[str, int]] = {split: {} for split in splits}
    pair = open_vocabulary_pair(cfg, cache_dir, trained_on, form)
    rows = partial(files.read_rows, cfg, describe=describe_words(pair), readout=form.readout)
    return Task(
        name=cfg.name,
        splits=splits,
        vocabularies=pair,
        read=TextReader(rows, pair, counts, form.start),
        source=form.extend_source(partial(files.source, cfg)),
        has_inputs=cfg.inputs is not None,
        metrics=cfg.metrics,
        counts=counts,
        files=partial(files.list_paths, cfg),
        paired=cfg.rejected is not None,
        reference=None if cfg.reference is None else partial(files.read_reference, cfg),
    )


def open_vocabulary_pair(
    cfg: config.TextSource,
    cache_dir: str,
    trained_on: Sequence[config.TextSource],
    form: TargetForm,
) -> tuple[TextVocabulary, TextVocabulary]:
    """Vocabularies (inputs, targets) of Files or a dataset; arguments as of `from_files`.

    Args:
      cfg: the files or the dataset.
      cache_dir: folder of trained vocabularies.
      trained_on: sources whose text trains a `trained` vocabulary; none means `cfg` alone.
      form: of the examples.
    """
    text = training_text(trained_on or [cfg], cache_dir, form.readout)
    return form.label_targets(vocabulary_pair(cfg.vocabulary, text, cache_dir))


def describe_words(
    pair: tuple[TextVocabulary, TextVocabulary],
) -> Callable[[TextExample], str] | None:
    """Function that returns the reason why an example is not numbers or labels of the vocabularies,
    "" if it is; None for vocabularies that read any text."""
    if isinstance(pair[1], LabelVocabulary):
        return partial(describe_label, pair[0], pair[1])
    checked = [isinstance(each, vocabularies.IntegerVocabulary) for each in pair]

    def describe(row: TextExample) -> str:
        sides = ([row.inputs or ""], row.references or (row.targets,))
        try:
            for vocabulary, numbers, texts in zip(pair, checked, sides, strict=True):
                if numbers:
                    vocabulary.encode_all(texts)
        except ValueError as error:
            return str(error)
        return ""

    return describe if any(checked) else None


def vocabulary_pair(
    cfg: config.Vocabulary, text: TrainingText, cache_dir: str
) -> tuple[TextVocabulary, TextVocabulary]:
    """Vocabularies (inputs, targets) that the config names: one for both, or a checkpoint's.

    Args:
      cfg: the vocabulary.
      text: for a vocabulary that is trained.
      cache_dir: folder of trained vocabularies.

    Raises:
      ValueError: the checkpoint's tokenizer has no such language.
    """
    if cfg.kind != "checkpoint":
        vocabulary = build_vocabulary(cfg, text, cache_dir)
        return vocabulary, vocabulary
    pair = read_text_settings(not_none(cfg.path)).vocabularies
    try:
        inputs, targets = languages.set_languages(pair, cfg.source_language, cfg.target_language)
    except ValueError as error:
        raise ValueError(f"The vocabulary of {cfg.path}: {error}") from error
    grow = partial(
        extended.extend_vocabulary, names=cfg.names, extra_ids=cfg.extra_ids, pattern=cfg.sentinels
    )
    return grow(inputs), grow(targets)


def build_vocabulary(cfg: config.Vocabulary, text: TrainingText, cache_dir: str) -> TextVocabulary:
    """Vocabulary that the config names; `trained` learns it from a text, once for its content.

    Args:
      cfg: the vocabulary.
      text: for a vocabulary that is trained.
      cache_dir: folder of trained vocabularies.

    Raises:
      ValueError: Vocabulary.path is not a file of this kind.
    """
    if cfg.names or cfg.sentinels:
        # Names stand below the sentinels, so both are added to a vocabulary without any.
        bare = dataclasses.replace(cfg, extra_ids=0, names=(), sentinels=None)
        inner = build_vocabulary(bare, text, cache_dir)
        return extended.extend_vocabulary(inner, cfg.names, cfg.extra_ids, cfg.sentinels)
    if cfg.kind == "bytes":
        return vocabularies.ByteVocabulary(cfg.extra_ids)
    if cfg.kind == "trained":
        model = train_pieces(not_none(cfg.size), text, cache_dir)
        return vocabularies.SentencePieceVocabulary(model, cfg.extra_ids)
    path = locate_file(not_none(cfg.path))
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


def train_pieces(size: int, text: TrainingText, cache_dir: str) -> bytes:
    """Trains a SentencePiece model, or reads it from the cache.

    Args:
      size: number of pieces.
      text: to train on.
      cache_dir: folder of trained vocabularies.

    Returns:
      The bytes of the model's file.
    """
    identity = json.dumps([sentencepiece_training.FORMAT, size, text.source()]).encode()
    root = cache_folder(cache_dir)
    path = root / f"pieces-{size}-{hashlib.sha256(identity).hexdigest()[:20]}.checked"
    kept = content.read_checked(path)
    if kept is not None:
        return kept
    model = sentencepiece_training.train_sentencepiece(
        (side for row in text.rows() for side in row[:2] if side), size
    )
    root.mkdir(parents=True, exist_ok=True)
    content.write_checked(path, model)
    return model
