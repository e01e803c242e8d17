# SPDX-License-Identifier: Apache-2.0
"""Labels of a run: those of its training split, where the config does not name them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from t5x_lite import config
from t5x_lite.config.readout import NAMED_KINDS, tag_labels
from t5x_lite.config.training_run import RunT
from t5x_lite.data.built_in import BUILT_IN, read_training_rows
from t5x_lite.tokenizers import labels

# A column with more different values is text or numbers.
MOST_LABELS = 10_000


def with_readout(run: RunT) -> RunT:
    """The run whose data have labels, or texts to compare, as Model.readout reads them; any other
    run as it is."""
    readout = run.model.readout
    if readout is None or run.data is None:
        return run
    start = None
    if run.model.layout == "decoder_only" and run.model.add_bos:
        start = run.model.decoder_start_token_id
    labels_of = None if readout.kind == "vector" else readout
    return dataclasses.replace(
        run, data=dataclasses.replace(run.data, readout=labels_of, start=start)
    )


def lacks_labels(run: config.Run) -> bool:
    """True if Model.readout has labels whose names are not bound."""
    readout = run.model.readout
    return readout is not None and readout.kind in NAMED_KINDS and not readout.labels


def find_labels(data: config.Data, readout: config.Readout) -> tuple[str, ...]:
    """Labels of the training split, in the order of the alphabet or of Files.labels; of tags, those
    of the spans.

    Raises:
      ValueError: the data cannot be read, or have no labels or too many.
    """
    tasks = data.task.tasks if isinstance(data.task, config.Mixture) else (data.task,)
    named = [name for task in tasks if not isinstance(task, str) for name in task.labels]
    names = dict.fromkeys(named)
    if not named:
        for name in (name for task in tasks for name in names_of(task, readout)):
            names[name] = None
            config.require(
                len(names) <= MOST_LABELS,
                f"The targets of {data_name(tasks)} have more than {MOST_LABELS:,} different "
                'labels: are they text, or numbers (Readout.kind = "number")?',
            )
    config.require(bool(names), f"The targets of {data_name(tasks)} have no label at all")
    names = tuple(names) if named else tuple(sort_names(names))
    return tag_labels(names) if readout.kind == "tags" else names


def names_of(task: str | config.TextSource, readout: config.Readout) -> Iterator[str]:
    """Yields the labels of a task's training examples, in order."""
    if isinstance(task, str):
        rows = BUILT_IN[task].rows("train") if task in BUILT_IN else iter(())
    else:
        rows = read_training_rows(task, readout)
    for row in rows:
        if readout.kind == "classes":
            yield row.targets
        elif readout.kind == "labels":
            yield from labels.parse_labels(row.targets)
        else:
            spans = labels.parse_spans(row.targets, len(row.inputs or ""))
            yield from (span.name for span in spans)


def sort_names(names: Iterable[str]) -> list[str]:
    """Names in the order of the alphabet; integers by their size."""
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def data_name(tasks: Iterable[str | config.TextSource]) -> str:
    """Names of tasks, for messages."""
    return ", ".join(task if isinstance(task, str) else task.name for task in tasks)
