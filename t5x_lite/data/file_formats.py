# SPDX-License-Identifier: Apache-2.0
"""Readers of one file, by its format: records with their places, or what is wrong with one."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.data.fields import column_of, fields_of, fields_read
from t5x_lite.data.tables import read_csv, read_tsv
from t5x_lite.data.text_files import MOST_BYTES, check_size, decoded_lines
from t5x_lite.utils.bounded_files import repeated_name
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.packed_files import open_binary
from t5x_lite.utils.text_lines import TextError, decode_line, describe_bracket, parse_object

Records = Iterator[tuple[str, dict | str]]
BLOCK = 2**20
HEAD = 2**16  # bytes that show whether a file is an array
SPACES = re.compile(r"[ \t\r\n]*")
# Characters of the longest literal of JSON and some more: an error before them is not of the end.
SLACK = 32


def read_jsonl(cfg: config.Files, path: Path) -> Records:
    """Records of a file with one JSON object per line.

    Raises ValueError for a file that begins as a single JSON value: no line of it is an example.
    """
    first = True
    for place, line in decoded_lines(path):
        if isinstance(line, TextError):
            yield place, str(line)
        elif line.strip():
            if first and (reason := describe_bracket(line)):
                array = line.strip().startswith("[")
                remedy = '. Files.format = "json" reads an array' if array else ""
                raise ValueError(f"{path}, {place}: {reason}{remedy}")
            first = False
            try:
                record: dict | str = parse_object(line)
            except TextError as error:
                record = str(error)
            yield place, record


def read_json(cfg: config.Files, path: Path) -> Records:
    """Records of a JSON array of objects, or of a file with one object per line."""
    with open_binary(path) as content:
        begin = content.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_array(path) if begin.startswith(b"[") else read_jsonl(cfg, path)


def read_array(path: Path) -> Records:
    """Records of a JSON array, read as they are needed.

    Raises ValueError where it is not JSON: what comes after that cannot be read.
    """
    with open_binary(path) as content:
        items = JsonItems(path, io.TextIOWrapper(content, "utf-8-sig", newline=""))
        try:
            yield from items
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after item {items.number}: not UTF-8") from error


class JsonItems:
    """Items of a JSON array in a stream of text.

    Attributes:
      number: of items read so far.
    """

    def __init__(self, path: Path, stream: io.TextIOBase):
        self.path, self.stream = path, stream
        self.text, self.begin, self.number = "", 0, 0  # what comes now is text[begin:]
        self.repeated: list[str] = []  # names that an object of this item has twice
        self.decoder = json.JSONDecoder(object_pairs_hook=self.collect)

    def __iter__(self) -> Records:
        self.expect("[")
        while self.next_character() != "]":
            if self.number:
                self.expect(",")
            value, place = self.parse(), f"item {self.number}"
            if self.repeated:
                yield place, f"field {self.repeated[0]!r} is there twice"
            elif isinstance(value, dict):
                yield place, value
            else:
                yield place, "not a JSON object"
        self.expect("]")
        if after := self.next_character():
            raise self.broken(f"{after!r} after the end of the array")

    def collect(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """The object of these names and values; keeps a name that is there twice."""
        twice = repeated_name(pairs)
        if twice is not None:
            self.repeated.append(twice)
        return dict(pairs)

    def parse(self) -> Any:
        """The next item."""
        self.number += 1
        self.next_character()
        while True:
            self.repeated.clear()
            try:
                value, end = self.decoder.raw_decode(self.text, self.begin)
            except RecursionError as error:
                raise self.broken("nested too deeply") from error
            except ValueError as error:
                text = not getattr(error, "msg", "").startswith("Unterminated string")
                early = text and getattr(error, "pos", 0) < len(self.text) - SLACK
                if early or not self.read():
                    raise self.broken(f"not JSON ({error})") from error
            else:
                if end < len(self.text) or not self.read():  # 12 may be the begin of 123
                    self.begin = end
                    return value

    def next_character(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.begin = not_none(SPACES.match(self.text, self.begin)).end()
            if self.begin < len(self.text) or not self.read():
                return self.text[self.begin : self.begin + 1]

    def expect(self, character: str) -> None:
        """Reads a character; raises ValueError for another one."""
        if self.next_character() != character:
            raise self.broken(f"{character!r} is missing")
        self.begin += 1

    def read(self) -> bool:
        """Reads on, as much again as is there; False at the end."""
        rest = self.text[self.begin :]
        check_size(self.path, f"item {self.number}", rest)
        more = self.stream.read(max(BLOCK, len(rest)))
        self.text, self.begin = rest + more, 0
        return bool(more)

    def broken(self, reason: str) -> ValueError:
        """Error for what comes now."""
        return ValueError(f"{self.path}, item {max(1, self.number)} of the array: {reason}")


def read_text(cfg: config.Files, path: Path) -> Records:
    """Records of plain text: one per line, or the whole file."""
    names = fields_of(cfg.targets)
    if cfg.whole_files:
        try:
            with open_binary(path) as whole:
                content = whole.read(MOST_BYTES + 1)
            check_size(path, "the file", content)
            yield "the file", dict.fromkeys(names, decode_line(content, 1))
        except TextError as error:
            yield "the file", str(error)
        return
    for place, line in decoded_lines(path):
        if isinstance(line, TextError):
            yield place, str(line)
        elif line.strip():
            yield place, dict.fromkeys(names, line.rstrip("\r\n"))


def read_parquet(cfg: config.Files, path: Path) -> Records:
    """Records of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path.open("rb"))
        there = table.schema_arrow.names
        names = list(dict.fromkeys(column_of(name, there) for name in fields_read(cfg)))
        names = [name for name in names if name in there]
        if twice := [name for name in names if there.count(name) > 1]:
            raise ValueError(f"several columns are named {twice[0]!r}")
        for batch in table.iter_batches(columns=names or None):
            for fields in batch.to_pylist():
                number += 1
                yield f"row {number}", fields
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number}" if number else ""
        raise ValueError(f"{path}: not a Parquet file, or a broken one{after} ({error})") from error


READERS: dict[str, Callable[[config.Files, Path], Records]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "tsv": read_tsv,
    "csv": read_csv,
    "text": read_text,
    "parquet": read_parquet,
}
