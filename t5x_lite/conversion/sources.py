# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint by name, read one at a time: safetensors, checked before they are used.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape and
offsets), then the numbers. Nothing here runs code of a checkpoint, as unpickling would.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from t5x_lite.data.special_tokens import panics_told

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's own limit.
HEADER_LIMIT = 100_000_000
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Formats that run code when they are read, or that are not a checkpoint of weights alone.
REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".npz", ".ot")
REMEDY = (
    "Only safetensors, GGUF and TensorStore are read: a pickle can run any code. Save it again "
    "where it comes from, with model.save_pretrained(folder, safe_serialization=True)."
)


class SourceError(ValueError):
    """A checkpoint that is broken, incomplete or of a kind that is not read."""


class Source(Protocol):
    """names -> (shape, dtype) of all tensors, and each of them when it is asked for.

    One whose tensors stack layers reads a single layer with `at`, (axis, layer).
    """

    names: dict[str, tuple[tuple[int, ...], np.dtype]]

    def read(self, name: str, at: tuple[int, int] | None = None) -> np.ndarray: ...


class Safetensors:
    """The tensors of some safetensors files. A tensor is mapped, not loaded, when it is read.

    Raises:
      SourceError: a file is not whole or not safetensors, or two of them have the same tensor.
    """

    def __init__(self, files: list[Path]):
        self.places: dict[str, tuple[Path, int]] = {}
        self.names: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in files:
            for name, (shape, dtype, begin) in header(file).items():
                if name in self.places:
                    raise SourceError(f"{name} is in {self.places[name][0]} and in {file} too")
                self.places[name] = file, begin
                self.names[name] = shape, dtype

    def read(self, name: str, at: tuple[int, int] | None = None) -> np.ndarray:
        file, begin = self.places[name]
        shape, dtype = self.names[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        # One map for each tensor: what was read does not count as memory in use for long.
        array = np.asarray(np.memmap(file, dtype, "r", begin, shape or (1,))).reshape(shape)
        return array if at is None else array[(slice(None),) * at[0] + (at[1],)]


def open(path: str | Path) -> Safetensors:
    """The tensors of a folder with model.safetensors or its shards, or of one file.

    Raises:
      SourceError: there is none, or it is not as its index or its header says.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"There is no {path}")
    if path.is_file():
        return Safetensors([readable(path)])
    if (path / INDEX).exists():
        return indexed(path)
    if (path / SINGLE).exists():
        return Safetensors([path / SINGLE])
    raise SourceError(missing(path))


def readable(file: Path) -> Path:
    if file.suffix in REFUSED:
        raise SourceError(f"{file} is not read. {REMEDY}")
    if file.suffix != ".safetensors":
        raise SourceError(f"{file} is no .safetensors file")
    return file


def missing(folder: Path) -> str:
    """Why a folder cannot be read that has neither an index nor model.safetensors."""
    names = sorted(file.name for file in folder.iterdir())
    parts = [name for name in names if name.endswith(".safetensors")]
    if parts:
        return (
            f"{folder} has {parts[0]}{' and others' if parts[1:] else ''} but no {INDEX}: without "
            "it nobody knows whether a shard is missing. Copy it from where the shards come from."
        )
    refused = [name for name in names if name.endswith(REFUSED)]
    if refused:
        return f"{folder} has its weights in {refused[0]}. {REMEDY}"
    return f"{folder} has no {SINGLE} and no {INDEX}"


def indexed(folder: Path) -> Safetensors:
    """The shards that the index names, each tensor in the one it says."""
    where = weight_map(folder / INDEX)
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise SourceError(f"{folder / INDEX} names the shard {file}, which is not there")
    source = Safetensors([folder / file for file in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in source.places or source.places[name][0].name != file:
            raise SourceError(f"{folder / INDEX}: {name} is not in {file}, where it should be")
    stray = sorted(source.names.keys() - where.keys())
    if stray:
        file = source.places[stray[0]][0]
        raise SourceError(f"{file} has {stray[0]}, which {folder / INDEX} does not name")
    return source


def weight_map(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is no index of safetensors: {told(error)}") from error
    outside = next((file for file in where.values() if Path(file).name != file), None)
    if outside is not None:
        raise SourceError(f"{index} names the shard {outside!r}, which is no file beside it")
    return where


def header(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
    """Shape, dtype and first byte of every tensor of a file; SourceError where it is not whole."""
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise SourceError(
                f"{file} is no whole safetensors file: its header should be {length:,} bytes long, "
                f"the file is {size:,}. Copy it again."
            )
        text = stream.read(length)
    try:
        listed = json.loads(text, object_pairs_hook=unique)
        listed.pop("__metadata__", None)
        found = {name: described(fields) for name, fields in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{file} has no readable header: {told(error)}") from error
    check_extent(file, found, size - 8 - length)
    return {
        name: (shape, dtype, 8 + length + begin) for name, (shape, dtype, begin, _) in found.items()
    }


def unique(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
    return made


def described(fields: dict) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, first and last byte of one tensor of a header."""
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"dtype {fields['dtype']!r} is not known")
    shape, dtype, offsets = fields["shape"], DTYPES[fields["dtype"]], fields["data_offsets"]
    whole = [*shape, *offsets]
    if len(offsets) != 2 or not all(type(value) is int and value >= 0 for value in whole):
        raise ValueError(f"shape {shape} and data_offsets {offsets} are not as they should be")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not fit data_offsets {offsets}")
    return tuple(shape), dtype, *offsets


def check_extent(file: Path, found: dict[str, tuple], length: int) -> None:
    """SourceError unless the tensors fill the file, one after the other."""
    at = 0
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin != at or end > length:
            raise SourceError(
                f"{file}: {name} should lie at bytes {begin:,} to {end:,} of {length:,}, the one "
                f"before ends at {at:,}. The file is cut off or was put together wrongly: copy it "
                "again."
            )
        at = end
    if at != length:
        raise SourceError(f"{file} has {length - at:,} bytes after its last tensor")


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside as a SourceError that names path: libraries raise many kinds."""
    try:
        with panics_told():
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise SourceError(f"{path}: {what} cannot be read: {told(error)}") from error


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
