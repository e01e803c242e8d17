# SPDX-License-Identifier: Apache-2.0
"""The parts of a .gguf file: metadata, and where each tensor lies; every count is checked first.

`gguf.GGUFReader` keeps four arrays for each of a vocabulary's strings (3 s for 98,000 of them) and
trusts what it reads; this takes 0.1 s and names what is wrong. Layout: ggml's docs/gguf.md.
"""

import importlib
import math
import mmap
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Value types of metadata by their number; 8 is a text and 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9
MOST_DIMENSIONS = 4
# No vocabulary has as many; a broken count in a large file would otherwise fill the memory.
MOST_VALUES = 2**24


class GgufError(ValueError):
    """A .gguf file is not whole, or says what cannot be; the message names it."""


class Tensor(NamedTuple):
    """One tensor: its shape, slowest axis first, how it is quantised, and its bytes in the file."""

    shape: tuple[int, ...]
    kind: str
    begin: int
    size: int


class File(NamedTuple):
    """A .gguf file opened: `content` is mapped, so nothing of the tensors is read yet."""

    path: Path
    content: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def open_file(path: str | Path) -> File:
    """What the file says of itself.

    Raises:
      GgufError: it is no GGUF file, of another version, cut off, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise GgufError(f"No GGUF file {path}")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise GgufError(f"{path} is cut off: a GGUF file begins with 24 bytes of counts")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = Cursor(path, content)
    tensors, entries = begin(cursor)
    metadata = {}
    for _ in range(entries):
        name = cursor.text("the name of a metadata field")
        if name in metadata:
            raise GgufError(f"{path} has metadata field {name} twice")
        metadata[name] = value(cursor, name, cursor.number("I", f"the type of {name}"))
    table = tensor_table(cursor, tensors, metadata.get("general.alignment", 32))
    return File(path, content, metadata, table)


class Cursor:
    """A place in the file that moves on with everything read, never past the end."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.content, self.place = path, content, 0

    def need(self, size: int, what: str) -> None:
        left = len(self.content) - self.place
        if size > left:
            raise GgufError(
                f"{self.path} is cut off or broken: {what} would take {size:,} bytes at byte "
                f"{self.place:,}, but {left:,} are left. Copy the file again"
            )

    def numbers(self, form: str, count: int, what: str) -> tuple:
        self.need(count * struct.calcsize(f"<{form}"), what)
        found = struct.unpack_from(f"<{count}{form}", self.content, self.place)
        self.place += struct.calcsize(f"<{count}{form}")
        return found

    def number(self, form: str, what: str) -> Any:
        return self.numbers(form, 1, what)[0]

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        self.need(size, what)
        self.place += size
        try:
            return self.content[self.place - size : self.place].decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"{self.path} is broken: {what} is no UTF-8") from error


def begin(cursor: Cursor) -> tuple[int, int]:
    """How many tensors and how many metadata fields there are."""
    magic = cursor.content[:4]
    if magic != MAGIC:
        raise GgufError(f"{cursor.path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    cursor.place = 4
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        why = "big-endian" if version & 0xFFFF == 0 else f"of GGUF version {version}"
        raise GgufError(
            f"{cursor.path} is {why}; only little-endian files of versions "
            f"{' and '.join(map(str, VERSIONS))} are read: convert the model anew"
        )
    return cursor.numbers("Q", 2, "the counts")


def value(cursor: Cursor, name: str, kind: int) -> Any:
    """A metadata value; an array is a list."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], name)
    if kind == TEXT:
        return cursor.text(name)
    if kind == ARRAY:
        inner, count = cursor.number("I", name), cursor.number("Q", name)
        if count > MOST_VALUES:
            raise GgufError(f"{cursor.path} is broken: {name} is an array of {count:,} values")
        if inner in SCALARS:
            return list(cursor.numbers(SCALARS[inner], count, name))
        if inner == TEXT:
            cursor.need(8 * count, name)
            return [cursor.text(name) for _ in range(count)]
        raise GgufError(f"{cursor.path}: {name} is an array of type {inner}, which is unknown")
    raise GgufError(f"{cursor.path}: {name} has type {kind}, which is unknown")


def tensor_table(cursor: Cursor, count: int, alignment: Any) -> dict[str, Tensor]:
    """Every tensor by name."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GgufError(f"{cursor.path}: general.alignment is {alignment}, no power of two")
    described = {}
    for _ in range(count):
        name = cursor.text("the name of a tensor")
        if name in described:
            raise GgufError(f"{cursor.path} has tensor {name} twice")
        described[name] = tensor_entry(cursor, name)
    data = -(-cursor.place // alignment) * alignment
    return {name: placed(cursor, name, data, *entry) for name, entry in described.items()}


def tensor_entry(cursor: Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, number of the kind, and the offset among the data."""
    dimensions = cursor.number("I", f"the dimensions of {name}")
    if dimensions > MOST_DIMENSIONS:
        raise GgufError(f"{cursor.path} is broken: tensor {name} has {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions, f"the shape of {name}")
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    return shape[::-1], kind, offset


def placed(cursor: Cursor, name: str, data: int, shape, number: int, offset: int) -> Tensor:
    """A tensor whose bytes are known to be in the file."""
    constants = package("constants")
    try:
        kind = constants.GGMLQuantizationType(number)
    except ValueError as error:
        raise GgufError(
            f"{cursor.path}: tensor {name} is of ggml type {number}, which this version of the "
            "gguf package does not know: update it (pip install -U gguf)"
        ) from error
    block, size = constants.GGML_QUANT_SIZES[kind]
    if (shape or (1,))[-1] % block:
        raise GgufError(
            f"{cursor.path} is broken: tensor {name} {list(shape)} is {kind.name}, whose rows are "
            f"multiples of {block}"
        )
    total = math.prod(shape) // block * size
    cursor.place = data + offset
    cursor.need(total, f"tensor {name} {list(shape)}")
    return Tensor(shape, kind.name, data + offset, total)


def package(part: str) -> ModuleType:
    """A module of the gguf package; GgufError with the remedy where it is not installed."""
    try:
        return importlib.import_module(f"gguf.{part}")
    except ModuleNotFoundError as error:
        raise GgufError(
            ".gguf files are read with the gguf package: pip install 't5x_lite[gguf]'"
        ) from error
