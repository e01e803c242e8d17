# SPDX-License-Identifier: Apache-2.0
"""Records of a text or JSONL stream, and an output beside them that can be continued."""

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from t5x_lite.config import aliases
from t5x_lite.utils import bounded_files, packed_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import is_address, parse_output_path, parse_path
from t5x_lite.utils.text_lines import TextError, check_unicode, decode_line, parse_object

# Of one line. A model reads a millionth of it; a file that is not text may be one line.
MOST_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of the input.

    Attributes:
      number: of the line, from 1.
      text: the text; None if the line cannot be read.
      fields: all fields of a JSONL line.
      trouble: why the line cannot be read; None if it can.
    """

    number: int
    text: str | None
    fields: dict[str, Any]
    trouble: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """An input of records.

    Attributes:
      path: a file, packed or not, or "-" for stdin.
      jsonl: whether lines are JSON objects; else each is a text.
      field: the field of JSONL that holds the text.
    """

    path: str
    jsonl: bool
    field: str

    def records(self) -> Iterator[Record]:
        """Every line in order, those that cannot be read too."""
        with nullcontext(sys.stdin.buffer) if self.path == "-" else self.open() as lines:
            for number, line in enumerate(bounded_lines(lines), 1):
                yield self.record(number, line)

    @contextmanager
    def open(self) -> Generator[Any]:
        """The bytes of the file, unpacked; raises ValueError where a packed one is broken."""
        path = parse_path(self.path)
        with packed_files.unpacking_errors(path), packed_files.open_binary(path) as content:
            yield content

    def record(self, number: int, line: bytes) -> Record:
        """The record of a line, `number` from 1."""
        if len(line) > MOST_BYTES:
            return Record(number, None, {}, f"longer than {MOST_BYTES:,} bytes")
        try:
            text = decode_line(line, number).rstrip("\r\n")
            if not text.strip():
                raise TextError("empty")
            return self.parse(number, text)
        except TextError as error:
            return Record(number, None, {}, str(error))

    def parse(self, number: int, line: str) -> Record:
        """The record of a line of text, `number` from 1; raises TextError where it has none."""
        if not self.jsonl:
            return Record(number, line, {"input": line})
        fields = parse_object(line)
        if self.field not in fields:
            raise TextError(f"no field {self.field!r} (it has {', '.join(fields)})")
        trouble = describe_text(fields, self.field)
        if not trouble and not fields[self.field].strip():
            trouble = f"field {self.field!r} is empty"
        return Record(number, None if trouble else fields[self.field], fields, trouble)

    def count(self) -> int | None:
        """Number of lines; None of a stream."""
        if self.path == "-":
            return None
        bounded_files.check_regular(self.path)
        with self.open() as lines:
            return sum(1 for _ in bounded_lines(lines))

    def digest(self) -> str | None:
        """SHA-256 of the content; None of a stream."""
        if self.path == "-":
            return None
        with self.open() as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


def is_json_lines(path: str) -> bool:
    """True for a name that ends as files of JSON lines do, packed ones too."""
    packed = packed_files.packed_ending(Path(path))
    return path.lower().removesuffix(packed).endswith((".jsonl", ".ndjson"))


def describe_text(fields: dict[str, Any], name: str) -> str | None:
    """The reason why a field is not a text; None for a text."""
    text = fields.get(name)
    if not isinstance(text, str):
        return f"no text in field {name!r}"
    try:
        check_unicode(text)
    except TextError as error:
        return f"field {name!r} is {error}"
    return None


def json_line(row: dict[str, Any]) -> str:
    """A row of output as JSON; other fields of its input may hold text that UTF-8 cannot."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        check_unicode(line)
    except TextError:
        return json.dumps(row)
    return line


