# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files by name, read one at a time and checked before they are used.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape and
offsets), then the numbers. Nothing here runs code of a checkpoint, as unpickling would.
"""

import concurrent.futures
import math
import os
import re
import warnings
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from t5x_lite.tokenizers.errors import SourceError, describe_error
from t5x_lite.utils import bounded_files, remote_folders
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.remote_folders import RemoteFolder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# 300,000 tensors in one file; the format's own limit, 100 MB, would take gigabytes to parse.
HEADER_LIMIT = 2**25
# Headers that are read by requests at once.
REQUESTS = 8
# Name -> shape, dtype and first byte, of the tensors of a file.
Header = dict[str, tuple[tuple[int, ...], np.dtype, int]]
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

    Files of the hub or of a store that are not on the disk yet are downloaded when the first
    tensor is read; before, only their headers are.

    Args:
      files: the files.
      repository: the remote folder that they are of; None for files of this machine.

    Raises:
      SourceError: a file is cut off or not safetensors, or two of them have the same tensor.
    """

    def __init__(self, files: list[Path], repository: RemoteFolder | None = None):
        self.places: dict[str, tuple[Path, int]] = {}
        self.names: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.repository = repository
        self.remote = [] if repository is None else [each for each in files if not each.is_file()]
        for file, header in zip(files, self.read_headers(files), strict=True):
            for name, (shape, dtype, begin) in header.items():
                if name in self.places:
                    raise SourceError(f"{name} is in {self.places[name][0]} and in {file} too")
                self.places[name] = file, begin
                self.names[name] = shape, dtype

    def read_headers(self, files: list[Path]) -> list[Header]:
        """Headers of files: from the disk, or of remote ones by requests for their first bytes."""
        if self.repository is None or not self.remote:
            return [read_header(file) for file in files]

        def read(file: Path) -> Header:
            remote = file in self.remote
            return (
                read_remote_header(not_none(self.repository), file) if remote else read_header(file)
            )

        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(read, files))

    def download(self) -> None:
        """Downloads the files that are not on the disk yet.

        Raises:
          ValueError, OSError: they cannot be downloaded.
        """
        if self.repository is not None and self.remote:
            root = self.repository.folder
            self.repository.fetch([file.relative_to(root).as_posix() for file in self.remote])
            self.remote = []

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        self.download()
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


def open_safetensors(path: str | Path, repository: RemoteFolder | None = None) -> SafetensorsFiles:
    """Opens a folder with model.safetensors or its shards, or one file.

    Args:
      path: the folder or file.
      repository: the remote folder that it is of, where files may be missing that can be
        downloaded; None for a folder of this machine.

    Raises:
      SourceError: there is none, or it is not as its index or its header says.
    """
    path = Path(path)

    def exists(name: str) -> bool:
        return (path / name).exists() or (repository is not None and name in repository.files)

    if not path.exists():
        raise SourceError(f"There is no {path}")
    if path.is_file():
        return SafetensorsFiles([check_suffix(path)])
    if exists(SINGLE):
        # In this order transformers reads a folder that has both.
        if exists(INDEX) and repository is None:
            warnings.warn(
                f"{path} has {SINGLE} and {INDEX} too: {SINGLE} is read and the shards are not, as "
                "transformers does. Remove the one that is old",
                stacklevel=2,
            )
        return SafetensorsFiles([path / SINGLE], repository)
    if exists(INDEX):
        return open_shards(path, repository)
    names = repository.files if repository else (file.name for file in path.iterdir())
    raise SourceError(explain_missing(str(repository.name if repository else path), sorted(names)))


def check_suffix(file: Path) -> Path:
    """The file; raises SourceError where its ending is not .safetensors."""
    if file.suffix in REFUSED:
        raise SourceError(f"{file} is not read. {REMEDY}")
    if file.suffix != ".safetensors":
        raise SourceError(f"{file} is not a .safetensors file")
    return file


def explain_missing(folder: str, names: list[str]) -> str:
    """The reason why a folder without an index or model.safetensors cannot be read."""
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


def open_shards(folder: Path, repository: RemoteFolder | None = None) -> SafetensorsFiles:
    """Opens the shards that the index names; every tensor has to be in the one that it says."""
    shards = read_weight_map(folder / INDEX)
    for file in sorted(set(shards.values())):
        listed = repository is not None and file in repository.files
        if not listed and not (folder / file).is_file():
            raise SourceError(f"{folder / INDEX} names the shard {file}, which is not there")
    source = SafetensorsFiles([folder / file for file in sorted(set(shards.values()))], repository)
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


def read_header(file: Path) -> Header:
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
        length = header_length(file, stream.read(8), size)
        return parse_header(file, stream.read(length), size)


def read_remote_header(repository: RemoteFolder, file: Path) -> Header:
    """`read_header` of a remote file, of which no more than the header is downloaded.

    Args:
      repository: the folder that it is of.
      file: the path that it will have on this machine.

    Raises:
      SourceError: it is not safetensors.
      ValueError, OSError: it cannot be read.
    """
    name = file.relative_to(repository.folder).as_posix()
    first, size = repository.read_range(name, 0, remote_folders.FIRST_BYTES)
    length = header_length(file, first[:8], size)
    if len(first) < 8 + length:
        first += repository.read_range(name, len(first), 8 + length)[0]
    return parse_header(file, first[8 : 8 + length], size)


def header_length(file: Path, first: bytes, size: int) -> int:
    """Bytes of a header by the first eight of its file.

    Args:
      file: the file, for messages.
      first: its first eight bytes, fewer if it is shorter.
      size: bytes of the file.

    Raises:
      SourceError: the file is shorter, or no header is so long.
    """
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise SourceError(
            f"{file} is not a complete safetensors file: its header should be {length:,} bytes "
            f"long, the file is {size:,}. Copy it again."
        )
    return length


def parse_header(file: Path, text: bytes, size: int) -> Header:
    """Shape, dtype and first byte of every tensor by the text of a header.

    Args:
      file: the file, for messages.
      text: the header without its length.
      size: bytes of the file.

    Raises:
      SourceError: the header is not readable, or does not fit the file.
    """
    try:
        listed = bounded_files.parse_json(text, refuse_repeats)
        listed.pop("__metadata__", None)
        tensors = {name: parse_tensor(fields) for name, fields in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{file} has no readable header: {describe_error(error)}") from error
    first = 8 + len(text)
    check_extent(file, tensors, size - first)
    return {
        name: (shape, dtype, first + begin) for name, (shape, dtype, begin, _) in tensors.items()
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
