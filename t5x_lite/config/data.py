# SPDX-License-Identifier: Apache-2.0
"""Config of data: tasks, files and mixtures, their vocabulary, and the layout of rows."""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    MOST_SENTINELS,
    MOST_TOKENS,
    AnyPath,
    Checked,
    CountOrZero,
    Length,
    LocalPath,
    Positive,
    Range,
    SourcePath,
    require,
)
from t5x_lite.config.objectives import (
    CausalLM,
    Denoisers,
    FillInTheMiddle,
    MaskedNames,
    NameTags,
    PrefixLM,
    SpanCorruption,
)
from t5x_lite.config.readout import Readout
from t5x_lite.utils.paths import CACHE

# A token and its end.
RowLength = Annotated[int, Range(2, MOST_TOKENS)]


@dataclass(frozen=True)
class Vocabulary(Checked):
    """Mapping between text and token ids.

    Attributes:
      kind: bytes; a sentencepiece model or a tokenizer_json at `path`; a SentencePiece model
        trained on the task's text; or that of the checkpoint at `path`, of any format, as a run
        needs that begins with its weights.
      path: file or checkpoint; of a model of the hub, owner/name:FILE or owner/name.
      size: number of pieces of a trained model.
      extra_ids: sentinels added at the top of the vocabulary; span corruption needs them.
      names: texts that are one id each, added below the sentinels (UL2's mode tokens); those that
        a checkpoint has already are not added again.
      sentinels: pieces that are there already and serve as sentinels instead, with {} for their
        number: "<unused{}>".
      source_language: code of the language of inputs, whose id begins them where the checkpoint's
        tokenizer has languages (M2M100, NLLB, mBART-50); None takes the tokenizer's own.
      target_language: code of the language of targets, likewise; Marian's models of several
        languages read it before the inputs.
    """

    kind: Literal["bytes", "sentencepiece", "tokenizer_json", "trained", "checkpoint"]
    path: SourcePath | None = None
    size: Length | None = None
    extra_ids: Annotated[int, Range(0, MOST_SENTINELS)] = 0
    names: tuple[str, ...] = ()
    sentinels: str | None = None
    source_language: str | None = None
    target_language: str | None = None

    def check(self):
        needs_path = self.kind in ("sentencepiece", "tokenizer_json", "checkpoint")
        require(not needs_path or self.path, f"Vocabulary.path is needed for kind {self.kind}")
        require(self.kind != "trained" or self.size, "Vocabulary.size is needed for kind trained")
        require(len(set(self.names)) == len(self.names), "Vocabulary.names has a name twice")
        require(
            self.sentinels is None or not self.extra_ids,
            "Vocabulary.sentinels names pieces that are there; Vocabulary.extra_ids adds new ones: "
            "bind one of them",
        )
        require(
            self.sentinels is None or "{}" in self.sentinels,
            'Vocabulary.sentinels needs {} for the number: "<unused{}>"',
        )

        require(
            self.kind == "checkpoint" or self.source_language is self.target_language is None,
            "Vocabulary.source_language and Vocabulary.target_language name languages of a "
            'checkpoint\'s tokenizer: bind Vocabulary.kind = "checkpoint"',
        )

    @property
    def sentinel_count(self) -> int | None:
        """Number of sentinels; None if only the vocabulary's file has it."""
        bare = self.kind in ("bytes", "trained") and self.sentinels is None
        return self.extra_ids if bare or self.extra_ids else None

    def most_ids(self, text: str | None) -> int:
        """Upper bound on the ids of a text: its bytes, and one for a leading space."""
        if text is None:
            return 0
        return 1 if text in self.names else 1 + len(text.encode())


