# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: the built-ins, a user's Files, and what is registered in seqio.

seqio, and with it TensorFlow, is imported only when a name is not one of ours.
"""

import importlib.util

from t5x_lite import config
from t5x_lite.data.built_in import BUILT_IN, built_in_task, from_files
from t5x_lite.data.task import Task
from t5x_lite.tokenizers import vocabularies
from t5x_lite.utils.nearest import suggest


def resolve(cfg: config.Data) -> list[tuple[Task, float]]:
    """Tasks that Data.task names, with their rates; a single task has rate 1.

    Raises ValueError for an unknown name, listing near ones, and for tasks of different
    vocabularies.
    """
    if not isinstance(cfg.task, config.Mixture):
        return resolve_task(cfg.task, cfg)
    parts = []
    for each, rate in zip(cfg.task.tasks, cfg.task.rates, strict=True):
        inner_tasks = resolve_task(each, cfg)
        total = sum(inner for _, inner in inner_tasks)
        parts += [(task, rate * inner / total) for task, inner in inner_tasks]
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


def resolve_task(task: str | config.Files, cfg: config.Data) -> list[tuple[Task, float]]:
    """Tasks of one entry of Data.task, which may itself be a Mixture of seqio, with rates."""
    if isinstance(task, config.Files):
        if cfg.vocabulary is not None:
            raise ValueError("Data.vocabulary is for built-in tasks; here it is Files.vocabulary")
        return [(from_files(task, cfg.cache_dir), 1.0)]
    if task in BUILT_IN:
        return [(built_in_task(task, cfg.vocabulary, cfg.cache_dir), 1.0)]
    if importlib.util.find_spec("seqio"):
        from t5x_lite.data import seqio_tasks

        matches, registered = seqio_tasks.find_tasks(task, cfg), seqio_tasks.names()
    else:
        matches, registered = None, []
    if matches is None:
        hint = suggest(task, [*BUILT_IN, *registered])
        raise ValueError(
            f"Data.task {task!r} is not registered: {hint} A seqio Task or Mixture of your own "
            'must be imported first: --import=your_module (and needs pip install "t5x_lite[seqio]")'
        )
    return matches


def tasks_with_split(cfg: config.Data, split: str) -> list[tuple[Task, float]]:
    """Tasks of Data.task that have a split, with their rates, as seqio's mixtures read it.

    Raises ValueError if none has it.
    """
    every = resolve(cfg)
    with_split = [(task, rate) for task, rate in every if split in task.splits]
    if not with_split:
        names = sorted({name for task, _ in every for name in task.splits})
        raise ValueError(
            f"{', '.join(task.name for task, _ in every)} has no split {split!r}; there are: "
            f"{', '.join(names) or 'none'}"
        )
    return with_split
