# SPDX-License-Identifier: Apache-2.0
"""A split as examples: their text, their right answers and their ids, for evaluation."""

import copy
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
    """Examples in the order of their source; of a mixture, one task after the other."""

    name: str
    split: str
    vocabularies: tuple[Vocabulary, Vocabulary]
    metrics: tuple[str, ...]
    has_inputs: bool
    parts: tuple[Tokens, ...]
    tasks: tuple[tasks.Task, ...]

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


def open_dataset(cfg: config.Data, split: str) -> Dataset:
    """The examples of a split.

    Raises ValueError if the task is not known, has no such split, or cannot be read.
    """
    found = [task for task, _ in tasks.resolve(cfg)]
    having = [task for task in found if split in task.splits] or found[:1]
    inputs, targets = having[0].vocabularies
    if isinstance(cfg.objective, config.PrefixLM | config.CausalLM):
        # These objectives continue a text, so what comes before does not end with eos.
        inputs = copy.copy(inputs)
        inputs.ends = False
    return Dataset(
        name=cfg.task if isinstance(cfg.task, str) else cfg.task.name,
        split=split,
        vocabularies=(inputs, targets),
        metrics=tuple(dict.fromkeys(name for task in having for name in task.metrics)),
        has_inputs=having[0].has_inputs,
        parts=tuple(tasks.tokens(task, split, cfg.cache_dir) for task in having),
        tasks=tuple(having),
    )
