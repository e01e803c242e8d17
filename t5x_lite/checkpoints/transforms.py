# SPDX-License-Identifier: Apache-2.0
"""The one way in which the weights of two libraries differ: order and grouping of the same numbers.

Both directions come from the axes of an `Entry`. A view of an array as theirs is stored is the same
memory in the order of ours, so reading copies out of it and writing copies into it, bit by bit.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

STACKED = "layers"
PARTS = "parts"
TILE = 128
# Our axes along which rotary positions have halves.
ROTATED = ("head_dim", "head_norm")


class Entry(NamedTuple):
    """One weight of ours, and how it is stored in a checkpoint of another library.

    Attributes:
      ours: path as in `model.axes`, "decoder/layers/attention/query".
      theirs: name of a tensor, "model.layers.{layer}.self_attn.q_proj.weight"; {layer} where each
        layer has its own.
      axes: axes of theirs, in our axis names: "(heads head_dim) embed" are two axes, the first of
        them heads by head_dim. "layers" is among them where theirs is stacked. A "parts" axis means
        that several of ours lie side by side in one of theirs ("embed (parts heads head_dim)").
      part: place of this weight along the "parts" axis; None without one.
      paired: the two halves that rotary positions turn together lie interleaved along head_dim in
        theirs.
      change: change of the values that the reader of theirs has made already, in words.
    """

    ours: str
    theirs: str
    axes: str
    part: int | None = None
    paired: bool = False
    change: str = ""


def axis_groups(axes: str) -> list[list[str]]:
    """The names on each axis of theirs: "(heads head_dim) embed" is [[heads, head_dim], [embed]].

    Raises:
      ValueError: the brackets do not close, or a name stands twice.
    """
    matches = re.findall(r"\(([^()]*)\)|([^\s()]+)", axes)
    if re.sub(r"\(([^()]*)\)|([^\s()]+)", "", axes).strip():
        raise ValueError(f"The axes {axes!r} have a bracket without its other half")
    groups = [(inside or alone).split() for inside, alone in matches]
    names = [name for group in groups for name in group]
    if len(set(names)) != len(names):
        raise ValueError(f"The axes {axes!r} name one axis twice")
    return groups


def grouped_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of theirs, from the size of each named axis."""
    return tuple(math.prod(sizes[name] for name in group) for group in axis_groups(axes))


def view_as_ours(
    array: np.ndarray, entry: Entry, axes: str, sizes: Mapping[str, int]
) -> np.ndarray:
    """A view of a tensor of theirs with the axes of ours, in their order.

    No copy: what is written into the view is written into the array, if that is contiguous. Rotary
    halves that lie interleaved make head_dim two axes, (2, half).

    Args:
      array: a tensor of theirs, or one layer of a stack.
      entry: how it is stored; without "layers" among its axes.
      axes: axis names of ours, without layers.
      sizes: size of every named axis, "parts" included.
    """
    names = [name for group in axis_groups(entry.axes) for name in group]
    expanded = array.reshape([sizes[name] for name in names])
    if entry.part is not None:
        expanded = expanded[(slice(None),) * names.index(PARTS) + (entry.part,)]
        names.remove(PARTS)
    expanded = expanded.transpose([names.index(name) for name in axes.split()])
    return split_rotary_halves(expanded, axes.split()) if entry.paired else expanded


def split_rotary_halves(array: np.ndarray, names: list[str]) -> np.ndarray:
    """A view in which head_dim, interleaved (half 2), is two axes (2, half)."""
    place = next(i for i, name in enumerate(names) if name in ROTATED)
    before, size, after = array.shape[:place], array.shape[place], array.shape[place + 1 :]
    return array.reshape(*before, size // 2, 2, *after).swapaxes(place, place + 1)


def read_weight(array: np.ndarray, entry: Entry, axes: str, sizes: Mapping[str, int]) -> np.ndarray:
    """The weight of ours in a tensor of theirs; a view of it unless rotary halves are interleaved.

    Args:
      array: a tensor of theirs, or one layer of a stack.
      entry: how it is stored; without "layers" among its axes.
      axes: axis names of ours, without layers.
      sizes: size of every named axis.
    """
    shape = [sizes[name] for name in axes.split()]
    return view_as_ours(array, entry, axes, sizes).reshape(shape)


def write_weight(
    array: np.ndarray, entry: Entry, axes: str, sizes: Mapping[str, int], values: np.ndarray
) -> None:
    """Writes a weight of ours into a tensor of theirs.

    Args:
      array: a contiguous tensor of theirs, or one layer of a stack.
      entry: how it is stored; without "layers" among its axes.
      axes: axis names of ours, without layers.
      sizes: size of every named axis.
      values: the weight, with the axes `axes`.
    """
    view = view_as_ours(array, entry, axes, sizes)
    copy_array(view, values.reshape(view.shape))


def to_contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself if it is."""
    if array.flags.c_contiguous:
        return array
    contiguous = np.empty(array.shape, array.dtype)
    copy_array(contiguous, array)
    return contiguous


def copy_array(target: np.ndarray, source: np.ndarray) -> None:
    """Copies source into target of the same shape and dtype; a transposed matrix in tiles.

    With tiles that fit the cache, three to five times faster than numpy's own order.
    """
    bits = np.dtype(f"u{source.dtype.itemsize}")
    target, source = target.view(bits), source.view(bits)
    for rows in ((source.shape[:1], (-1,)), ((-1,), source.shape[-1:])):
        try:
            pair = [array.reshape(rows[0] + rows[1], copy=False) for array in (target, source)]
        except ValueError:  # these axes cannot be taken together without a copy
            continue
        if len({array.strides[0] > array.strides[1] for array in pair}) == 2:
            return copy_tiles(*pair)
    target[...] = source


def copy_tiles(target: np.ndarray, source: np.ndarray) -> None:
    """Copies a matrix [rows columns] in tiles of TILE by TILE."""
    for row in range(0, source.shape[0], TILE):
        for column in range(0, source.shape[1], TILE):
            tile = source[row : row + TILE, column : column + TILE]
            # First as it is stored, then transposed, each time along whole cache lines.
            transposed = np.ascontiguousarray(np.ascontiguousarray(tile.T).T)
            target[row : row + TILE, column : column + TILE] = transposed


def describe_transform(entry: Entry, axes: str) -> str:
    """The steps from theirs to ours in words: "transposed, heads head_dim joined"."""
    stored = axis_groups(entry.axes)
    order = [name for group in stored for name in group if name not in (PARTS, STACKED)]
    words = [entry.change] if entry.change else []
    words += [f"part {entry.part}"] if entry.part is not None else []
    words += ["stacked"] if any(STACKED in group for group in stored) else []
    words += ["transposed"] if order != [name for name in axes.split() if name != STACKED] else []
    joined = [" ".join(name for name in group if name != PARTS) for group in stored]
    words += [f"{names} joined" for names in joined if " " in names]
    words += ["rotary halves paired"] if entry.paired else []
    return ", ".join(words) or "as it is"
