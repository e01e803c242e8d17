# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files by name, read one at a time and checked before they are used.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape and
offsets), then the numbers. Nothing here runs code of a checkpoint, as unpickling would.
"""

import math
import os
import re
import warnings
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from t5x_lite.tokenizers.errors import SourceError, describe_error
from t5x_lite.utils import bounded_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# 300,000 tensors in one file; the format's own limit, 100 MB, would take gigabytes to parse.
HEADER_LIMIT = 2**25
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
# A variant of the weights, as save_pretrained(..., variant="fp16") names it.
VARIANT = re.compile(r"model\.\w+\.safetensors")
REMEDY = (
    "Only safetensors, GGUF and TensorStore are read: a pickle can run any code. Save it again "
    "where it comes from, with model.save_pretrained(folder, safe_serialization=True)."
)


class TensorSource(Protocol):
    """Tensors of a checkpoint, each of which is read when it is needed.

    Attributes:
      names: shape and dtype of every tensor.
    """

    names: dict[str, tuple[tuple[int, ...], np.dtype]]

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor, or one layer of a stack: `position` is the axis of layers, and the layer."""


class SafetensorsFiles:
    """Tensors of some safetensors files. A tensor is mapped, not loaded, when it is read.

    Raises:
      SourceError: a file is cut off or not safetensors, or two of them have the same tensor.
    """

    def __init__(self, files: list[Path]):
        self.places: dict[str, tuple[Path, int]] = {}
        self.names: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in files:
            for name, (shape, dtype, begin) in read_header(file).items():
                if name in self.places:
                    raise SourceError(f"{name} is in {self.places[name][0]} and in {file} too")
                self.places[name] = file, begin
                self.names[name] = shape, dtype

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        file, begin = self.places[name]
        shape, dtype = self.names[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        # One map for each tensor: what was read does not count as memory in use for long.
        array = np.asarray(np.memmap(file, dtype, "r", begin, shape or (1,))).reshape(shape)
        if position is None:
            return array
        axis, layer = position
        return array[(slice(None),) * axis + (layer,)]


def open_safetensors(path: str | Path) -> SafetensorsFiles:
    """Opens a folder with model.safetensors or its shards, or one file.

    Raises:
      SourceError: there is none, or it is not as its index or its header says.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"There is no {path}")
    if path.is_file():
        return SafetensorsFiles([check_suffix(path)])
    if (path / SINGLE).exists():
        # In this order transformers reads a folder that has both.
        if (path / INDEX).exists():
            warnings.warn(
                f"{path} has {SINGLE} and {INDEX} too: {SINGLE} is read and the shards are not, as "
                "transformers does. Remove the one that is old",
                stacklevel=2,
            )
        return SafetensorsFiles([path / SINGLE])
    if (path / INDEX).exists():
        return open_shards(path)
    raise SourceError(explain_missing(path))


def check_suffix(file: Path) -> Path:
    """The file; raises SourceError where its ending is not .safetensors."""
    if file.suffix in REFUSED:
        raise SourceError(f"{file} is not read. {REMEDY}")
    if file.suffix != ".safetensors":
        raise SourceError(f"{file} is not a .safetensors file")
    return file


def explain_missing(folder: Path) -> str:
    """The reason why a folder without an index or model.safetensors cannot be read."""
    names = sorted(file.name for file in folder.iterdir())
    parts = [name for name in names if name.endswith(".safetensors")]
    variant = next((name for name in names if VARIANT.fullmatch(name)), None)
    if variant is not None:
        return (
            f"{folder} has its weights in {variant}, a variant that is read only under the usual "
            f"name: rename it to {SINGLE}"
        )
    if parts:
        return (
            f"{folder} has {parts[0]}{' and others' if parts[1:] else ''} but no {INDEX}: without "
            "it a missing shard would go unnoticed. Copy it from where the shards come from."
        )
    refused = [name for name in names if name.endswith(REFUSED)]
    if refused:
        return f"{folder} has its weights in {refused[0]}. {REMEDY}"
    return f"{folder} has no {SINGLE} and no {INDEX}"


def open_shards(folder: Path) -> SafetensorsFiles:
    """Opens the shards that the index names; every tensor has to be in the one that it says."""
    shards = read_weight_map(folder / INDEX)
    for file in sorted(set(shards.values())):
        if not (folder / file).is_file():
            raise SourceError(f"{folder / INDEX} names the shard {file}, which is not there")
    source = SafetensorsFiles([folder / file for file in sorted(set(shards.values()))])
    for name, file in shards.items():
        if name not in source.places or source.places[name][0].name != file:
            raise SourceError(f"{folder / INDEX}: {name} is not in {file}, where it should be")
    stray = sorted(source.names.keys() - shards.keys())
    if stray:
        file = source.places[stray[0]][0]
        raise SourceError(f"{file} has {stray[0]}, which {folder / INDEX} does not name")
    return source


def read_weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor, by the index; raises SourceError where it is broken."""
    try:
        shards = bounded_files.read_json_object(index)["weight_map"]
        if not shards or not all(isinstance(file, str) for file in shards.values()):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index} is not an index of safetensors: {describe_error(error)}"
        ) from error
    outside = next((file for file in shards.values() if Path(file).name != file), None)
    if outside is not None:
        raise SourceError(f"{index} names the shard {outside!r}, which is not a file beside it")
    return shards


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
    """Shape, dtype and first byte of every tensor of a file.

    Raises:
      SourceError: it is cut off or not safetensors.
    """
    try:
        bounded_files.check_regular(file)
    except bounded_files.UnreadableFileError as error:
        raise SourceError(str(error)) from error
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise SourceError(
                f"{file} is not a complete safetensors file: its header should be {length:,} bytes "
                f"long, the file is {size:,}. Copy it again."
            )
        text = stream.read(length)
    try:
        listed = bounded_files.parse_json(text, refuse_repeats)
        listed.pop("__metadata__", None)
        tensors = {name: parse_tensor(fields) for name, fields in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{file} has no readable header: {describe_error(error)}") from error
    check_extent(file, tensors, size - 8 - length)
    return {
        name: (shape, dtype, 8 + length + begin)
        for name, (shape, dtype, begin, _) in tensors.items()
    }


def refuse_repeats(pairs: list[tuple]) -> dict:
    """The pairs as a dict; raises ValueError where a name stands twice."""
    twice = bounded_files.repeated_name(pairs)
    if twice is not None:
        raise ValueError(f"{twice} stands twice")
    return dict(pairs)


def parse_tensor(fields: dict) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, first and last byte of one tensor of a header."""
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"dtype {fields['dtype']!r} is not known")
    shape, dtype, offsets = fields["shape"], DTYPES[fields["dtype"]], fields["data_offsets"]
    integers = [*shape, *offsets]
    if len(offsets) != 2 or not all(type(value) is int and value >= 0 for value in integers):
        raise ValueError(f"shape {shape} and data_offsets {offsets} are not as they should be")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not fit data_offsets {offsets}")
    return tuple(shape), dtype, *offsets


def check_extent(file: Path, tensors: dict[str, tuple], length: int) -> None:
    """Checks that the tensors fill a file, one after the other.

    Args:
      file: the file, for messages.
      tensors: shape, dtype, first and last byte of each tensor.
      length: bytes of all tensors.

    Raises:
      SourceError: there are gaps, or the file is cut off.
    """
    reached = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != reached or end > length:
            raise SourceError(
                f"{file}: {name} should lie at bytes {begin:,} to {end:,} of {length:,}, the one "
                f"before ends at {reached:,}. The file is cut off or was put together wrongly: "
                "copy it again."
            )
        reached = end
    if reached != length:
        raise SourceError(f"{file} has {length - reached:,} bytes after its last tensor")
