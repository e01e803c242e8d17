# SPDX-License-Identifier: Apache-2.0
"""Weights of ours, one layer at a time, wherever they come from: what every writer reads.

`names` maps a path ("decoder/layers/attention/query") to shape and dtype; `read` gives a whole
weight, or one layer of a stacked one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.conversion import matching, transforms
from t5x_lite.conversion.matching import Leaf, Piece, Plan
from t5x_lite.conversion.sources import Source, SourceError

# The bits of infinity: those of greater numbers are no numbers.
EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
BLOCK = 2**24


class Weights(Protocol):
    """What a conversion reads from: ours by path, layer by layer where there are layers."""

    leaves: dict[str, Leaf]
    names: dict[str, tuple[tuple[int, ...], np.dtype]]

    def read(self, path: str, layer: int | None = None) -> np.ndarray: ...


class Converted:
    """Another make's tensors as weights of ours, converted when they are read.

    `where` they lie is what messages name.

    Raises:
      SourceError: on reading, a weight is not finite (unless `allowed` of its name), or copies of
        one weight differ.
    """

    def __init__(
        self,
        source: Source,
        cfg: config.Model,
        plan: Plan,
        allowed: Callable[[str], bool],
        where: str = "the checkpoint",
    ):
        self.where = where
        self.source, self.cfg, self.plan, self.allowed = source, cfg, plan, allowed
        self.leaves = plan.leaves
        self.places: dict[tuple[str, int | None], list[Piece]] = defaultdict(list)
        for piece in (*plan.pieces, *plan.fresh):
            self.places[piece.entry.ours, piece.layer].append(piece)
        self.new = {(piece.entry.ours, piece.layer) for piece in plan.fresh}
        self.names = {path: (leaf.shape, self.dtype(path)) for path, leaf in self.leaves.items()}

    def dtype(self, path: str) -> np.dtype:
        """The dtype that holds all layers of a weight; float64 becomes float32, as jax has it."""
        there = {
            np.dtype(self.source.names[piece.theirs][1])
            for piece in self.plan.pieces
            if piece.entry.ours == path
        }
        widest = np.result_type(*there) if there else np.dtype(np.float32)
        return np.dtype(np.float32) if widest == np.float64 else widest

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        if (path, layer) in self.new:
            return fresh(self.cfg, path, layer)
        first, *copies = self.places[path, layer]
        values = self.piece(first)
        for copy in copies:
            if not same(values, self.piece(copy)):
                raise SourceError(
                    f"{self.where}: {copy.theirs} and {first.theirs} should both be {path}, but "
                    "they differ: the model of the config has one for all layers, the checkpoint "
                    "one for each"
                )
        return values

    def piece(self, piece: Piece) -> np.ndarray:
        there = self.source.read(piece.theirs, *([] if piece.at is None else [piece.at]))
        if there.dtype == np.float64:
            there = there.astype(np.float32)
        if not self.allowed(piece.theirs) and not finite(there):
            raise SourceError(
                f"{self.where}: {piece.theirs} has values that are NaN or infinite. If that is "
                f"meant, pass --allow={piece.theirs}"
            )
        return transforms.read(there, piece.lies, piece.axes, piece.sizes)


def fresh(cfg: config.Model, path: str, layer: int | None) -> np.ndarray:
    """What training would begin with, for a weight that the checkpoint lacks with leave."""
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        # All but the one weight is never computed.
        pick = lambda key: matching.flat(model.initialize(cfg, key))[path]
        values = np.asarray(jax.jit(pick)(jax.random.key(0)))
    return values if layer is None else values[layer]


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """array in parts along its first axis, of at most BLOCK numbers if a row is not more."""
    if array.ndim == 0:
        yield array
        return
    rows = max(1, BLOCK // max(1, array[0].size if len(array) else 1))
    for begin in range(0, len(array), rows):
        yield array[begin : begin + rows]


def finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: their bits, without the sign, are the greatest."""
    limit, size = EXPONENT[array.dtype.name], array.dtype.itemsize
    sign = 1 << (8 * size - 1)
    for block in blocks(array):
        bits = np.ascontiguousarray(block)
        if bits.size and (
            bits.view(f"i{size}").max() >= limit or bits.view(f"u{size}").max() >= limit + sign
        ):
            return False
    return True


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    unsigned = np.dtype(f"u{one.dtype.itemsize}")
    bits = lambda block: np.ascontiguousarray(block).view(unsigned)
    pairs = zip(blocks(one), blocks(other), strict=True)
    return all(np.array_equal(bits(a), bits(b)) for a, b in pairs)


def check_duplicates(
    source: Source, plan: Plan, duplicates: Mapping[str, str], allowed: Callable[[str], bool]
) -> None:
    """SourceError where a tensor that should repeat another one does not, unless it is allowed."""
    for name in plan.skipped:
        twin = matching.present(duplicates.get(name, name), source.names, duplicates)
        if twin == name or twin not in source.names or allowed(name):
            continue
        if not same(source.read(name), source.read(twin)):
            raise SourceError(
                f"{name} should be the same as {twin} in this family, but it is not: one of them "
                f"would be lost. If that is meant, pass --allow={name}"
            )


def cast(values: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    """values in dtype; SourceError where they are too large for it."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        made = values.astype(dtype)
    if not finite(made) and finite(values):
        raise SourceError(f"{path} has values too large for {dtype}: convert without --dtype")
    return made


def layers(leaf: Leaf) -> Sequence[int | None]:
    return [None] if leaf.layers is None else range(leaf.layers)


def load(weights: Weights, cfg: config.Model, dtype: str | None = None) -> Any:
    """params of cfg on the mesh in force, in dtype or those of `model.shapes`, weight by weight."""

    def place(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = weights.leaves[name]
        whole = np.empty(shape.shape, jax.numpy.dtype(dtype or shape.dtype))
        for layer in layers(leaf):
            values = weights.read(name, layer)
            whole[() if layer is None else layer] = cast(values, whole.dtype, name)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda part: whole[part])

    return jax.tree_util.tree_map_with_path(place, model.shapes(cfg))
