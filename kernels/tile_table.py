# SPDX-License-Identifier: Apache-2.0
"""The blocks that were measured to be fastest, per chip and shape; `python -m t5x_lite.tune` writes
them."""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "T5X_LITE_TILES"
DEFAULT = "~/.cache/t5x_lite/tiles.json"


@dataclass(frozen=True)
class Shape:
    """What the best blocks of flash attention depend on. chip is jax's device_kind; queries and
    keys are lengths of a row; bytes is the size of an element."""

    chip: str
    queries: int
    keys: int
    head_dim: int
    bytes: int
    biased: bool
    causal: bool


@dataclass(frozen=True)
class Measured:
    """The fastest blocks for a shape, and the milliseconds of a forward and backward pass."""

    shape: Shape
    query: int
    key: int
    milliseconds: float


def file() -> Path:
    """Where the table is: T5X_LITE_TILES in the environment, or the user's cache."""
    return Path(os.environ.get(VARIABLE) or DEFAULT).expanduser()


def blocks(shape: Shape) -> tuple[int, int] | None:
    """Queries and keys of a block for a shape: those measured for the nearest lengths of the same
    kind on the same chip, or None."""
    alike = [row for row in read(file()) if kind(row.shape) == kind(shape)]
    if not alike:
        return None
    nearest = min(alike, key=lambda row: distance(row.shape, shape))
    return nearest.query, nearest.key


def kind(shape: Shape) -> tuple:
    return shape.chip, shape.head_dim, shape.bytes, shape.biased, shape.causal


def distance(one: Shape, other: Shape) -> int:
    """How many times lengths must be doubled or halved, roughly."""
    pairs = ((one.queries, other.queries), (one.keys, other.keys))
    return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs)


@functools.cache
def read(path: Path) -> tuple[Measured, ...]:
    """The rows of a table; none where there is no file.

    Raises:
      ValueError: the file is no such table.
    """
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text())
        return tuple(Measured(Shape(**row.pop("shape")), **row) for row in rows)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error}): delete it, or write it anew with "
            "python -m t5x_lite.tune"
        ) from error


def write(path: Path, new: list[Measured]) -> None:
    """Writes the table with new rows in place of those of the same shapes, in one move."""
    shapes = {row.shape for row in new}
    rows = [row for row in read(path) if row.shape not in shapes] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    os.replace(partial, path)
    read.cache_clear()
