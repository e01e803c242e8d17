# SPDX-License-Identifier: Apache-2.0
"""Arrays in TensorStore's zarr format, as orbax and T5X keep them: read and written in parts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from t5x_lite import processes
from t5x_lite.checkpoints import transforms
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.remote_paths import key_value_store, stored_bytes

# Bytes of one chunk in one file; small enough that some of them in memory do not matter.
CHUNK = 64 * 2**20
# Bytes that may have no file (chunks of zeros), and bytes that a byte of a file unpacks to at most:
# gzip and blosc reach 1000 times.
SPARSE, PACKED = 2**28, 2**11
# Numbers that a chunk may have though the array has fewer.
SMALL_CHUNK = 2**20
# Axis of the layers in a stack, and a layer; None for all of an array.
LayerPosition = tuple[int, int] | None
# Gets the first row and the values of each block that is written.
BlockCallback = Callable[[int, np.ndarray], None] | None
# Files reach the disk all together, before the folder gets its name: one by one takes much longer.
CONTEXT = tensorstore.Context({"file_io_concurrency": {"limit": 4}, "file_io_sync": False})


def layer_index(position: LayerPosition) -> tuple:
    """The numpy index of one layer, or of everything."""
    return () if position is None else (slice(None),) * position[0] + (position[1],)


def zarr_spec(folder: Path, name: str, ocdbt: bool) -> dict[str, Any]:
    """TensorStore's spec of an array.

    Args:
      folder: folder of the arrays.
      name: name of the array.
      ocdbt: the arrays share one OCDBT database; otherwise each has a folder of its own.
    """
    if ocdbt:
        base = key_value_store(folder)
        store = {"driver": "ocdbt", "base": base | {"path": f"{base['path']}/"}}
        return {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
    store = key_value_store(folder / name)
    return {"driver": "zarr", "kvstore": store | {"path": f"{store['path']}/"}}


def open_array(folder: Path, name: str, ocdbt: bool) -> tensorstore.TensorStore:
    """Opens an array; nothing of it is decoded.

    Args:
      folder: folder of the arrays.
      name: name of the array.
      ocdbt: the arrays share one OCDBT database.

    Raises:
      SourceError: it cannot be opened, or has chunks larger than itself, which would be decoded
        whole.
    """
    location = folder / name
    try:
        store = tensorstore.open(
            zarr_spec(folder, name, ocdbt), open=True, read=True, context=CONTEXT
        ).result()
    except ValueError as error:
        raise SourceError(
            f"{location} is not a readable array: {processes.first_line(error)[:300]}"
        ) from error
    chunk = [int(size or 1) for size in store.chunk_layout.read_chunk.shape or ()]
    if math.prod(chunk) > max(SMALL_CHUNK, math.prod(store.shape)):
        raise SourceError(
            f"{location} is broken: its chunks, {chunk}, are larger than the array, "
            f"{list(store.shape)}"
        )
    return store


class ArrayReader:
    """One stored array. Chunks over several layers are decoded once and kept until the next."""

    def __init__(self, folder: Path, name: str, ocdbt: bool):
        self.location = f"{folder / name}"
        self.store = open_array(folder, name, ocdbt)
        self.shape = tuple(self.store.shape)
        self.check_size(folder if ocdbt else folder / name)
        self.dtype = self.store.dtype.numpy_dtype
        self.decoded: tuple[int, np.ndarray] | None = None

    def check_size(self, folder: Path) -> None:
        """SourceError for a shape that its files cannot fill: it would be zeros, or the memory."""
        stored = stored_bytes(folder)
        needed = math.prod(self.shape) * self.store.dtype.numpy_dtype.itemsize
        if needed > SPARSE + PACKED * stored:
            raise SourceError(
                f"{self.location} is broken: {list(self.shape)} would be {needed:,} bytes, its "
                f"files have {stored:,}"
            )

    def is_complete(self) -> bool:
        """False if a chunk has no file, or cannot be looked for: it would be read as zeros."""
        statistics = self.store.storage_statistics(query_fully_stored=True)
        try:
            return bool(statistics.result().fully_stored)
        except ValueError:
            return False

    def read(self, position: LayerPosition = None) -> np.ndarray:
        """The array, or one layer of it."""
        if position is None:
            return self.read_index(())
        axis, layer = position
        layers = not_none(not_none(self.store.chunk_layout.read_chunk.shape)[axis])
        if layers == 1:
            return self.read_index(layer_index(position))
        begin = layer - layer % layers
        if self.decoded is None or self.decoded[0] != begin:
            self.decoded = None
            chunk = (slice(None),) * axis + (slice(begin, begin + layers),)
            self.decoded = begin, self.read_index(chunk)
        return self.decoded[1][layer_index((axis, layer - begin))]

    def read_index(self, index: tuple) -> np.ndarray:
        try:
            part = self.store[index] if index else self.store
            return part.read().result()
        except (ValueError, IndexError) as error:
            raise SourceError(
                f"{self.location} cannot be read: {processes.first_line(error)[:300]}"
            ) from error


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype, stacked: int | None) -> tuple[int, ...]:
    """Shape of the chunks of an array: one layer each, or part of one along its first axis.

    Args:
      shape: shape of the array.
      dtype: its dtype; a chunk has CHUNK bytes at most.
      stacked: axis of the layers; None without one.
    """
    sizes = [1 if axis == stacked else size for axis, size in enumerate(shape)]
    free = next((axis for axis in range(len(shape)) if axis != stacked), None)
    if free is not None:
        row = int(np.prod(sizes)) // max(1, sizes[free]) * np.dtype(dtype).itemsize
        sizes[free] = max(1, min(sizes[free], CHUNK // max(1, row)))
    return tuple(max(1, size) for size in sizes)


class ArrayWriter:
    """One array that is written into a folder of its own, chunk by chunk."""

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        stacked: int | None = None,
        compressor: dict | None = None,
    ):
        """Creates the array.

        Args:
          folder: folder of the arrays.
          name: name of the array.
          shape: its shape.
          dtype: its dtype.
          stacked: axis of the layers, if they are written one by one.
          compressor: zarr's description of one; None for plain bytes.
        """
        self.shape, self.dtype, self.stacked = shape, dtype, stacked
        self.chunks = chunk_shape(shape, dtype, stacked)
        spec = zarr_spec(folder, name, ocdbt=False) | {
            "dtype": np.dtype(dtype).name,
            # A missing file is then always a loss, never a chunk of zeros.
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": list(shape),
                "chunks": list(self.chunks),
                "compressor": compressor,
            },
        }
        self.store = tensorstore.open(spec, create=True, context=CONTEXT).result()

    def write(
        self,
        values: np.ndarray,
        layer: int | None = None,
        on_block: BlockCallback = None,
    ) -> None:
        """Writes one layer, or everything.

        Args:
          values: the array, or one layer of it.
          layer: the layer; None for everything.
          on_block: called with the first row and the values of each block of rows.
        """
        target = (
            self.store
            if layer is None
            else self.store[layer_index((not_none(self.stacked), layer))]
        )
        if not values.ndim:
            target.write(values).result()
            return
        step, pending = self.chunks[1 if self.stacked == 0 else 0], None
        try:
            for first_row in range(0, len(values), step):
                rows = transforms.to_contiguous(values[first_row : first_row + step])
                if pending is not None:
                    pending.result()
                # While this block is written, its digest and the next block are computed.
                pending = target[first_row : first_row + len(rows)].write(rows)
                if on_block is not None:
                    on_block(first_row, rows)
        finally:
            # After an error too, so that nothing is being written when the folder is removed.
            if pending is not None:
                pending.result()
