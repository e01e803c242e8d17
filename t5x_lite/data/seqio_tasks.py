# SPDX-License-Identifier: Apache-2.0
"""seqio, in both directions: registered Tasks and Mixtures as ours, and ours registered there.

Importing this module imports TensorFlow; only `tasks.resolve` does so, for a name that is not one
of ours, and a user's own module that calls `register_built_ins`.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite import config
from t5x_lite.data import built_in, seqio_metrics
from t5x_lite.data.code_identity import code_digest
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.seqio_objectives import preprocessor as preprocessor
from t5x_lite.data.task import BEGINNING, CHUNK, Task, TaskScores, check_ids, read_checked
from t5x_lite.data.token_writer import Chunk
from t5x_lite.tokenizers.seqio_vocabularies import SeqioVocabulary as SeqioVocabulary
from t5x_lite.tokenizers.seqio_vocabularies import from_seqio as from_seqio
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none

# They take lengths only to trim, which is done, and counted, when rows are built.
TRIMMING = (seqio.preprocessors.append_eos_after_trim,)

REGISTERED: dict[str, Task] = {}  # ours that stand in seqio's registry


def names() -> list[str]:
    """Names of all Tasks and Mixtures that are registered in seqio."""
    return sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})


def find_tasks(name: str, cfg: config.Data) -> list[tuple[Task, float]] | None:
    """Tasks of a registered Task or Mixture with their rates; None if the name is unknown."""
    if name not in names():
        return None
    if cfg.vocabulary is not None:
        raise ValueError(
            f"{name} is a seqio task with its own vocabulary: leave out Data.vocabulary"
        )
    registered = seqio.get_mixture_or_task(name)
    if isinstance(registered, seqio.Task):
        return [(adapt_task(registered, cfg), 1.0)]
    rates = [(task, registered.get_rate(task)) for task in registered.tasks]
    return [(adapt_task(task, cfg), rate) for task, rate in rates if rate > 0]


def adapt_task(task: seqio.Task, cfg: config.Data) -> Task:
    """Converts a seqio Task to ours; for one that `register` added, returns the original.

    Raises ValueError if it has no feature "targets", or a vocabulary that cannot be saved.
    """
    if task.name in REGISTERED:
        return REGISTERED[task.name]
    features = task.output_features
    if "targets" not in features:
        raise ValueError(
            f'{task.name} has no output feature "targets", only {", ".join(map(repr, features))}'
        )
    targets = from_seqio(features["targets"], f"{task.name}, targets")
    inputs = (
        from_seqio(features["inputs"], f"{task.name}, inputs") if "inputs" in features else targets
    )
    cut_to = cfg.lengths if any(map(needs_lengths, task.preprocessors)) else None
    pair = (inputs, targets)
    return Task(
        name=task.name,
        splits=tuple(task.splits),
        vocabularies=pair,
        read=SeqioReader(task, cut_to, pair),
        source=functools.partial(source, task, cut_to),
        files=functools.partial(local_files, task),
        has_inputs="inputs" in features,
        metrics=(),
        score=make_score(task, cut_to) if task.predict_metric_fns else None,
        unsupported_metrics=seqio_metrics.unsupported_metrics(task),
    )


def needs_lengths(preprocessor: Callable) -> bool:
    """True if a preprocessor cuts text up by length, as t5's span_corruption does, and does not
    only trim."""
    if preprocessor in TRIMMING:
        return False
    return "sequence_length" in inspect.signature(preprocessor).parameters


def load_dataset(task: seqio.Task, cut_to: dict | None, split: str, seed: int) -> tf.data.Dataset:
    """Loads a task's examples in source order, not trimmed.

    Args:
      task: of seqio.
      cut_to: lengths for preprocessors that cut text up, or None.
      split: of the task.
      seed: of random preprocessors.
    """
    examples = task.source.get_dataset(split=split, shuffle=False)
    examples = task.preprocess_precache(examples, seed=seed)
    return task.preprocess_postcache(examples, sequence_length=cut_to, seed=seed)


def as_text(value, vocabulary: TextVocabulary, ids: np.ndarray) -> str:
    """Text of one side of an example.

    Args:
      value: the pretokenized text, if the task kept it.
      vocabulary: decodes the ids where there is no text.
      ids: of the example.
    """
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else vocabulary.decode(ids)


@dataclass(frozen=True)
class SeqioReader:
    """Reader of a seqio Task.

    Attributes:
      task: of seqio.
      cut_to: lengths for preprocessors that cut text up, or None.
      pair: vocabularies of (inputs, targets).
    """

    task: seqio.Task
    cut_to: dict | None
    pair: tuple[TextVocabulary, TextVocabulary]

    def __call__(
        self, split: str, begin: int = 0, epoch: int = 0, probe: bool = False
    ) -> Iterator[Chunk]:
        """Reads the examples of a split.

        Args:
          split: of the task.
          begin: number of the first example.
          epoch: seed of random preprocessors.
          probe: true for chunks of BEGINNING examples.

        Raises:
          ValueError: the preprocessors return no inputs or targets, or no ids.
        """
        name, features = self.task.name, self.task.output_features
        dataset = load_dataset(self.task, self.cut_to, split, seed=epoch)
        examples = dataset.skip(begin).as_numpy_iterator()
        while batch := list(itertools.islice(examples, BEGINNING if probe else CHUNK)):
            absent = {"inputs", "targets"} & set(features) - set(batch[0])
            if absent:
                raise ValueError(
                    f"{name}: its preprocessors return no {', '.join(sorted(absent))}, only "
                    f"{', '.join(batch[0])}"
                )
            targets = [np.asarray(each["targets"]) for each in batch]
            inputs = None
            if "inputs" in features:
                inputs = [np.asarray(each["inputs"]) for each in batch]
                check_ids(f"{name} ({split}), inputs", inputs, self.pair[0].size, begin)
            check_ids(f"{name} ({split}), targets", targets, self.pair[1].size, begin)
            begin += len(batch)
            rows = [make_example(each, self.pair) for each in batch] if split != "train" else None
            yield Chunk(inputs, targets, rows)


def make_example(example: dict, pair: tuple[TextVocabulary, TextVocabulary]) -> TextExample:
    """Example of seqio as text; pair decodes the ids where the text was not kept."""
    targets = as_text(example.get("targets_pretokenized"), pair[1], example["targets"])
    inputs = None
    if "inputs" in example:
        inputs = as_text(example.get("inputs_pretokenized"), pair[0], example["inputs"])
    return TextExample(inputs, targets, (targets,))


def make_score(task: seqio.Task, cut_to: dict | None) -> Callable[[str, list[str]], TaskScores]:
    """Function that computes a task's own metrics of predictions for a split."""
    load = functools.partial(load_dataset, task, cut_to)
    return functools.partial(seqio_metrics.score_predictions, task, load)


