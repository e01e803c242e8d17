# SPDX-License-Identifier: Apache-2.0
"""A user's own files as examples: JSONL, JSON, TSV, CSV, plain text and Parquet, by globs; packed
files are unpacked."""

import dataclasses
import functools
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from t5x_lite import config
from t5x_lite.data import superglue
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.examples import ExampleBuilder
from t5x_lite.data.fields import FieldError
from t5x_lite.data.file_formats import READERS
from t5x_lite.utils import remote_paths
from t5x_lite.utils.packed_files import packed_ending, unpacking_errors
from t5x_lite.utils.paths import is_address, parse_path

log = logging.getLogger(__name__)

LEFT_OUT = "broken lines left out"
# Broken lines that are named; further ones are counted.
MOST_NAMED = 3
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".tsv": "tsv",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}


def list_splits(cfg: config.TextSource) -> tuple[str, ...]:
    """Splits that have files."""
    names = ("train", "validation", "test")
    return tuple(name for name in names if getattr(cfg, name) is not None)


def list_paths(cfg: config.Files, split: str) -> list[Path]:
    """Files of a split in the order of their names.

    Raises ValueError if the glob matches none.
    """
    pattern = parse_path(getattr(cfg, split))
    matches = expand_glob(pattern)
    if not matches:
        hint = f" but a folder: {pattern}/* names its files" if pattern.is_dir() else ""
        raise ValueError(
            f"Files.{split} of {cfg.name!r} matches no file{hint}: {getattr(cfg, split)}"
        )
    return matches


def expand_glob(pattern: Path) -> list[Path]:
    """The file of this name, or else those that the glob matches, in order.

    A path that exists is no pattern, and neither is the part of one that is a folder: data/[1] may
    be a name. A file that links lead to again, as one to a folder above does, is read once.

    Raises:
      ValueError: the glob matches a link to nothing, or a pipe: a part of the data would be left
        out.
    """
    if pattern.is_file():
        return [pattern]
    if is_address(pattern):
        return sorted(remote_paths.expand_glob(pattern))
    folder = next((each for each in pattern.parents if each.is_dir()), Path())
    files: dict[str, Path] = {}
    for path in sorted(expand_parts(folder, pattern.relative_to(folder).parts)):
        if path.is_dir():
            continue
        if not path.is_file():
            kind = "is not a regular file" if path.exists() else "is a link to nothing"
            raise ValueError(f"{path} {kind}: put the file there, or take {path.name} away")
        first = files.setdefault(os.path.realpath(path), path)
        if first is not path:
            report_again(path, first)
    return [*files.values()]


