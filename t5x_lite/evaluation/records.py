# SPDX-License-Identifier: Apache-2.0
"""Records of a text or JSONL stream, and an output beside them that can be continued."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

# What some editors begin a UTF-8 file with.
MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Record:
    """Line `number` (from 1) of the input: its text, or what is wrong with the line."""

    number: int
    text: str | None
    fields: dict[str, Any]
    trouble: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from: a path or "-", read as plain lines or JSONL with `field`."""

    path: str
    jsonl: bool
    field: str

    def records(self) -> Iterator[Record]:
        """Every line, in order; one that cannot be read says so and stands in its place."""
        with nullcontext(sys.stdin.buffer) if self.path == "-" else open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield self.record(number, line.removeprefix(MARK) if number == 1 else line)

    def record(self, number: int, line: bytes) -> Record:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})"
            return Record(number, None, {}, reason)
        if not text.strip():
            return Record(number, None, {}, "empty")
        return self.parsed(number, text) if self.jsonl else Record(number, text, {"input": text})

    def parsed(self, number: int, text: str) -> Record:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Record(number, None, {}, f"broken JSON ({error})")
        if not isinstance(fields, dict) or self.field not in fields:
            there = f"it has {', '.join(fields)}" if isinstance(fields, dict) else "no object"
            return Record(number, None, {}, f"no field {self.field!r} ({there})")
        if not isinstance(fields[self.field], str) or not fields[self.field].strip():
            return Record(number, None, fields, f"field {self.field!r} is not a text, or empty")
        return Record(number, fields[self.field], fields)

    def count(self) -> int | None:
        """How many lines there are; None of a stream."""
        if self.path == "-":
            return None
        with open(self.path, "rb") as lines:
            return sum(1 for _ in lines)

    def digest(self) -> str | None:
        """What tells this content from another; None of a stream."""
        if self.path == "-":
            return None
        with open(self.path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Sink:
    """Where lines go: "-", or a path with its settings beside it, which say how it was made."""

    path: str
    settings: dict[str, Any]

    @property
    def beside(self) -> Path:
        return Path(f"{self.path}.settings.json")

    def begin(self, overwrite: bool) -> int:
        """How many lines are there already, made in the same way; 0 for a fresh output.

        Raises:
          ValueError: the output exists and was made otherwise, or nobody knows how.
        """
        if self.path == "-":
            return 0
        path = Path(self.path)
        if path.exists() and not overwrite:
            self.compare()
            return whole_lines(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.beside.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        return 0

    def compare(self) -> None:
        """Raises ValueError unless the output that exists was made with these settings."""
        remedy = "choose another --output, or --overwrite it"
        if self.settings.get("input_digest") is None:
            raise ValueError(f"{self.path} exists, and a stream cannot be continued: {remedy}")
        if not self.beside.exists():
            raise ValueError(f"{self.path} exists, but {self.beside} does not: {remedy}")
        there, here = self.made(remedy), self.settings
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self.path} was made with {name} {there.get(name)!r}, now it is "
                    f"{here.get(name)!r}: {remedy}"
                )

    def made(self, remedy: str) -> dict[str, Any]:
        """The settings that the output was made with."""
        try:
            found = json.loads(self.beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.beside} cannot be read ({error}): {remedy}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{self.beside} holds no settings: {remedy}")
        return found

    def open(self) -> Any:
        """The stream that lines are appended to."""
        return nullcontext(sys.stdout.buffer) if self.path == "-" else open(self.path, "ab")


def whole_lines(path: Path) -> int:
    """Cuts off a last line that a killed process left half written, and counts the rest."""
    with path.open("r+b") as output:
        content = output.read()
        end = content.rfind(b"\n") + 1
        output.truncate(end)
    return content.count(b"\n", 0, end)


def append(output: IO[bytes], lines: list[str]) -> None:
    """Writes whole lines at once, and has them on disk before it returns."""
    output.write("".join(line + "\n" for line in lines).encode())
    output.flush()
    if output is not sys.stdout.buffer:
        os.fsync(output.fileno())