@dataclass(frozen=True)
class Files(Checked):
    """A user's own data, without Python.

    Attributes:
      name: name of the task.
      train: files of the training split, as a glob.
      vocabulary: how the text becomes ids.
      validation: files of the validation split.
      test: files of the test split.
      format: format of the files; None reads it from their ending, before .gz, .bz2, .xz or .zst.
        A `text` file has one example per line: its targets. `tsv` and `csv` name their columns in
        the first line. `json` is an array of objects, or one object per line as `jsonl`.
      inputs: field of the inputs, or a template with fields in braces, "translate English to
        German: {translation.en}"; a dot leads into a field of a field. None means text without a
        source (language modeling).
      targets: field of the targets, or a template. A list of texts is a list of right answers, of
        which the first is trained on.
      negatives: field of a text that is no right answer to these inputs, or a template: a hard
        negative of contrastive training (Run.contrastive); None for none.
      rejected: field of a text that is worse than the targets, or a template, for
        `Run.preferences`; None for examples without one. Evaluation reads the targets alone.
      reference: fields of the log-probabilities, in nats, that a reference model gives the targets
        and the rejected text; None for none.
      metrics: metrics of the task.
      whole_files: a `text` file is one example.
      broken: what a line that cannot be read does: stop, or skip, which is counted.
      quotes: cells of a tsv file are quoted as csv writers, pandas and spreadsheets do where they
        hold a tab, a quote or the end of a line; False keeps every quote; None refuses a cell that
        looks quoted. A csv file always has such quotes.
      delimiter: character between the cells of a csv file; None is a comma.
      numbers: fields that are numbers are read as text, as Python writes them.
      labels: names of the labels in `targets` by number, from 0; () for targets that are text or,
        with Model.readout, names.
      superglue: the task whose files, as SuperGLUE ships them, these are; inputs are T5's prompts
        and targets the answers, one example for each question.
    """

    name: str
    train: AnyPath
    vocabulary: Vocabulary
    validation: AnyPath | None = None
    test: AnyPath | None = None
    format: Literal["jsonl", "json", "tsv", "csv", "text", "parquet"] | None = None
    inputs: str | None = None
    targets: str = "targets"
    negatives: str | None = None
    rejected: str | None = None
    reference: tuple[str, str] | None = None
    metrics: tuple[str, ...] = ("exact_match",)
    whole_files: bool = False
    broken: Literal["stop", "skip"] = "stop"
    quotes: bool | None = None
    delimiter: str | None = None
    numbers: bool = False
    labels: tuple[str, ...] = ()
    superglue: Literal["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"] | None = (
        None
    )

    def check(self):
        if self.superglue is not None:
            require(
                self.inputs in (None, "inputs") and self.targets == "targets",
                "Files.superglue makes inputs and targets itself: leave out Files.inputs and "
                "Files.targets",
            )
            object.__setattr__(self, "inputs", "inputs")
        require(
            self.delimiter is None
            or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n\0'),
            f"Files.delimiter must be one character, and no quote; got {self.delimiter!r}",
        )
        require(
            self.delimiter is None or self.format in (None, "csv"),
            'Files.delimiter is for csv files: set Files.format = "csv"',
        )
        require(
            self.reference is None or (self.rejected is not None and self.broken == "stop"),
            'Files.reference scores every pair: bind Files.rejected too, and Files.broken = "stop"',
        )


@dataclass(frozen=True)
class HubDataset(Checked):
    """A dataset of the Hugging Face hub, read by the datasets library (extra `hub-data`).

    Attributes:
      name: owner/name on the hub, or a folder that is laid out as one there.
      vocabulary: how the text becomes ids.
      config: name of its configuration ("subset"); None for the only one.
      revision: branch, tag or commit; None is the main branch.
      train: its split for training.
      validation: its split for validation.
      test: its split for the test.
      inputs: column of the inputs or a template, as in `Files`; None means text alone.
      targets: column of the targets or a template. Labels that the dataset names are text.
      negatives: column of hard negatives or a template, as in `Files`.
      rejected: column of a text that is worse than the targets, or a template, as in `Files`.
      metrics: metrics of the task.
      streaming: reads the dataset as it is needed, without a copy on this machine; a folder is
        always read so.
      broken: what a row that cannot be read does: stop, or skip, which is counted.
      numbers: columns that are numbers are read as text, as Python writes them.
      labels: names of the labels in `targets` by number, where the dataset does not have them.
    """

    name: LocalPath
    vocabulary: Vocabulary
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    inputs: str | None = None
    targets: str = "targets"
    negatives: str | None = None
    rejected: str | None = None
    metrics: tuple[str, ...] = ("exact_match",)
    streaming: bool = False
    broken: Literal["stop", "skip"] = "stop"
    numbers: bool = False
    labels: tuple[str, ...] = ()


