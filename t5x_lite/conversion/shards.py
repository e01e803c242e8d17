# SPDX-License-Identifier: Apache-2.0
"""Safetensors files as an output: tensors one after the other, in shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from t5x_lite.conversion import transforms
from t5x_lite.conversion.sources import DTYPES, INDEX, SINGLE

CODES = {dtype: code for code, dtype in DTYPES.items()}
# What transformers looks for before it believes that a file is one of its own.
ABOUT = {"format": "pt"}

Names = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def size(about: tuple[tuple[int, ...], np.dtype]) -> int:
    """Bytes of a tensor."""
    shape, dtype = about
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def divide(names: Names, limit: int) -> list[list[str]]:
    """names in their order, in shards of at most `limit` bytes unless one tensor is larger."""
    shards, filled = [[]], 0
    for name, about in names.items():
        if shards[-1] and filled + size(about) > limit:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size(about)
    return shards


class Shards:
    """Writes tensors in the order of `names`: to model.safetensors, or to shards and an index."""

    def __init__(self, folder: Path, names: Names, limit: int):
        self.folder, self.names = folder, names
        parts = divide(names, limit)
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
            self.begin(self.files[name])
        # As bytes, since bfloat16 is no type of the buffer protocol.
        self.stream.write(transforms.contiguous(array).reshape(-1).view(np.uint8).data)

    def begin(self, file: str) -> None:
        self.end()
        self.current = file
        self.stream = (self.folder / file).open("wb")
        self.stream.write(header({n: self.names[n] for n, f in self.files.items() if f == file}))

    def end(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def finish(self) -> None:
        """Closes the last file and writes the index if there are several."""
        self.end()
        if len(set(self.files.values())) > 1:
            total = sum(map(size, self.names.values()))
            index = {"metadata": {"total_size": total}, "weight_map": self.files}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(names: Names) -> bytes:
    """Length and JSON of a file with these tensors, padded so that the numbers lie at eights."""
    described, begin = {"__metadata__": ABOUT}, 0
    for name, about in names.items():
        end = begin + size(about)
        shape, dtype = about
        code = CODES[np.dtype(dtype)]
        described[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