def expand_parts(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yields what a glob matches, as glob.glob does; ** takes each folder once.

    glob.glob follows a link to a folder above 40 times, and two such links into 2**40 folders.

    Args:
      folder: where the glob begins.
      parts: of the glob, between slashes.
    """
    if "**" not in parts:
        yield from (folder / name for name in glob.glob("/".join(parts), root_dir=folder))
        return
    place, visited = parts.index("**"), set[str]()
    tops = expand_parts(folder, parts[:place]) if place else [folder]
    for top in filter(Path.is_dir, tops):
        for inner in folders_below(top, visited):
            yield from expand_parts(inner, parts[place + 1 :] or ("*",))


def folders_below(top: Path, visited: set[str]) -> Iterator[Path]:
    """Yields a folder and those below it, but hidden ones, each once whatever links lead to it.

    Args:
      top: the folder.
      visited: real paths of the folders so far; they are added.

    Raises:
      OSError: a folder cannot be read.
    """
    real = os.path.realpath(top)
    if real in visited:
        return
    visited.add(real)
    yield top
    for name in sorted(os.listdir(top)):
        if not name.startswith(".") and (top / name).is_dir():
            yield from folders_below(top / name, visited)


@functools.cache
def report_again(path: Path, first: Path) -> None:
    """Logs that a link leads to a file that is read under another name."""
    log.warning("%s is %s by a link: it is read once", path, first)


def source(cfg: config.Files, split: str) -> str:
    """Digest of the options of reading a split, and of the formats of its files. What the files
    hold is not in it."""
    apart = {"name", "train", "validation", "test", "vocabulary", "metrics", "reference"}
    options = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in apart and (field.name != "rejected" or cfg.rejected is not None)
    }
    formats = [[format_of(cfg, path), packed_ending(path)] for path in list_paths(cfg, split)]
    return hashlib.sha256(json.dumps([options, formats]).encode()).hexdigest()


def format_of(cfg: config.Files, path: Path) -> str:
    """Format of a file: as configured, else by its ending.

    Raises ValueError if neither determines it.
    """
    named = path.with_suffix("") if packed_ending(path) else path
    kind = cfg.format or ENDINGS.get(named.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown ending; set Files.format to {', '.join(READERS)}")
    return kind


def read_rows(
    cfg: config.Files,
    split: str,
    counts: dict[str, int] | None = None,
    describe: Callable[[TextExample], str] | None = None,
    readout: config.Readout | None = None,
) -> Iterator[TextExample]:
    """Yields the examples of a split, file after file.

    Args:
      cfg: the files.
      split: train, validation or test.
      counts: receives the number of lines left out by this pass, if Files.broken is "skip", and the
        first of them are logged; None for a pass that reports nothing.
      describe: returns the reason why the vocabularies cannot read an example, "" if they can.
      readout: what the targets are; None for text.

    Raises:
      ValueError: a line cannot be read and Files.broken is not "skip"; with its file and number.
    """
    records = (
        (f"{path}, {place}", record)
        for path in list_paths(cfg, split)
        for place, record in read_records(cfg, path)
    )
    return build_examples(
        ExampleBuilder(cfg, readout=readout),
        records,
        counts,
        describe,
        paired=reads_pairs(cfg, split),
    )


def reads_pairs(cfg: config.TextSource, split: str) -> bool:
    """True if examples come two by two: the chosen text of a record, then the rejected one.

    Evaluation reads the chosen ones alone.
    """
    return cfg.rejected is not None and split == "train"


def read_reference(cfg: config.Files) -> Iterator[list[float]]:
    """Yields the log-probabilities of each training pair under the reference.

    Raises:
      ValueError: a record lacks them; with its file and number.
    """
    builder = ExampleBuilder(cfg)
    for path in list_paths(cfg, "train"):
        for place, record in read_records(cfg, path):
            try:
                if isinstance(record, str):
                    raise FieldError(record)
                yield builder.reference_scores(record)
            except FieldError as error:
                raise ValueError(f"{path}, {place}: {error}") from error


def build_examples(
    builder: ExampleBuilder,
    records: Iterable[tuple[str, dict | str]],
    counts: dict[str, int] | None,
    describe: Callable[[TextExample], str] | None,
    *,
    paired: bool = False,
) -> Iterator[TextExample]:
    """Yields the examples of records, without those that are broken.

    Args:
      builder: of examples.
      records: places and fields, or messages.
      counts: as in `read_rows`.
      describe: as in `read_rows`.
      paired: yields the rejected text of each record after its chosen one.

    Raises:
      ValueError: a record is broken, and such are not to be skipped.
    """
    left_out, kind = 0, type(builder.cfg).__name__
    for place, record in records:
        rows, problem = build_record(builder, record, describe, paired)
        if rows:
            yield from rows
            continue
        if builder.cfg.broken != "skip":
            raise ValueError(
                f'{place}: {problem}. Fix it, or set {kind}.broken = "skip" to leave such lines '
                "out and count them"
            )
        left_out += 1
        if counts is not None:
            counts[LEFT_OUT] = left_out
            if left_out <= MOST_NAMED:
                log.warning("%s is left out: %s", place, problem)


def build_record(
    builder: ExampleBuilder,
    record: dict | str,
    describe: Callable[[TextExample], str] | None,
    paired: bool,
) -> tuple[list[TextExample], str]:
    """Examples of a record: one, or two of a pair; none, and the reason why it has none.

    Args:
      builder: of examples.
      record: fields, or a message.
      describe: returns the reason why the vocabularies cannot read an example, "" if they can.
      paired: true for the rejected text too.
    """
    if isinstance(record, str):
        return [], record
    try:
        rows = [builder.build(record)]
        if paired:
            rows.append(builder.build_rejected(record))
    except FieldError as error:
        return [], str(error)
    problem = next(filter(None, map(describe, rows)), "") if describe else ""
    return ([], problem) if problem else (rows, "")


def read_records(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Yields the records of a file with their places, or a message instead of a broken record.

    Raises ValueError where the rest of the file cannot be read.
    """
    with unpacking_errors(path):
        records = READERS[format_of(cfg, path)](cfg, path)
        if cfg.superglue is not None:
            records = superglue.expand_records(cfg.superglue, records)
        yield from records
