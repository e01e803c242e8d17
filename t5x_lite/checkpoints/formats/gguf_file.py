# SPDX-License-Identifier: Apache-2.0
"""Parts of a .gguf file: metadata, and the place of each tensor; every count is checked first.

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

from t5x_lite.tokenizers.errors import GgufError
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.remote_folders import RemoteBytes, RemoteFolder

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Value types of metadata by their number; 8 is a text and 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9
MAX_DIMENSIONS = 4
# No file has as many; a broken count in a large file would otherwise fill the memory. The largest
# vocabularies have 262,144 tokens and 514,906 merges.
MAX_VALUES, MAX_ENTRIES = 2**22, 2**18


class GgufTensor(NamedTuple):
    """One tensor of a file.

    Attributes:
      shape: slowest axis first.
      kind: how it is quantized, or its dtype: "Q8_0", "F32".
      begin: its first byte in the file.
      size: its bytes.
    """

    shape: tuple[int, ...]
    kind: str
    begin: int
    size: int


class GgufFile(NamedTuple):
    """An opened .gguf file.

    Attributes:
      path: the file.
      content: its bytes, mapped, of which those of tensors are not read yet; of a remote file its
        header alone.
      metadata: fields by name; an array is a list.
      tensors: tensors by name.
    """

    path: Path
    content: mmap.mmap | RemoteBytes
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: str | Path, repository: RemoteFolder | None = None) -> GgufFile:
    """Reads the header of a file.

    Args:
      path: the file.
      repository: the remote folder that it is of, for a file that is not on the disk yet.

    Raises:
      GgufError: it is not a GGUF file, of another version, cut off, or contradicts itself.
    """
    path = Path(path)
    if repository is not None and not path.is_file():
        content = RemoteBytes(repository, path.relative_to(repository.folder).as_posix())
        check_size(path, len(content))
    else:
        content = map_file(path)
    cursor = GgufCursor(path, content)
    tensors, entries = read_counts(cursor)
    if max(tensors, entries) > MAX_ENTRIES:
        raise GgufError(
            f"{path} is cut off or broken: it should have {tensors:,} tensors and "
            f"{entries:,} fields"
        )
    metadata = {}
    for _ in range(entries):
        name = cursor.text("the name of a metadata field")
        if name in metadata:
            raise GgufError(f"{path} has metadata field {name} twice")
        metadata[name] = read_value(cursor, name, cursor.number("I", f"the type of {name}"))
    table = read_tensor_table(cursor, tensors, metadata.get("general.alignment", 32))
    return GgufFile(path, content, metadata, table)


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file of this machine, mapped."""
    if not path.is_file():
        raise GgufError(f"No GGUF file {path}")
    with path.open("rb") as file:
        check_size(path, os.fstat(file.fileno()).st_size)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_size(path: Path, size: int) -> None:
    """Raises GgufError where a file is too short for a header."""
    if size < 24:
        raise GgufError(f"{path} is cut off: a GGUF file begins with 24 bytes of counts")


class GgufCursor:
    """Position in a file, that moves on with everything read and never past the end."""

    def __init__(self, path: Path, content: mmap.mmap | RemoteBytes):
        self.path, self.content, self.position = path, content, 0
        self.values = 0

    def need(self, size: int, what: str) -> None:
        """Raises GgufError unless `size` bytes are left, for `what`."""
        left = len(self.content) - self.position
        if size > left:
            raise GgufError(
                f"{self.path} is cut off or broken: {what} would take {size:,} bytes at byte "
                f"{self.position:,}, but {left:,} are left. Copy the file again"
            )

    def numbers(self, code: str, count: int, what: str) -> tuple:
        """Reads numbers.

        Args:
          code: their format as `struct` has it.
          count: how many.
          what: what they are, for messages.
        """
        size = count * struct.calcsize(f"<{code}")
        self.need(size, what)
        self.position += size
        return struct.unpack(f"<{count}{code}", self.content[self.position - size : self.position])

    def number(self, code: str, what: str) -> Any:
        """Reads one number."""
        return self.numbers(code, 1, what)[0]

    def text(self, what: str) -> str:
        """Reads a text in UTF-8, which begins with its length."""
        size = self.number("Q", what)
        self.need(size, what)
        self.position += size
        try:
            return self.content[self.position - size : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"{self.path} is broken: {what} is not UTF-8") from error