# Sources of text that the config describes.
TextSource = Files | HubDataset


@dataclass(frozen=True)
class Mixture(Checked):
    """Several tasks with the same vocabularies, but for the languages that these begin texts with.

    Attributes:
      tasks: their names, Files or HubDatasets.
      rates: the proportion in which their examples are drawn.
    """

    tasks: tuple[str | Files | HubDataset, ...]
    rates: tuple[Positive, ...]

    def check(self):
        require(len(self.tasks) > 0, "Mixture.tasks is empty")
        require(
            len(self.tasks) == len(self.rates),
            f"Mixture.rates needs one rate for each of the {len(self.tasks)} tasks; got "
            f"{len(self.rates)}",
        )
        named = [task.vocabulary for task in self.tasks if not isinstance(task, str)]
        for side in ("source_language", "target_language"):
            bound = [getattr(each, side) is not None for each in named]
            require(
                all(bound) or not any(bound),
                f"Vocabulary.{side} is bound for some of Mixture.tasks: bind it for each of them, "
                "or for none",
            )


@dataclass(frozen=True)
class Data(Checked):
    """Source of the examples, and their layout in rows.

    Attributes:
      task: a built-in task or a registered seqio Task or Mixture by its name, Files, a
        HubDataset, or a Mixture.
      lengths: tokens per row, {"inputs": 64, "targets": 64}; a decoder alone uses their sum.
      objective: cuts inputs and targets from the task's text (its targets); None trains on the
        task's own inputs and targets.
      pack: puts several examples into a row.
      eval_split: split that is evaluated.
      vocabulary: replaces that of a built-in task.
      cache_dir: folder of cached tokens.
      stream: reads the training split anew instead of caching its tokens, for sources too large
        for `cache_dir`.
      readout: what the targets are in place of text; None takes Model.readout.
      start: id that begins the inputs, and targets to be compared with them; None takes that of a
        decoder alone with Model.readout.
    """

    task: str | Files | HubDataset | Mixture
    lengths: dict[str, RowLength]
    objective: (
        SpanCorruption
        | PrefixLM
        | CausalLM
        | FillInTheMiddle
        | MaskedNames
        | NameTags
        | Denoisers
        | None
    ) = None
    pack: bool = True
    eval_split: str = "validation"
    vocabulary: Vocabulary | None = None
    cache_dir: LocalPath = CACHE
    stream: bool = False
    readout: Readout | None = None
    start: CountOrZero | None = None

    def check(self):
        unknown = set(self.lengths) - {"inputs", "targets"}
        require(not unknown, f"Data.lengths has unknown features {sorted(unknown)}")
        require("targets" in self.lengths, 'Data.lengths needs "targets"')
        require(
            self.readout is None or self.objective is None,
            "Data.objective makes targets of running text: it goes with no Model.readout",
        )

    @property
    def tasks(self) -> tuple[str | Files | HubDataset, ...]:
        """The task, or those of the mixture."""
        return self.task.tasks if isinstance(self.task, Mixture) else (self.task,)

    @property
    def has_negatives(self) -> bool:
        """True if a task has hard negatives."""
        return any(getattr(task, "negatives", None) is not None for task in self.tasks)

    @property
    def declared_vocabulary(self) -> Vocabulary | None:
        """Vocabulary of the targets, if the config has it; None for a task with its own."""
        declared = (task.vocabulary for task in self.tasks if isinstance(task, Files | HubDataset))
        return self.vocabulary or next(declared, None)
