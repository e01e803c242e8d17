# SPDX-License-Identifier: Apache-2.0
"""Safetensors files as an output: tensors one after the other, in shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from t5x_lite.checkpoints import transforms
from t5x_lite.checkpoints.formats.safetensors_files import DTYPES, INDEX, SINGLE

CODES = {dtype: code for code, dtype in DTYPES.items()}
# transformers takes a file for one of its own only with this entry.
FORMAT_METADATA = {"format": "pt"}

Names = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def tensor_bytes(tensor: tuple[tuple[int, ...], np.dtype]) -> int:
    """Bytes of a tensor of this shape and dtype."""
    shape, dtype = tensor
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def divide_into_shards(names: Names, limit: int) -> list[list[str]]:
    """Names in their order, in shards of at most `limit` bytes unless one tensor is larger."""
    shards, filled = [[]], 0
    for name, tensor in names.items():
        if shards[-1] and filled + tensor_bytes(tensor) > limit:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += tensor_bytes(tensor)
    return shards


class ShardWriter:
    """Writes tensors in the order of `names`: to model.safetensors, or to shards and an index."""

    def __init__(self, folder: Path, names: Names, limit: int):
        self.folder, self.names = folder, names
        parts = divide_into_shards(names, limit)
        many = len(parts)
        self.files = {
            name: SINGLE if many == 1 else f"model-{number:05}-of-{many:05}.safetensors"
            for number, part in enumerate(parts, 1)
            for name in part
        }
        self.left = list(names)
        self.stream: BinaryIO | None = None
        self.current = ""

    def write(self, name: str, array: np.ndarray) -> None:
        if self.left.pop(0) != name or (array.shape, array.dtype) != self.names[name]:
            raise AssertionError(f"{name} is not the next tensor, or not as it was announced")
        if self.files[name] != self.current:
            self.open_shard(self.files[name])
        # As bytes, since the buffer protocol lacks bfloat16.
        assert self.stream is not None
        self.stream.write(transforms.to_contiguous(array).reshape(-1).view(np.uint8).data)

    def open_shard(self, file: str) -> None:
        self.close_shard()
        self.current = file
        self.stream = (self.folder / file).open("wb")
        self.stream.write(
            encode_header({n: self.names[n] for n, f in self.files.items() if f == file})
        )

    def close_shard(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def finish(self) -> None:
        """Closes the last file and writes the index if there are several."""
        self.close_shard()
        if len(set(self.files.values())) > 1:
            total = sum(map(tensor_bytes, self.names.values()))
            index = {"metadata": {"total_size": total}, "weight_map": self.files}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def encode_header(names: Names) -> bytes:
    """Header of a file with these tensors, padded so that the numbers begin at multiples of 8."""
    described: dict[str, dict] = {"__metadata__": FORMAT_METADATA}
    begin = 0
    for name, (shape, dtype) in names.items():
        end = begin + tensor_bytes((shape, dtype))
        code = CODES[np.dtype(dtype)]
        described[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
