# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: the built-ins, a user's Files, and what is registered in seqio.

seqio, and with it TensorFlow, is imported only when a name is not one of ours.
"""

import copy
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints import step_folders, text_settings
from t5x_lite.config.training_run import RunT
from t5x_lite.data.built_in import BUILT_IN, built_in_task, from_files, from_hub
from t5x_lite.data.target_form import TEXT, TargetForm
from t5x_lite.data.task import Task
from t5x_lite.tokenizers import languages, vocabularies
from t5x_lite.tokenizers.chat import ChatTemplate
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path


def resolve(cfg: config.Data) -> list[tuple[Task, float]]:
    """Tasks that Data.task names, with their rates; a single task has rate 1.

    Raises ValueError for an unknown name, listing near ones, and for tasks of different
    vocabularies.
    """
    if not isinstance(cfg.task, config.Mixture):
        parts = resolve_task(cfg.task, cfg)
        check_vocabularies([task for task, _ in parts])
        return parts
    parts = []
    for each, rate in zip(cfg.task.tasks, cfg.task.rates, strict=True):
        inner_tasks = resolve_task(each, cfg, trained_together(cfg.task))
        total = sum(inner for _, inner in inner_tasks)
        parts += [(task, rate * inner / total) for task, inner in inner_tasks]
    if len({task.name for task, _ in parts}) < len(parts):
        names = ", ".join(task.name for task, _ in parts)
        raise ValueError(f"Mixture.tasks names a task twice: {names}. Add up its rates instead")
    check_vocabularies([task for task, _ in parts])
    return parts


def trained_together(mixture: config.Mixture) -> list[config.TextSource]:
    """Sources of a mixture if one vocabulary is trained on the text of all; [] if none is."""
    every = [each for each in mixture.tasks if not isinstance(each, str)]
    first = every[0].vocabulary if every else None
    alike = first is not None and all(each.vocabulary == first for each in every)
    return every if alike and first.kind == "trained" else []


def check_vocabularies(parts: list[Task]) -> None:
    """Raises ValueError unless an id is the same text in every task of a mixture."""
    ids = [[endless_fingerprint(each) for each in task.vocabularies] for task in parts]
    different = [task.name for task, each in zip(parts, ids, strict=True) if each != ids[0]]
    if different:
        raise ValueError(
            f"Tasks of a mixture must share one vocabulary: {', '.join(different)} have another "
            f"than {parts[0].name}"
        )


def endless_fingerprint(vocabulary: TextVocabulary) -> str:
    """Fingerprint of the ids of a vocabulary, whether its sequences end or not, and in whatever
    language they are."""
    bare: Any = copy.copy(languages.without_language(vocabulary))
    bare.ends = False
    return vocabularies.fingerprint(bare)


def resolve_task(
    task: str | config.TextSource,
    cfg: config.Data,
    together: Sequence[config.TextSource] = (),
) -> list[tuple[Task, float]]:
    """Tasks of one entry of Data.task, which may itself be a Mixture of seqio, with rates.

    Args:
      task: the entry.
      cfg: the data.
      together: Files and datasets that one vocabulary is trained on.
    """
    form = TargetForm(cfg.readout, cfg.start)
    if not isinstance(task, str):
        if cfg.vocabulary is not None:
            kind = type(task).__name__
            raise ValueError(f"Data.vocabulary is for built-in tasks; here it is {kind}.vocabulary")
        if isinstance(task, config.Files):
            return [(from_files(task, cfg.cache_dir, together, form), 1.0)]
        return [(from_hub(task, cfg.cache_dir, together, form), 1.0)]
    if task in BUILT_IN:
        return [(built_in_task(task, cfg.vocabulary, cfg.cache_dir, form), 1.0)]
    config.require(
        form == TEXT,
        f"Data.task {task!r} has no labels for Model.readout: write them to a file of two columns, "
        "and describe it as config.Files",
    )
    if importlib.util.find_spec("seqio"):
        from t5x_lite.data import seqio_tasks

        matches, registered = seqio_tasks.find_tasks(task, cfg), seqio_tasks.names()
    else:
        matches, registered = None, []
    if matches is None:
        hint = suggest(task, [*BUILT_IN, *registered])
        raise ValueError(
            f"Data.task {task!r} is not registered: {hint} A seqio Task or Mixture of your own "
            f"must be imported first: --import=your_module (seqio: {install_command('seqio')})"
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


def in_vocabulary(data: config.Data, vocabulary: config.Vocabulary) -> config.Data:
    """Data with the vocabulary of a checkpoint, in the languages of the data; a seqio task keeps
    its own vocabulary."""

    def replaced(task: Any) -> Any:
        if isinstance(task, config.Mixture):
            return dataclasses.replace(task, tasks=tuple(map(replaced, task.tasks)))
        if isinstance(task, config.TextSource):
            names = ("source_language", "target_language")
            spoken = {name: getattr(task.vocabulary, name) for name in names}
            return dataclasses.replace(task, vocabulary=dataclasses.replace(vocabulary, **spoken))
        return task

    built_in = isinstance(data.task, str) and data.task in BUILT_IN
    return dataclasses.replace(
        data, task=replaced(data.task), vocabulary=vocabulary if built_in else None
    )


def with_run_vocabulary(run: RunT) -> RunT:
    """The run with the vocabulary that its MODEL_DIR has, once weights depend on it.

    What the config names may be gone by then, or would be trained again from other files.
    """
    if run.data is None or run_vocabulary(run.model_dir) is None:
        return run
    vocabulary = config.Vocabulary(kind="checkpoint", path=run.model_dir)
    return dataclasses.replace(run, data=in_vocabulary(run.data, vocabulary))


def find_chat_template(data: config.Data) -> ChatTemplate | None:
    """The chat template of the checkpoint whose vocabulary the data come in; None without one."""
    tasks = data.task.tasks if isinstance(data.task, config.Mixture) else (data.task,)
    named = [task.vocabulary for task in tasks if not isinstance(task, str)]
    for each in (*named, data.vocabulary):
        if each is not None and each.kind == "checkpoint":
            return text_settings.read_text_settings(not_none(each.path)).chat
    return None


def run_vocabulary(model_dir: str | Path) -> Path | None:
    """The folder of a run's vocabularies; None before its first checkpoint."""
    folder = parse_path(model_dir) / text_settings.VOCABULARY_FOLDER
    return folder if step_folders.list_steps(model_dir) and folder.is_dir() else None


def check_run_vocabulary(
    model_dir: str | Path, pair: tuple[TextVocabulary, TextVocabulary]
) -> None:
    """Raises ValueError if data come in other vocabularies than the weights of MODEL_DIR, as those
    of a seqio task may after a change."""
    folder = run_vocabulary(model_dir)
    if folder is None:
        return
    saved = vocabularies.load_pair(folder)
    same = [vocabularies.fingerprint(each) for each in saved]
    if same != [vocabularies.fingerprint(each) for each in pair]:
        raise ValueError(
            f"The vocabulary of the data is not the one in {folder}, which the weights belong to: "
            "give the task its former vocabulary, or begin in a new MODEL_DIR"
        )
