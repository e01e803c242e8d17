# SPDX-License-Identifier: Apache-2.0
"""A user's own files as examples: JSONL, TSV, CSV, plain text and Parquet, by globs; .gz files are
unpacked."""

import dataclasses
import glob
import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from t5x_lite import config
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.file_formats import READERS, fields_read
from t5x_lite.utils import remote_paths
from t5x_lite.utils.paths import is_address, parse_path
from t5x_lite.utils.text_lines import TextError, check_unicode

log = logging.getLogger(__name__)

LEFT_OUT = "broken lines left out"
# Broken lines that are named; further ones are counted.
MOST_NAMED = 3
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}


def list_splits(cfg: config.Files) -> tuple[str, ...]:
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
    be a name.
    """
    if pattern.is_file():
        return [pattern]
    if is_address(pattern):
        return sorted(remote_paths.expand_glob(pattern))
    folder = next((each for each in pattern.parents if each.is_dir()), Path())
    rest = str(pattern.relative_to(folder))
    matches = sorted(folder / name for name in glob.glob(rest, root_dir=folder, recursive=True))
    return [path for path in matches if path.is_file()]


def source(cfg: config.Files, split: str) -> str:
    """Digest of the options of reading a split, and of the formats of its files. What the files
    hold is not in it."""
    apart = {"name", "train", "validation", "test", "vocabulary", "metrics"}
    options = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in apart
    }
    formats = [[format_of(cfg, path), path.suffix == ".gz"] for path in list_paths(cfg, split)]
    return hashlib.sha256(json.dumps([options, formats]).encode()).hexdigest()


def format_of(cfg: config.Files, path: Path) -> str:
    """Format of a file: as configured, else by its ending.

    Raises ValueError if neither determines it.
    """
    named = path.with_suffix("") if path.suffix == ".gz" else path
    kind = cfg.format or ENDINGS.get(named.suffix)
    if kind is None:
        raise ValueError(
            f"{path}: unknown ending; set Files.format to jsonl, tsv, csv, text or parquet"
        )
    return kind


def read_rows(
    cfg: config.Files,
    split: str,
    counts: dict[str, int] | None = None,
    describe: Callable[[TextExample], str] | None = None,
) -> Iterator[TextExample]:
    """Yields the examples of a split, file after file.

    Args:
      cfg: the files.
      split: train, validation or test.
      counts: receives the number of lines left out by this pass, if Files.broken is "skip", and the
        first of them are logged; None for a pass that reports nothing.
      describe: returns the reason why the vocabularies cannot read an example, "" if they can.

    Raises:
      ValueError: a line cannot be read and Files.broken is not "skip"; with its file and number.
    """
    left_out = 0
    for path in list_paths(cfg, split):
        for place, fields in read_records(cfg, path):
            if isinstance(fields, str):
                row, problem = None, fields
            else:
                row, problem = row_of(cfg, fields)
            if row is not None:
                problem = describe(row) if describe else ""
            if row is not None and not problem:
                yield row
                continue
            if cfg.broken != "skip":
                raise ValueError(
                    f'{path}, {place}: {problem}. Fix it, or set Files.broken = "skip" to leave '
                    "such lines out and count them"
                )
            left_out += 1
            if counts is not None:
                counts[LEFT_OUT] = left_out
                if left_out <= MOST_NAMED:
                    log.warning("%s, %s is left out: %s", path, place, problem)


def read_records(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Yields the records of a file with their places, or a message instead of a broken record.

    Raises ValueError where the rest of the file cannot be read.
    """
    try:
        yield from READERS[format_of(cfg, path)](cfg, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): copy it again") from error


def row_of(cfg: config.Files, fields: dict) -> tuple[TextExample | None, str]:
    """Example of a record, or None and a message."""
    for name in fields_read(cfg):
        if name not in fields:
            return None, f"no field {name!r}; there are {', '.join(map(repr, fields))}"
    targets = fields[cfg.targets]
    # A list of strings as targets is a list of right answers; the first is trained on.
    several = isinstance(targets, list) and targets
    answers = tuple(targets) if several else (targets,)
    texts = [] if cfg.inputs is None else [(f"field {cfg.inputs!r}", fields[cfg.inputs])]
    for number, answer in enumerate(answers, 1):
        item = f"item {number} of " if len(answers) > 1 else ""
        texts.append((f"{item}field {cfg.targets!r}", answer))
    for name, text in texts:
        if not isinstance(text, str):
            return None, f"{name} is {type(text).__name__}, not text"
        try:
            check_unicode(text)
        except TextError as error:
            return None, f"{name} is {error}"
    return TextExample(None if cfg.inputs is None else texts[0][1], answers[0], answers), ""