def read_counts(cursor: GgufCursor) -> tuple[int, int]:
    """Reads the number of tensors and of metadata fields."""
    magic = cursor.content[:4]
    if magic != MAGIC:
        raise GgufError(
            f"{cursor.path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}"
        )
    cursor.position = 4
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"of GGUF version {version}"
        raise GgufError(
            f"{cursor.path} is {kind}; only little-endian files of versions "
            f"{' and '.join(map(str, VERSIONS))} are read: convert the model anew"
        )
    return cursor.numbers("Q", 2, "the counts")


def read_value(cursor: GgufCursor, name: str, kind: int) -> Any:
    """Reads a metadata value; an array is a list.

    Args:
      cursor: position of the value.
      name: name of the field, for messages.
      kind: number of its type.
    """
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], name)
    if kind == TEXT:
        return cursor.text(name)
    if kind == ARRAY:
        inner, count = cursor.number("I", name), cursor.number("Q", name)
        cursor.values += count
        if cursor.values > MAX_VALUES:
            raise GgufError(f"{cursor.path} is broken: {name} is an array of {count:,} values")
        if inner in SCALARS:
            return list(cursor.numbers(SCALARS[inner], count, name))
        if inner == TEXT:
            cursor.need(8 * count, name)
            return [cursor.text(name) for _ in range(count)]
        raise GgufError(f"{cursor.path}: {name} is an array of type {inner}, which is unknown")
    raise GgufError(f"{cursor.path}: {name} has type {kind}, which is unknown")


def read_tensor_table(cursor: GgufCursor, count: int, alignment: Any) -> dict[str, GgufTensor]:
    """Reads the table of tensors.

    Args:
      cursor: position of the table.
      count: number of tensors.
      alignment: general.alignment of the metadata: tensors begin at multiples of it.

    Returns:
      Every tensor by name.
    """
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GgufError(f"{cursor.path}: general.alignment is {alignment}, not a power of two")
    described = {}
    for _ in range(count):
        name = cursor.text("the name of a tensor")
        if name in described:
            raise GgufError(f"{cursor.path} has tensor {name} twice")
        described[name] = read_tensor_entry(cursor, name)
    data = round_up(cursor.position, alignment)
    tensors = {name: locate_tensor(cursor, name, data, *entry) for name, entry in described.items()}
    check_places(cursor.path, tensors, data, alignment)
    return tensors


def round_up(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def check_places(path: Path, tensors: dict[str, GgufTensor], data: int, alignment: int) -> None:
    """Checks that tensors lie one after the other, with padding only, as ggml requires.

    Args:
      path: the file, for messages.
      tensors: tensors by name.
      data: first byte of all tensors.
      alignment: tensors begin at multiples of it.

    Raises:
      GgufError: two share bytes, there is a gap, or one is not aligned.
    """
    reached = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != reached:
            raise GgufError(
                f"{path}: tensor {name} should begin at byte {reached:,}, where the one before it "
                f"ends, and begins at {tensor.begin:,}. The file is broken or was put together "
                "wrongly: copy it again"
            )
        reached = round_up(tensor.begin + tensor.size, alignment)


def read_tensor_entry(cursor: GgufCursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Reads the shape of a tensor, the number of its kind, and its offset among the data."""
    dimensions = cursor.number("I", f"the dimensions of {name}")
    if dimensions > MAX_DIMENSIONS:
        raise GgufError(f"{cursor.path} is broken: tensor {name} has {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions, f"the shape of {name}")
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    return shape[::-1], kind, offset


def locate_tensor(
    cursor: GgufCursor, name: str, data: int, shape: tuple[int, ...], number: int, offset: int
) -> GgufTensor:
    """A tensor whose bytes are known to be in the file.

    Args:
      cursor: the file.
      name: name of the tensor, for messages.
      data: first byte of all tensors.
      shape: shape of the tensor, slowest axis first.
      number: number of its kind.
      offset: its first byte among the tensors.

    Raises:
      GgufError: its kind is unknown, or the file is too short for it.
    """
    constants = import_gguf("constants")
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
    cursor.position = data + offset
    cursor.need(total, f"tensor {name} {list(shape)}")
    return GgufTensor(shape, kind.name, data + offset, total)


def import_gguf(part: str) -> ModuleType:
    """A module of the gguf package; GgufError with the remedy where it is not installed."""
    try:
        return importlib.import_module(f"gguf.{part}")
    except ModuleNotFoundError as error:
        raise GgufError(
            f".gguf files are read with the gguf package: {install_command('gguf')}"
        ) from error
