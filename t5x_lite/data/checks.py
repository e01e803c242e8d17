# SPDX-License-Identifier: Apache-2.0
"""Checks of data before training: errors for what cannot be trained on, warnings for what looks
wrong."""

import logging

from t5x_lite import config
from t5x_lite.config.windows import LengthLimits, length_limits
from t5x_lite.data import tasks
from t5x_lite.data.cache import Tokens
from t5x_lite.data.rows import EpochCounts
from t5x_lite.data.task import Task, read_checked
from t5x_lite.data.token_writer import check_root
from t5x_lite.utils.paths import cache_folder

log = logging.getLogger(__name__)


def check_examples(cfg: config.Data, layout: str, split: str) -> None:
    """Reads the first examples of each task of a split as `open_batches` does; caches nothing.

    Args:
      cfg: the data.
      layout: config.Model.layout.
      split: of the tasks.

    Raises:
      ValueError: Data.cache_dir cannot be made; a task is unknown or lacks the split; a file, field
        or feature is missing or cannot be read; ids are not those of the
        vocabulary, or the task does not suit the layout.
    """
    if not (cfg.stream and split == "train"):
        check_root(cache_folder(cfg.cache_dir))
    lengths = length_limits(cfg.lengths, layout)
    for task, _ in tasks.tasks_with_split(cfg, split):
        check_inputs(cfg, task, lengths)
        if next(read_checked(task, split, probe=True), None) is None:
            raise ValueError(f"{task.name} has no examples in {split}")
        if split == "train":
            if task.reference is not None:
                next(task.reference(), None)
            warn_of_overlap(task)


def check_inputs(cfg: config.Data, task: Task, lengths: LengthLimits) -> None:
    """Checks that a task has the inputs that the layout reads.

    Args:
      cfg: the data.
      task: one of their tasks.
      lengths: limits of the rows.

    Raises:
      ValueError: it lacks them, or has inputs that have no place.
    """
    if cfg.objective is not None:
        return
    if not task.has_inputs and lengths.layout != "decoder_only":
        raise ValueError(
            f"{task.name} is text without inputs: set Data.objective (SpanCorruption or PrefixLM), "
            "or train a decoder alone"
        )
    if task.has_inputs and not lengths.inputs and lengths.layout != "encoder_only":
        raise ValueError(f'{task.name} has inputs: set Data.lengths["inputs"]')


def check_targets(name: str, epoch: EpochCounts, lengths: LengthLimits) -> None:
    """Checks that some target is trained on whole; truncated inputs are counted alone.

    Args:
      name: of the task.
      epoch: counts of its rows.
      lengths: limits of the rows.

    Raises:
      ValueError: every target is truncated.
    """
    if epoch.truncated.get("targets", 0) == epoch.examples:
        raise ValueError(
            f"None of the {epoch.examples} targets of {name} fits {lengths.targets or lengths.row} "
            'tokens whole: raise Data.lengths["targets"], or cut running text up by Data.objective'
        )


def warn_of_ends(task: Task, split: str, tokens: Tokens) -> None:
    """Warns where examples do not end as their vocabulary says, so that a model would be asked in
    another form than it was trained on.

    Args:
      task: the task.
      split: of the task.
      tokens: its tokens.
    """
    sides = ("inputs", tokens.inputs), ("targets", tokens.targets)
    for (name, feature), vocabulary in zip(sides, task.vocabularies, strict=True):
        if feature is None or vocabulary.ends == feature.ends:
            continue
        ended, count = feature.count_ended(), len(feature)
        if vocabulary.ends:
            log.warning(
                "%s (%s): %d of %d %s do not finish with the end of the sequence (id %d), although "
                "the feature has add_eos: a model does not learn where %s. Add "
                "seqio.preprocessors.append_eos to the task's preprocessors",
                task.name,
                split,
                count - ended,
                count,
                name,
                vocabulary.eos,
                "a text ends" if name == "targets" else "inputs end, but is given their ends later",
            )
        elif name == "inputs":
            log.warning(
                "%s (%s): all inputs finish with the end of the sequence (id %d), although the "
                "feature has add_eos=False: infer and interactive do not add it. Give the feature "
                "add_eos=True",
                task.name,
                split,
                vocabulary.eos,
            )


def warn_of_mixed_ends(parts: list[Task]) -> None:
    """Warns if sequences of only some tasks of a mixture end; inference follows the first task."""
    ends = [[each.ends for each in task.vocabularies] for task in parts]
    different = [task.name for task, each in zip(parts, ends, strict=True) if each != ends[0]]
    if different:
        log.warning(
            "add_eos of %s is not that of %s: inference ends sequences as %s does",
            ", ".join(different),
            parts[0].name,
            parts[0].name,
        )


def warn_of_overlap(task: Task) -> None:
    """Warns if a file of the training split is one of another split too."""
    trained = {path.resolve() for path in task.files("train")} if "train" in task.splits else set()
    for split in task.splits:
        if split == "train" or not trained:
            continue
        try:
            shared = sorted(trained & {path.resolve() for path in task.files(split)})
        except ValueError:  # no file: told when the split is read
            continue
        if shared:
            log.warning(
                "%s: %s is read by train and by %s too%s: evaluation sees trained examples",
                task.name,
                shared[0],
                split,
                f", with {len(shared) - 1} more" if len(shared) > 1 else "",
            )
