# SPDX-License-Identifier: Apache-2.0
"""A user's own files as examples: JSONL, TSV, plain text and Parquet, by globs; .gz files are
unpacked."""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from t5x_lite import config
from t5x_lite.data.corpora import TextExample
from t5x_lite.utils.paths import local_path

LEFT_OUT = "broken lines left out"
# Of one example. A gzip file unpacks to a thousand times its size, and may be one line.
MOST_BYTES = 2**28
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
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
    pattern = str(local_path(getattr(cfg, split)))
    matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    matches = [path for path in matches if path.is_file()]
    if not matches:
        raise ValueError(f"Files.{split} of {cfg.name!r} matches no file: {getattr(cfg, split)}")
    return matches


def source(cfg: config.Files, split: str) -> str:
    """Digest of the options of reading, and of the split's files by name, size and time of
    change."""
    identity = [cfg.format, cfg.inputs, cfg.targets, cfg.whole_files, cfg.broken]
    identity += [[path, *stamp] for path, stamp in stamps(cfg, split).items()]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def stamps(cfg: config.Files, split: str) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of every file of a split, by its path."""
    stats = {str(path.resolve()): path.stat() for path in list_paths(cfg, split)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def describe_changes(before: dict[str, list[int]], now: dict[str, list[int]]) -> str:
    """Text of the changes of files between two `stamps`; "" where nothing changed."""
    lines = [f"{path} is gone" for path in before.keys() - now.keys()]
    lines += [f"{path} is new" for path in now.keys() - before.keys()]
    lines += [f"{path} has changed" for path in before.keys() & now if before[path] != now[path]]
    return ", ".join(sorted(lines)[:4])


def format_of(cfg: config.Files, path: Path) -> str:
    """Format of a file: as configured, else by its ending.

    Raises ValueError if neither determines it.
    """
    named = path.with_suffix("") if path.suffix == ".gz" else path
    kind = cfg.format or ENDINGS.get(named.suffix)
    if kind is None:
        raise ValueError(f"{path}: unknown ending; set Files.format to jsonl, tsv, text or parquet")
    return kind


def read_rows(cfg: config.Files, split: str, counts: dict[str, int]) -> Iterator[TextExample]:
    """Yields the examples of a split, file after file.

    Args:
      cfg: the files.
      split: train, validation or test.
      counts: receives the number of lines left out, if Files.broken is "skip".

    Raises:
      ValueError: a line cannot be read and Files.broken is not "skip"; with its file and number.
    """
    for path in list_paths(cfg, split):
        for place, fields in read_records(cfg, path):
            if isinstance(fields, str):
                row, problem = None, fields
            else:
                row, problem = row_of(cfg, fields)
            if row is not None:
                yield row
            elif cfg.broken == "skip":
                counts[LEFT_OUT] = counts.get(LEFT_OUT, 0) + 1
            else:
                raise ValueError(
                    f'{path}, {place}: {problem}. Fix it, or set Files.broken = "skip" to leave '
                    "such lines out and count them"
                )


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
    wanted = [cfg.targets] if cfg.inputs is None else [cfg.inputs, cfg.targets]
    for name in wanted:
        if name not in fields:
            return None, f"no field {name!r}; there are {', '.join(map(repr, fields))}"
        value = fields[name]
        # A list of strings as targets is a list of right answers; the first is trained on.
        if name == cfg.targets and isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str):
            return None, f"field {name!r} is {type(value).__name__}, not text"
    targets = fields[cfg.targets]
    answers = tuple(targets) if isinstance(targets, list) else (targets,)
    inputs = None if cfg.inputs is None else fields[cfg.inputs]
    return TextExample(inputs, answers[0], answers), ""


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, unpacked if it is a .gz file."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def check_size(path: Path, place: str, content: bytes) -> None:
    """Checks the size of one example.

    Args:
      path: file of the example.
      place: line or row, for the message.
      content: bytes of the example.

    Raises:
      ValueError: it is larger than MOST_BYTES.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{path}, {place} has more than {MOST_BYTES:,} bytes: no example is so long. Is it "
            "text, one example to a line?"
        )


def decoded_lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yields numbered lines; None for a line that is not UTF-8."""
    with open_binary(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
            check_size(path, f"line {number}", line)
            try:
                yield f"line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield f"line {number}", None


def read_jsonl(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records of a file with one JSON object per line."""
    for place, line in decoded_lines(path):
        if line is None:
            yield place, "not UTF-8"
        elif line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, f"not JSON ({error})"
                continue
            yield place, fields if isinstance(fields, dict) else "not a JSON object"


def read_tsv(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records under the names in the first line; no quoting, as in most TSV corpora."""
    lines = decoded_lines(path)
    names = next(lines, ("", ""))[1]
    if not names:
        return
    head = names.rstrip("\r\n").split("\t")
    for place, line in lines:
        if line is None:
            yield place, "not UTF-8"
        elif line.strip("\r\n"):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == len(head):
                yield place, dict(zip(head, cells, strict=True))
            else:
                yield place, f"{len(cells)} columns where the first line has {len(head)}"


def read_text(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records of plain text: one per line, or the whole file."""
    if cfg.whole_files:
        try:
            with open_binary(path) as whole:
                content = whole.read(MOST_BYTES + 1)
            check_size(path, "the file", content)
            yield "the file", {cfg.targets: content.decode("utf-8-sig")}
        except UnicodeDecodeError:
            yield "the file", "not UTF-8"
        return
    for place, line in decoded_lines(path):
        if line is None:
            yield place, "not UTF-8"
        elif line.strip():
            yield place, {cfg.targets: line.rstrip("\r\n")}


def read_parquet(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = [name for name in (cfg.inputs, cfg.targets) if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=names or None):
            for fields in batch.to_pylist():
                number += 1
                yield f"row {number}", fields
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number}" if number else ""
        raise ValueError(f"{path}: not a Parquet file, or a broken one{after} ({error})") from error


READERS: dict[str, Callable] = {
    "jsonl": read_jsonl,
    "tsv": read_tsv,
    "text": read_text,
    "parquet": read_parquet,
}
