# SPDX-License-Identifier: Apache-2.0
"""A split as examples: their text, their right answers and their ids, for evaluation."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite import config
from t5x_lite.data import tasks
from t5x_lite.data.cache import Tokens
from t5x_lite.data.corpora import Row
from t5x_lite.data.vocabularies import Vocabulary


@dataclass(frozen=True)
class Dataset(Sequence):
    """Examples in the order of their source; of a mixture, one task after the other.

    `metrics` names what answers are measured with; `has_inputs` is false for text alone, of which
    there is nothing to decode.
    """

    name: str
    split: str
    vocabularies: tuple[Vocabulary, Vocabulary]
    metrics: tuple[str, ...]
    has_inputs: bool
    tasks: tuple[tasks.Task, ...]
    cache_dir: str

    @functools.cached_property
    def parts(self) -> tuple[Tokens, ...]:
        """The tokens of each task, made when they are first asked for."""
        return tuple(tasks.tokens(task, self.split, self.cache_dir) for task in self.tasks)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def find(self, i: int) -> tuple[Tokens, int]:
        """The part that holds example i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} examples; asked for {i}")
        for part in self.parts:
            if i < len(part):
                break
            i -= len(part)
        return part, i

    def __getitem__(self, i: int) -> Row:
        """The example as text: as it was written, or decoded from its ids for training splits."""
        part, i = self.find(i)
        if part.rows is not None:
            return part.rows[i]
        targets = self.vocabularies[1].decode(part.targets[i])
        inputs = None if part.inputs is None else self.vocabularies[0].decode(part.inputs[i])
        return Row(inputs, targets, (targets,))

    def ids(self, i: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Input and target ids of an example, with their ends."""
        part, i = self.find(i)
        return None if part.inputs is None else part.inputs[i], part.targets[i]

    def inputs_text(self, i: int) -> str | None:
        return self[i].inputs

    def targets_text(self, i: int) -> str:
        return self[i].targets

    def references(self, i: int) -> list[str]:
        """All right answers; any of them counts."""
        row = self[i]
        return list(row.references) or [row.targets]

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """What the metric functions of seqio Tasks say of predictions for the first examples;
        empty for other tasks. Names begin with the task's where there are several."""
        result, start = {}, 0
        for task, part in zip(self.tasks, self.parts, strict=True):
            own = list(predictions[start : start + len(part)])
            start += len(part)
            if task.score is not None and own:
                prefix = f"{task.name}/" if len(self.tasks) > 1 else ""
                found = task.score(self.split, own)
                result |= {f"{prefix}{name}": value for name, value in found.items()}
        return result


def open_dataset(cfg: config.Data, split: str) -> Dataset:
    """The examples of a split; nothing is tokenised before an example is asked for.

    Raises ValueError if the task is not known or has no such split.
    """
    found = [task for task, _ in tasks.having(cfg, split)]
    return Dataset(
        name=name_of(cfg.task),
        split=split,
        vocabularies=vocabularies_of(cfg, found[0]),
        metrics=tuple(dict.fromkeys(name for task in found for name in task.metrics)),
        has_inputs=found[0].has_inputs and cfg.objective is None,
        tasks=tuple(found),
        cache_dir=cfg.cache_dir,
    )


def name_of(task: str | config.Files | config.Mixture) -> str:
    """What a person calls the task."""
    match task:
        case config.Files(name=name):
            return name
        case config.Mixture(tasks=parts):
            return "+".join(map(name_of, parts))
        case name:
            return name


def vocabularies_of(cfg: config.Data, task: tasks.Task) -> tuple[Vocabulary, Vocabulary]:
    """The pair for a run: under an objective both sides are of the targets' vocabulary."""
    inputs, targets = task.vocabularies
    if cfg.objective is not None:
        inputs = copy.copy(targets)
        # A text to be continued does not end with eos; a corrupted one does.
        parts = getattr(cfg.objective, "parts", (cfg.objective,))
        inputs.ends = all(isinstance(part, config.SpanCorruption) for part in parts)
    return inputs, targets


def open_vocabularies(cfg: config.Data) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) of a run, to be saved with it."""
    return vocabularies_of(cfg, tasks.resolve(cfg)[0][0])
