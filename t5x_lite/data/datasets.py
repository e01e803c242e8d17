# SPDX-License-Identifier: Apache-2.0
"""A split as examples: their text, references and ids, for evaluation."""

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.data import hub_datasets, tasks
from t5x_lite.data.cache import Tokens
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.task import Task, TaskScores, cached_tokens
from t5x_lite.tokenizers.vocabulary import TextVocabulary


@dataclass(frozen=True)
class Dataset(Sequence):
    """Examples in the order of their source; of a mixture, one task after the other.

    Attributes:
      name: of the task or mixture.
      split: of the tasks.
      vocabularies: of (inputs, targets).
      metrics: names of the metrics of predictions.
      has_inputs: false for text alone, which gives nothing to decode from.
      tasks: the tasks.
      cache_dir: folder of cached tokens.
    """

    name: str
    split: str
    vocabularies: tuple[TextVocabulary, TextVocabulary]
    metrics: tuple[str, ...]
    has_inputs: bool
    tasks: tuple[Task, ...]
    cache_dir: str

    @functools.cached_property
    def parts(self) -> tuple[Tokens, ...]:
        """Tokens of each task, written on first access."""
        return tuple(cached_tokens(task, self.split, self.cache_dir) for task in self.tasks)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def find(self, i: int) -> tuple[Tokens, int]:
        """Returns the part that holds example i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} examples, not number {i}")
        for part in self.parts:
            if i < len(part):
                break
            i -= len(part)
        return part, i

    def __getitem__(self, i: int) -> TextExample:
        """Returns an example as text: the source's, or decoded from its ids for training splits."""
        part, i = self.find(i)
        if part.rows is not None:
            return part.rows[i]
        targets = self.vocabularies[1].decode(part.targets[i])
        inputs = None if part.inputs is None else self.vocabularies[0].decode(part.inputs[i])
        return TextExample(inputs, targets, (targets,))

    def ids(self, i: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Returns input and target ids of an example, with their ends."""
        part, i = self.find(i)
        return None if part.inputs is None else part.inputs[i], part.targets[i]

    def list_languages(self, count: int) -> Iterator[tuple[range, Task]]:
        """Yields the numbers of consecutive examples among the first `count` that are of the same
        languages, with a task in these."""
        begin, end, chosen = 0, 0, self.tasks[0]
        for task, part in zip(self.tasks, self.parts, strict=True):
            spoken = [[each.bos for each in one.vocabularies] for one in (chosen, task)]
            if spoken[0] != spoken[1] and end > begin:
                yield range(begin, end), chosen
                begin = end
            chosen = task
            end = min(count, end + len(part))
        yield range(begin, end), chosen

    def inputs_text(self, i: int) -> str | None:
        return self[i].inputs

    def references(self, i: int) -> list[str]:
        """Returns all right answers; any of them counts."""
        row = self[i]
        return list(row.references) or [row.targets]

    def score(self, predictions: Sequence[str]) -> TaskScores:
        """Computes the metrics of seqio Tasks of predictions for the first examples; empty for
        other tasks. Names begin with the task's where there are several."""
        result, start = TaskScores({}, {}), 0
        for task, part in zip(self.tasks, self.parts, strict=True):
            of_task = list(predictions[start : start + len(part)])
            start += len(part)
            if task.score is not None and of_task:
                for merged, of_this in zip(result, task.score(self.split, of_task), strict=True):
                    merged.update(self.prefixed(task, of_this))
        return result

    def prefixed(self, task: Task, by_name: dict) -> dict:
        """The same values under names that begin with the task's where there are several."""
        prefix = f"{task.name}/" if len(self.tasks) > 1 else ""
        return {f"{prefix}{name}": value for name, value in by_name.items()}

    @property
    def unsupported_metrics(self) -> dict[str, str]:
        """Reasons by name why metrics of seqio Tasks are not computed."""
        reasons = {}
        for task in self.tasks:
            reasons |= self.prefixed(task, task.unsupported_metrics)
        return reasons


def open_dataset(cfg: config.Data, split: str) -> Dataset:
    """Opens the examples of a split; nothing is tokenized before an example is read.

    Raises ValueError if the task is not known or lacks the split.
    """
    chosen = [task for task, _ in tasks.tasks_with_split(cfg, split)]
    return Dataset(
        name=task_name(cfg.task),
        split=split,
        vocabularies=vocabularies_of(cfg, chosen[0]),
        metrics=tuple(dict.fromkeys(name for task in chosen for name in task.metrics)),
        has_inputs=chosen[0].has_inputs and cfg.objective is None,
        tasks=tuple(chosen),
        cache_dir=cfg.cache_dir,
    )


def task_name(task: str | config.TextSource | config.Mixture) -> str:
    """Name of Data.task in reports."""
    match task:
        case config.Files(name=name):
            return name
        case config.HubDataset():
            return hub_datasets.task_name(task)
        case config.Mixture(tasks=parts):
            return "+".join(map(task_name, parts))
        case name:
            return name


def vocabularies_of(cfg: config.Data, task: Task) -> tuple[TextVocabulary, TextVocabulary]:
    """Vocabularies of a run: under an objective both sides have that of the targets."""
    inputs, targets = task.vocabularies
    if cfg.objective is not None:
        corrupted: Any = copy.copy(targets)
        # A text to be continued does not end with eos; a corrupted one does.
        parts = getattr(cfg.objective, "parts", (cfg.objective,))
        corrupted.ends = all(isinstance(part, config.SpanCorruption) for part in parts)
        inputs = corrupted
    return inputs, targets


def open_vocabularies(cfg: config.Data) -> tuple[TextVocabulary, TextVocabulary]:
    """Opens the vocabularies (inputs, targets) of a run, to be saved with it."""
    return vocabularies_of(cfg, tasks.resolve(cfg)[0][0])
