# SPDX-License-Identifier: Apache-2.0
"""From records to lines of output by a model: the part that infer and distill share."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from t5x_lite.cli.progress import Progress
from t5x_lite.cli.records import Record, append
from t5x_lite.utils.text_lines import escape_controls

# Writes lines for records; reports to its second argument how many of them are done.
LineWriter = Callable[[Sequence[Record], Callable[[int], None]], list[str]]


def write_lines(
    records: Iterator[Record],
    output: IO[bytes],
    progress: Progress,
    chunk_size: int,
    lines_of: LineWriter,
) -> int:
    """Writes the lines of all records, chunk after chunk; a chunk is on disk before the next.

    Args:
      records: what is read, in order.
      output: stream that the lines are appended to.
      progress: counts the records.
      chunk_size: records that `lines_of` gets at a time.
      lines_of: makes the lines of a chunk.

    Returns:
      How many lines were written.
    """
    count = 0
    while chunk := list(itertools.islice(records, chunk_size)):
        before = progress.done
        lines = lines_of(chunk, functools.partial(report_within, progress, before))
        append(output, lines)
        progress(before + len(chunk))
        count += len(lines)
    return count


def report_within(progress: Callable[[int], None], before: int, count: int) -> None:
    """Reports `count` records of a chunk that begins after `before` of them.

    Args:
      progress: is called with the number of all records done.
      before: records before the chunk.
      count: records of the chunk that are done.
    """
    progress(before + count)


def complain(records: Sequence[Record], source: str, stop: bool = False) -> int:
    """Prints what is wrong with the records that could not be read; returns how many these are.

    Args:
      records: good and bad ones.
      source: name of the input.
      stop: whether the first bad one ends the command.

    Raises:
      ValueError: `stop`, and a record could not be read.
    """
    count = 0
    for record in records:
        if record.trouble:
            message = f"{source} line {record.number}: {record.trouble}"
            if stop:
                raise ValueError(f"{message}. Fix it and start again, or pass --broken=skip")
            print(escape_controls(message), file=sys.stderr)
            count += 1
    return count


def mark_troubles(records: Sequence[Record], describe: Callable[[Record], str]) -> list[Record]:
    """Records, in trouble where the model cannot read one.

    Args:
      records: good and bad ones.
      describe: returns the trouble of a good one, "" for none.
    """
    return [
        record if record.trouble else dataclasses.replace(record, trouble=describe(record) or None)
        for record in records
    ]


def predict(
    session: Any, records: Sequence[Record], texts: Sequence[str], progress: Callable[[int], None]
) -> list[Any]:
    """Predictions of a model for texts, one for each.

    Args:
      session: an interactive.Session.
      records: the record that each text comes from.
      texts: inputs of the model, or beginnings that it continues.
      progress: called with how many are done.
    """
    # Noise of sampling depends on the line, not on where the command began.
    rows = [record.number - 1 for record in records]
    return session.predictor.predict(texts, session.decode, rows=rows, on_progress=progress)


def decode_settings(session: Any) -> dict[str, Any]:
    """Step of the checkpoint and fields of Decode, as they stand beside an output."""
    fields = dataclasses.asdict(session.decode)
    return {"step": session.step} | {f"decode.{name}": value for name, value in fields.items()}
