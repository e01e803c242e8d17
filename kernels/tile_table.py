# SPDX-License-Identifier: Apache-2.0
"""Table of the fastest block sizes of flash attention, as measured by `python -m t5x_lite.tune`."""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import cache_folder, local_path

TABLE_VARIABLE = "T5X_LITE_TILES"


@dataclass(frozen=True)
class AttentionShape:
    """Key of the table: what the best block sizes depend on.

    Attributes:
      chip: jax's device_kind.
      queries: queries in a row.
      keys: keys in a row.
      head_dim: size of a head.
      bytes: bytes of an element.
      biased: True with a relative position bias.
      causal: True with a causal mask.
    """

    chip: str
    queries: int
    keys: int
    head_dim: int
    bytes: int
    biased: bool
    causal: bool


@dataclass(frozen=True)
class MeasuredBlocks:
    """Row of the table: the fastest block sizes for a shape.

    Attributes:
      shape: what was measured.
      query: queries of a block.
      key: keys of a block.
      milliseconds: time of a forward and backward pass.
    """

    shape: AttentionShape
    query: int
    key: int
    milliseconds: float


def table_path() -> Path:
    """Returns T5X_LITE_TILES of the environment, or a file in the user's cache."""
    named = os.environ.get(TABLE_VARIABLE)
    return local_path(named) if named else cache_folder() / "tiles.json"


def fastest_blocks(shape: AttentionShape) -> tuple[int, int] | None:
    """Returns queries and keys of a block for a shape, None where nothing like it was measured.

    They are those measured for the nearest lengths of the same kind on the same chip.
    """
    rows = read_table(table_path())
    same_kind = [row for row in rows if shape_kind(row.shape) == shape_kind(shape)]
    if not same_kind:
        return None
    nearest = min(same_kind, key=lambda row: length_difference(row.shape, shape))
    return nearest.query, nearest.key


def shape_kind(shape: AttentionShape) -> tuple:
    """Returns what must be equal for measured block sizes to apply: all but the lengths."""
    return shape.chip, shape.head_dim, shape.bytes, shape.biased, shape.causal


def length_difference(shape: AttentionShape, other: AttentionShape) -> int:
    """Returns about how many times lengths must be doubled or halved to get from one to another."""
    pairs = ((shape.queries, other.queries), (shape.keys, other.keys))
    return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs)


@functools.cache
def read_table(path: Path) -> tuple[MeasuredBlocks, ...]:
    """Returns the rows of the table at path, none if the file does not exist.

    Raises:
      ValueError: the file is not a table of tiles.
    """
    if not path.exists():
        return ()
    try:
        return tuple(map(parse_row, bounded_files.read_json(path)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error}): delete it, or write it anew with "
            "python -m t5x_lite.tune"
        ) from error


def parse_row(fields: dict[str, Any]) -> MeasuredBlocks:
    """A row of the table; raises another error for each way in which it is none."""
    shape = AttentionShape(**fields.pop("shape"))
    row = MeasuredBlocks(shape, **fields)
    sizes = (shape.queries, shape.keys, shape.head_dim, shape.bytes, row.query, row.key)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes must be positive integers; got {sizes}")
    return row


def write_table(path: Path, measured: list[MeasuredBlocks]) -> None:
    """Writes the table at path with new rows in place of those of the same shapes."""
    shapes = {row.shape for row in measured}
    rows = [row for row in read_table(path) if row.shape not in shapes] + measured
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    read_table.cache_clear()