def local_files(task: seqio.Task, split: str) -> list[Path]:
    """Files of this machine that a split is read from, in the order of the source."""
    return [path for path in map(Path, list_shards(task, split)) if path.is_file()]


def list_shards(task: seqio.Task, split: str) -> list[str]:
    """Files that a source names for a split; [] for one that reads no files, or does not name them.

    Raises ValueError if a source of files has none.
    """
    if isinstance(task.source, seqio.FunctionDataSource):
        return []
    try:
        shards = list(task.source.list_shards(split))
    except NotImplementedError:
        return []
    if not shards:
        raise ValueError(f"{task.name}: the source of its split {split} matches no file")
    return shards


def source(task: seqio.Task, cut_to: dict | None, split: str) -> str:
    """Digest of a task's source and preprocessors by their code, and of files elsewhere by their
    names and sizes.

    Args:
      task: of seqio.
      cut_to: lengths for preprocessors that cut text up, or None.
      split: of the task.
    """
    shards = [name for name in list_shards(task, split) if not Path(name).is_file()]
    sizes = [[name, tf.io.gfile.stat(name).length] for name in shards if tf.io.gfile.exists(name)]
    release = []
    if isinstance(task.source, seqio.TfdsDataSource):
        builder = task.source.tfds_dataset.builder
        release = [builder.info.full_name, builder.info.splits[split].num_examples]
    return code_digest(task.source, split, cut_to, task.preprocessors, sizes, release)


def register(task: Task) -> seqio.Task:
    """Registers one of our tasks in seqio under its own name, with its vocabularies and ids.

    A mixture or another converter then reads it like any seqio Task; it is done once per name.
    """
    if task.name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(task.name)
    names = ("inputs", "targets") if task.has_inputs else ("targets",)
    pair = {"inputs": task.vocabularies[0], "targets": task.vocabularies[1]}
    features = {name: seqio.Feature(SeqioVocabulary(pair[name]), pair[name].ends) for name in names}

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        signature = {name: tf.TensorSpec([None], tf.int32) for name in names} | {
            f"{name}_pretokenized": tf.TensorSpec([], tf.string) for name in names
        }
        return tf.data.Dataset.from_generator(
            lambda: example_dicts(task, split, names), output_signature=signature
        )

    REGISTERED[task.name] = task
    # seqio leaves the annotation of its own sources out of TaskRegistry.add.
    source: Any = seqio.FunctionDataSource(examples, splits=task.splits)
    return seqio.TaskRegistry.add(
        task.name,
        source=source,
        preprocessors=[],
        output_features=features,
    )


def example_dicts(task: Task, split: str, names: tuple[str, ...]) -> Iterator[dict]:
    """Yields a dictionary of ids and text per example.

    Args:
      task: one of ours.
      split: of the task.
      names: of its features.
    """
    for chunk in read_checked(task, split):
        for i in range(len(chunk.targets)):
            row = not_none(chunk.rows)[i]
            yield {name: getattr(chunk, name)[i] for name in names} | {
                f"{name}_pretokenized": getattr(row, name) for name in names
            }


def register_built_ins() -> None:
    """Registers the built-in tasks, so that a seqio Mixture can name them."""
    for name in built_in.BUILT_IN:
        register(built_in.built_in_task(name, None, ""))