@dataclasses.dataclass(frozen=True)
class Sink:
    """An output of lines that can be continued.

    Attributes:
      path: a file, or "-" for stdout.
      settings: what decides the lines; kept beside the file, and compared before it is continued.
      sources: files that are read; the output is none of them.
    """

    path: str
    settings: dict[str, Any]
    sources: tuple[str | None, ...] = ()

    @property
    def settings_path(self) -> Path:
        """The file of the settings."""
        return parse_output_path(f"{self.path}.settings.json")

    def begin(self, overwrite: bool) -> int:
        """Number of lines that exist already, by the same settings; 0 for a new output.

        Raises:
          ValueError: the output exists, with other settings or without any, is a source, or another
            process writes it.
        """
        if self.path == "-":
            return 0
        for written in (self.path, f"{self.path}.settings.json"):
            check_apart("--output", written, self.sources)
        path = parse_output_path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if is_address(path) else locked_output(path):
            # An output without a line is none: it was begun on a full disk, or before a kill.
            if path.exists() and path.stat().st_size and not overwrite:
                self.compare()
                return complete_lines(path)
            # First the output, without lines, then its settings: lines never stand beside others.
            path.write_bytes(b"")
            write_atomically(self.settings_path, json.dumps(self.settings, indent=1) + "\n")
            return 0

    def compare(self) -> None:
        """Raises ValueError unless the output that exists has these settings."""
        remedy = "choose another --output, or --overwrite it"
        if self.settings.get("input_digest") is None:
            raise ValueError(f"{self.path} exists, and a stream cannot be continued: {remedy}")
        if not self.settings_path.exists() or not self.settings_path.stat().st_size:
            state = "is empty" if self.settings_path.exists() else "does not"
            raise ValueError(f"{self.path} exists, but {self.settings_path} {state}: {remedy}")
        # As the file has them: a tuple is a list there.
        there, here = self.kept_settings(remedy), json.loads(json.dumps(self.settings))
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self.path} was written with {name} {there.get(name)!r}, now it is "
                    f"{here.get(name)!r}: {remedy}"
                )

    def kept_settings(self, remedy: str) -> dict[str, Any]:
        """The settings of the output that exists; `remedy` ends the message of an error."""
        try:
            kept = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.settings_path} cannot be read ({error}): {remedy}") from error
        if not isinstance(kept, dict):
            raise ValueError(f"{self.settings_path} holds no settings: {remedy}")
        return aliases.rename_keys(kept, "Decode", "decode.")

    def open(self) -> Any:
        """The stream that lines are appended to; ValueError if another process appends too."""
        if self.path == "-":
            return nullcontext(sys.stdout.buffer)
        path = parse_output_path(self.path)
        return path.open("ab") if is_address(path) else locked_output(path)


def check_apart(flag: str, written: str, sources: Iterable[str | None]) -> None:
    """Checks that a file that is written is not one that is read, under whatever name.

    Args:
      flag: option that names what is written, for the message.
      written: the file.
      sources: what is read; "-" and None are no files.

    Raises:
      ValueError: it is one of them.
    """
    for source in sources:
        if not source or source == "-":
            continue
        paths = parse_path(written), parse_path(source)
        local = not any(map(is_address, paths)) and all(path.exists() for path in paths)
        if paths[0] == paths[1] or (local and paths[0].samefile(paths[1])):
            raise ValueError(f"{flag} would write over {source}, which is read: name another file")


@contextmanager
def locked_output(path: Path) -> Generator[IO[bytes]]:
    """A file to append to, for one process at a time: two would mix their lines."""
    with path.open("ab") as output:
        try:
            if path.is_file():  # and not /dev/null, which is everybody's
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is writing {path}: wait for it, or choose another --output"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield output


def bounded_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of a stream; of one that is longer than MOST_BYTES only so many bytes and one more."""
    while line := stream.readline(MOST_BYTES + 1):
        rest = line
        while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MOST_BYTES + 1)
        yield line


def complete_lines(path: Path) -> int:
    """Cuts off a last line that a killed process left half written, and counts the rest."""
    if is_address(path):
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1]
        if lines != content:
            path.write_bytes(lines)
        return lines.count(b"\n")
    count = end = 0
    with path.open("r+b") as output:
        # In pieces: an output may be larger than the memory.
        while piece := output.read(MOST_BYTES):
            count += piece.count(b"\n")
            if b"\n" in piece:
                end = output.tell() - len(piece) + piece.rfind(b"\n") + 1
        output.truncate(end)
    return count


def append(output: IO[bytes], lines: list[str]) -> None:
    """Writes lines together; they are on disk when it returns, and in a store before long."""
    output.write("".join(line + "\n" for line in lines).encode())
    output.flush()
    if output is not sys.stdout.buffer:
        os.fsync(output.fileno())
