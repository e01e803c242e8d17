# SPDX-License-Identifier: Apache-2.0
"""Readers of tables as text, TSV and CSV: records with their places, or what is wrong with one."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from t5x_lite import config
from t5x_lite.data.fields import column_of, fields_read
from t5x_lite.data.text_files import MOST_BYTES, decoded_lines
from t5x_lite.utils.text_lines import TextError, check_nul, check_unicode

# Rows of a table: place and cells, or a message.
Rows = Iterator[tuple[str, list[str] | str]]
DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}


def read_tsv(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records under the names in the first line, between tabs; quotes as Files.quotes says."""
    rows = quoted_rows(path, "\t") if cfg.quotes else tabbed_rows(path, cfg.quotes is None)
    return read_table(cfg, path, rows, "\t")


def read_csv(cfg: config.Files, path: Path) -> Iterator[tuple[str, dict | str]]:
    """Records under the names in the first line, between commas or what Files.delimiter names,
    quoted where they need it."""
    delimiter = cfg.delimiter or ","
    return read_table(cfg, path, quoted_rows(path, delimiter), delimiter)


def read_table(
    cfg: config.Files, path: Path, rows: Rows, delimiter: str
) -> Iterator[tuple[str, dict | str]]:
    """Records of a table.

    Args:
      cfg: the files.
      path: of the table.
      rows: place and cells of every row, or a message; the first has the names of the columns.
      delimiter: character between cells.

    Raises:
      ValueError: the names cannot be read, one that is read is not there, or two columns share it.
    """
    place, head = next(rows, ("line 1", "the file is empty"))
    if isinstance(head, str):
        raise ValueError(f"{path}, {place} should hold the names of the columns: {head}")
    check_columns(cfg, f"{path}, {place}", head, delimiter)
    for place, cells in rows:
        if isinstance(cells, str):
            yield place, cells
        elif len(cells) == len(head):
            yield place, dict(zip(head, cells, strict=True))
        else:
            unquoted = delimiter == "\t" and not cfg.quotes and any_quoted(cells)
            hint = " (quoted cells? Files.quotes = True)" if unquoted else ""
            yield place, f"{len(cells)} columns where the first line has {len(head)}{hint}"


def check_columns(cfg: config.Files, place: str, head: list[str], delimiter: str) -> None:
    """Checks that the fields that are read are columns.

    Args:
      cfg: the files.
      place: file and line, for messages.
      head: names of the columns.
      delimiter: character between cells.

    Raises:
      ValueError: a field is no column, or several.
    """
    for name in fields_read(cfg):
        column = column_of(name, head)
        if head.count(column) > 1:
            raise ValueError(f"{place}: {head.count(column)} columns are named {column!r}")
        if column in head:
            continue
        spaced = next((each for each in head if each.strip().strip('"') == name), None)
        remedy = ""
        if len(head) == 1 and (other := other_delimiter(head[0], delimiter)):
            remedy = f". Are cells separated by {DELIMITERS[other]}? {delimiter_remedy(other)}"
        elif spaced is not None:
            remedy = f". {spaced!r} has spaces or quotes in its name: take them out of the file"
        raise ValueError(
            f"{place}: no column {name!r}; there are {', '.join(map(repr, head))}{remedy}"
        )


def other_delimiter(line: str, delimiter: str) -> str | None:
    """The delimiter that a line has in place of the one that is read; None for none."""
    counts = {other: line.count(other) for other in DELIMITERS if other != delimiter}
    most = max(counts, key=counts.__getitem__)
    return most if counts[most] and delimiter not in line else None


def delimiter_remedy(delimiter: str) -> str:
    """Sentence that tells how a table with another delimiter is read."""
    if delimiter in "\t,":
        return f'Set Files.format = "{"csv" if delimiter == "," else "tsv"}"'
    return f'Set Files.format = "csv" and Files.delimiter = "{delimiter}"'


def tabbed_rows(path: Path, refuse_quotes: bool) -> Rows:
    """Place and cells of every row of a file without quotes, or a message.

    Args:
      path: of the file.
      refuse_quotes: a cell in quotes, as csv writers have it, is an error.
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
    """True for a cell in quotes: whether they belong to the text, only the user knows."""
    return len(cell) > 1 and cell[0] == '"' == cell[-1]


def any_quoted(cells: list[str]) -> bool:
    """True if a cell begins or ends in a quote, as the parts of a quoted cell do."""
    return any('"' in (cell[:1], cell[-1:]) for cell in cells)


def quoted_rows(path: Path, delimiter: str) -> Rows:
    """Place and cells of every row of a file with quoted cells, or a message.

    A row may take several lines; its place is the first.
    """
    csv.field_size_limit(MOST_BYTES)
    # A cell that begins with spaces is not quoted for the csv module: its quotes stay in the text,
    # and a delimiter between them ends it. Within quotes every quote is doubled.
    spaced = re.compile(re.escape(delimiter) + r' +"(?=[^"\r\n' + re.escape(delimiter) + "])")
    taken: list[str] = []

    def lines() -> Iterator[str]:
        # Bytes that are not UTF-8 must not hide the quote that ends a cell: see check_row.
        for _, line in decoded_lines(path, "surrogateescape"):
            if isinstance(line, str):
                taken.append(line)
                yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        place = f"line {reader.line_num + 1}"
        taken.clear()
        try:
            cells = next(reader, None)
            if cells is None:
                return
            check_row(cells)
        except csv.Error as error:
            yield place, f"broken quotes ({error}){quotes_hint(taken[:1], delimiter)}"
        except TextError as error:
            yield place, str(error)
        else:
            if any(map(spaced.search, taken)):
                yield (
                    place,
                    f"a space between {delimiter!r} and a quote, which then quotes nothing: take "
                    "the space out",
                )
            elif cells:
                yield place, cells


def quotes_hint(lines: list[str], delimiter: str) -> str:
    """Remedy for a line of quoted cells with another delimiter; "" for others."""
    for line in lines:
        for other in DELIMITERS:
            if other != delimiter and f'"{other}"' in line:
                return f". Are cells separated by {DELIMITERS[other]}? {delimiter_remedy(other)}"
    return ""


def check_row(cells: list[str]) -> None:
    """Raises TextError for cells that are not text."""
    text = "".join(cells)
    check_nul(text)
    try:
        check_unicode(text)
    except TextError:
        raise TextError("not UTF-8") from None
