# SPDX-License-Identifier: Apache-2.0
"""Readers of one file, by its format: records with their places, or what is wrong with one."""

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from t5x_lite import config
from t5x_lite.utils.text_lines import (
    TextError,
    check_unicode,
    decode_line,
    describe_bracket,
    parse_object,
)

# Of one example. A gzip file unpacks to a thousand times its size, and may be one line.
MOST_BYTES = 2**28


def fields_read(cfg: config.Files) -> list[str]:
    """Names of the fields that are read."""
    return [cfg.targets] if cfg.inputs is None else [cfg.inputs, cfg.targets]


def open_binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading bytes, unpacked if it is a .gz file."""
    content = path.open("rb")
    return gzip.open(content, "rb") if path.suffix == ".gz" else content


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


def decoded_lines(path: Path, errors: str = "strict") -> Iterator[tuple[str, str | TextError]]:
    """Yields numbered lines, or the error of a line that is not UTF-8.

    Raises ValueError for a file whose lines end in CR alone: it would be one line.
    """
    with open_binary(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
            place = f"line {number}"
            check_size(path, place, line)
            if number == 1 and b"\r" in line.rstrip(b"\r\n") and not lines.peek(1):
                raise ValueError(
                    f"{path}: its lines end in CR alone, as those of old Macs; end them in LF: "
                    "tr '\\r' '\\n' < OLD > NEW"
                )
            try:
                yield place, decode_line(line, number, errors)
            except TextError as error:
                yield place, error


def read_jsonl(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records of a file with one JSON object per line.

    Raises ValueError for a file that begins as a single JSON value: no line of it is an example.
    """
    first = True
    for place, line in decoded_lines(path):
        if isinstance(line, TextError):
            yield place, str(line)
        elif line.strip():
            if first and (reason := describe_bracket(line)):
                raise ValueError(f"{path}, {place}: {reason}")
            first = False
            try:
                record: dict | str = parse_object(line)
            except TextError as error:
                record = str(error)
            yield place, record


def read_tsv(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records under the names in the first line, between tabs; quotes as Files.quotes says."""
    rows = quoted_rows(path, "\t") if cfg.quotes else tabbed_rows(path, cfg.quotes is None)
    return read_table(cfg, path, rows)


def read_csv(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records under the names in the first line, between commas, quoted where they need it."""
    return read_table(cfg, path, quoted_rows(path, ","))


def read_table(
    cfg: config.Files, path: Path, rows: Iterator[tuple[str, list[str] | str]]
) -> Iterator[tuple[str, dict | str]]:
    """Records of a table.

    Args:
      cfg: the files.
      path: of the table.
      rows: place and cells of every row, or a message; the first has the names of the columns.

    Raises:
      ValueError: the names cannot be read, so that nothing can; or two columns share one.
    """
    place, head = next(rows, ("line 1", "the file is empty"))
    if isinstance(head, str):
        raise ValueError(f"{path}, {place} should hold the names of the columns: {head}")
    for name in fields_read(cfg):
        if head.count(name) > 1:
            raise ValueError(f"{path}, {place}: {head.count(name)} columns are named {name!r}")
    for place, cells in rows:
        if isinstance(cells, str):
            yield place, cells
        elif len(cells) == len(head):
            yield place, dict(zip(head, cells, strict=True))
        else:
            hint = " (quoted cells? Files.quotes = True)" if any_quoted(cells) else ""
            yield place, f"{len(cells)} columns where the first line has {len(head)}{hint}"


def tabbed_rows(path: Path, refuse_quotes: bool) -> Iterator[tuple[str, list[str] | str]]:
    """Place and cells of every row of a file without quotes, or a message.

    Args:
      path: of the file.
      refuse_quotes: a cell that a csv writer has quoted is an error.
    """
    for place, line in decoded_lines(path):
        if isinstance(line, TextError):
            yield place, str(line)
        elif line.strip("\r\n"):
            cells = line.rstrip("\r\n").split("\t")
            if refuse_quotes and (cell := next(filter(is_quoted, cells), None)):
                yield (
                    place,
                    (
                        f"{cell[:40]!r} is quoted as csv writers do: set Files.quotes = True to "
                        "read it so, or False to keep every quote"
                    ),
                )
            else:
                yield place, cells


def is_quoted(cell: str) -> bool:
    """True for a cell in quotes with quotes doubled inside: no text is written so."""
    return cell[:1] == '"' == cell[-1:] and '""' in cell[1:-1]


def any_quoted(cells: list[str]) -> bool:
    """True if a cell begins or ends in a quote, as the parts of a quoted cell do."""
    return any('"' in (cell[:1], cell[-1:]) for cell in cells)


def quoted_rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str] | str]]:
    """Place and cells of every row of a file with quoted cells, or a message.

    A row may take several lines; its place is the first.
    """
    csv.field_size_limit(MOST_BYTES)
    # Bytes that are not UTF-8 must not hide the quote that ends a cell: they are looked for later.
    lines = (line for _, line in decoded_lines(path, "surrogateescape") if isinstance(line, str))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
            if cells is None:
                return
            check_unicode("".join(cells))
        except csv.Error as error:
            yield place, f"broken quotes ({error})"
        except TextError:
            yield place, "not UTF-8"
        else:
            if cells:
                yield place, cells


def read_text(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records of plain text: one per line, or the whole file."""
    if cfg.whole_files:
        try:
            with open_binary(path) as whole:
                content = whole.read(MOST_BYTES + 1)
            check_size(path, "the file", content)
            yield "the file", {cfg.targets: decode_line(content, 1)}
        except TextError as error:
            yield "the file", str(error)
        return
    for place, line in decoded_lines(path):
        if isinstance(line, TextError):
            yield place, str(line)
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
        table = pyarrow.parquet.ParquetFile(path.open("rb"))
        there = table.schema_arrow.names
        names = [name for name in fields_read(cfg) if name in there]
        if twice := [name for name in names if there.count(name) > 1]:
            raise ValueError(f"several columns are named {twice[0]!r}")
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
    "csv": read_csv,
    "text": read_text,
    "parquet": read_parquet,
}
