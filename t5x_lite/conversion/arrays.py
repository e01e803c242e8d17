# SPDX-License-Identifier: Apache-2.0
"""Arrays in TensorStore's zarr format, as orbax and T5X keep them: read and written in parts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from t5x_lite.conversion import transforms
from t5x_lite.conversion.sources import SourceError

# Of one chunk in one file; small enough that some of them in memory do not matter.
CHUNK = 64 * 2**20
# What no file has to be there for (chunks of zeros), and what a byte of a file unpacks to at most:
# gzip and blosc reach 1000 times.
SPARSE, PACKED = 2**28, 2**11
At = tuple[int, int] | None
Seen = Callable[[int, np.ndarray], None] | None
# Files reach the disk all together, before the folder gets its name: one by one takes much longer.
CONTEXT = tensorstore.Context({"file_io_concurrency": {"limit": 4}, "file_io_sync": False})


def place(at: At) -> tuple:
    """The index of one layer, or of everything."""
    return () if at is None else (slice(None),) * at[0] + (at[1],)


def spec(folder: Path, name: str, ocdbt: bool) -> dict[str, Any]:
    """Where an array lies: in a folder of its own, or among others in one OCDBT database."""
    if ocdbt:
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
        return {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{(folder / name).resolve()}/"},
    }


class Reader:
    """One stored array. Chunks over several layers are decoded once and kept until the next."""

    def __init__(self, folder: Path, name: str, ocdbt: bool):
        self.where = f"{folder / name}"
        try:
            self.store = tensorstore.open(
                spec(folder, name, ocdbt), open=True, read=True, context=CONTEXT
            ).result()
        except ValueError as error:
            raise SourceError(f"{self.where} is no readable array: {first(error)}") from error
        self.shape = tuple(self.store.shape)
        self.check_size(folder if ocdbt else folder / name)
        self.dtype = self.store.dtype.numpy_dtype
        self.kept: tuple[int, np.ndarray] | None = None

    def check_size(self, folder: Path) -> None:
        """SourceError for a shape that its files cannot fill: it would be zeros, or the memory."""
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        whole = math.prod(self.shape) * self.store.dtype.numpy_dtype.itemsize
        if whole > SPARSE + PACKED * there:
            raise SourceError(
                f"{self.where} is broken: {list(self.shape)} would be {whole:,} bytes, its files "
                f"have {there:,}"
            )

    def read(self, at: At = None) -> np.ndarray:
        if at is None:
            return self.stored(())
        axis, layer = at
        many = self.store.chunk_layout.read_chunk.shape[axis]
        if many == 1:
            return self.stored(place(at))
        begin = layer - layer % many
        if self.kept is None or self.kept[0] != begin:
            self.kept = None
            self.kept = begin, self.stored((slice(None),) * axis + (slice(begin, begin + many),))
        return self.kept[1][place((axis, layer - begin))]

    def stored(self, index: tuple) -> np.ndarray:
        try:
            part = self.store[index] if index else self.store
            return part.read().result()
        except (ValueError, IndexError) as error:
            raise SourceError(f"{self.where} cannot be read: {first(error)}") from error


def chunks(shape: tuple[int, ...], dtype: np.dtype, stacked: int | None) -> tuple[int, ...]:
    """One layer to a chunk, or part of one along its first axis, of CHUNK bytes at the most."""
    made = [1 if axis == stacked else size for axis, size in enumerate(shape)]
    free = next((axis for axis in range(len(shape)) if axis != stacked), None)
    if free is not None:
        row = int(np.prod(made)) // max(1, made[free]) * np.dtype(dtype).itemsize
        made[free] = max(1, min(made[free], CHUNK // max(1, row)))
    return tuple(max(1, size) for size in made)


class Writer:
    """One array being written into a folder of its own, chunk by chunk.

    `stacked` is the axis of the layers if they come one by one.
    """

    def __init__(self, folder: Path, name: str, about: tuple, compressor: dict | None):
        self.shape, self.dtype, self.stacked = about
        self.chunks = chunks(self.shape, self.dtype, self.stacked)
        made = spec(folder, name, ocdbt=False) | {
            "dtype": np.dtype(self.dtype).name,
            # A missing file is then always a loss, never a chunk of zeros.
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": list(self.shape),
                "chunks": list(self.chunks),
                "compressor": compressor,
            },
        }
        self.store = tensorstore.open(made, create=True, context=CONTEXT).result()

    def write(self, values: np.ndarray, layer: int | None = None, seen: Seen = None) -> None:
        """Writes one layer, or everything; `seen` gets each block of rows and its first row."""
        target = self.store if layer is None else self.store[place((self.stacked, layer))]
        if not values.ndim:
            target.write(values).result()
            return
        step, begun = self.chunks[1 if self.stacked == 0 else 0], None
        try:
            for first_row in range(0, len(values), step):
                rows = transforms.contiguous(values[first_row : first_row + step])
                if begun is not None:
                    begun.result()
                # While this block is written, the digest of it and the next one are made.
                begun = target[first_row : first_row + len(rows)].write(rows)
                if seen is not None:
                    seen(first_row, rows)
        finally:
            # After an error too: who removes the folder then finds nothing being written into it.
            if begun is not None:
                begun.result()


def first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
