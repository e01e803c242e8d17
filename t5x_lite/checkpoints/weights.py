# SPDX-License-Identifier: Apache-2.0
"""Weights of ours, one layer at a time, from any source: the stream that every writer reads."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import checkpoint_io, matching, transforms
from t5x_lite.checkpoints.digests import row_blocks
from t5x_lite.checkpoints.formats.safetensors_files import TensorSource
from t5x_lite.checkpoints.matching import ConversionPlan, Leaf, WeightMapping
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.tokenizers.errors import SourceError

# Where params have the draft heads of Model.draft_heads, which only our checkpoints can have.
HEADS = "heads"
# Where params have the head of Model.readout.
READOUT = "readout"
# Bit pattern of +inf; larger patterns are NaN.
EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


class Weights(Protocol):
    """Source of weights by path, "decoder/layers/attention/query", layer by layer.

    Attributes:
      leaves: axis names and shape of every weight.
      names: shape and dtype of every weight as `read` returns it.
    """

    leaves: dict[str, Leaf]
    names: dict[str, tuple[tuple[int, ...], np.dtype]]

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A weight, or one layer of a stacked one."""


@dataclasses.dataclass
class SeparateTowers:
    """Weights of towers that share some (Model.shared_weights), as if the decoder had its own.

    Attributes:
      source: the weights, or adapters of them.
      decoder: axis names and shapes of what the decoder has of the encoder.
    """

    source: Weights
    decoder: dict[str, Leaf]

    def __post_init__(self):
        self.leaves = self.source.leaves | self.decoder
        copies = {path: self.source.names[encoder_path(path)] for path in self.decoder}
        self.names = self.source.names | copies

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self.source.read(encoder_path(path) if path in self.decoder else path, layer)


def encoder_path(path: str) -> str:
    """Path of the encoder's weight, or its name, in whose place one of the decoder is read."""
    return "encoder" + path.removeprefix("decoder")


@dataclasses.dataclass
class ConvertedWeights:
    """Tensors of another library as weights of ours, converted when they are read.

    Reading raises SourceError where a weight is not finite (unless its name is allowed), or where
    copies of one weight differ.

    Attributes:
      source: the tensors.
      cfg: config of the model.
      plan: mapping of every weight and layer to a tensor.
      is_allowed: True for names of tensors whose values may be NaN or infinite.
      location: path of the checkpoint, which messages name.
    """

    source: TensorSource
    cfg: config.Model
    plan: ConversionPlan
    is_allowed: Callable[[str], bool]
    location: str = "the checkpoint"

    def __post_init__(self):
        self.leaves = self.plan.leaves
        self.mappings: dict[tuple[str, int | None], list[WeightMapping]] = defaultdict(list)
        for mapping in (*self.plan.mappings, *self.plan.new):
            self.mappings[mapping.entry.ours, mapping.layer].append(mapping)
        self.new = {(mapping.entry.ours, mapping.layer) for mapping in self.plan.new}
        self.names = {path: (leaf.shape, self.dtype(path)) for path, leaf in self.leaves.items()}

    def dtype(self, path: str) -> np.dtype:
        """The dtype that holds all layers of a weight; float64 becomes float32, as jax has it."""
        dtypes = {
            np.dtype(self.source.names[mapping.theirs][1])
            for mapping in self.plan.mappings
            if mapping.entry.ours == path
        }
        widest = np.result_type(*dtypes) if dtypes else np.dtype(np.float32)
        return np.dtype(np.float32) if widest == np.float64 else widest

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        if (path, layer) in self.new:
            return new_weight(self.cfg, path, layer)
        first, *copies = self.mappings[path, layer]
        values = self.read_mapping(first)
        for copy in copies:
            if not equal_bits(values, self.read_mapping(copy)):
                raise SourceError(
                    f"{self.location}: {copy.theirs} and {first.theirs} should both be {path}, but "
                    "they differ: the model of the config has one for all layers, the checkpoint "
                    "one for each"
                )
        return values

    def read_mapping(self, mapping: WeightMapping) -> np.ndarray:
        """One layer of one weight, from its tensor."""
        position = [] if mapping.stack_position is None else [mapping.stack_position]
        values = self.source.read(mapping.theirs, *position)
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        if not self.is_allowed(mapping.theirs) and not is_finite(values):
            raise SourceError(
                f"{self.location}: {mapping.theirs} has values that are NaN or infinite. If that "
                f"is meant, python -m t5x_lite.convert --allow={mapping.theirs} takes them"
            )
        return transforms.read_weight(values, mapping.layer_entry, mapping.axes, mapping.sizes)


def new_weights(cfg: config.Model, seed: int, select: Callable[[dict], Any]) -> Any:
    """Some of the weights that training would begin with; the others are never computed.

    Args:
      cfg: config of the model.
      seed: seed of its weights.
      select: returns a part of the params, or a tree made of parts.

    Returns:
      What `select` returns, float32 on the mesh in force; the same bits on every mesh.
    """
    draw = jax.jit(lambda key: select(model.initialize(cfg, key)))
    return draw(jax.random.key(seed))


def new_weight(cfg: config.Model, path: str, layer: int | None) -> np.ndarray:
    """A new weight by seed 0, for one that the checkpoint lacks and may lack.

    Args:
      cfg: config of the model.
      path: path of the weight.
      layer: the layer of a stacked weight; None for one that is not stacked.
    """
    with sharding.one_device_mesh():
        values = new_weights(cfg, 0, lambda params: flatten_tree(params, "/")[path])
    values = np.asarray(values)
    return values if layer is None else values[layer]


def is_finite(array: np.ndarray) -> bool:
    """False if a value is NaN or infinite: their bits, without the sign, are the greatest."""
    limit, size = EXPONENT[array.dtype.name], array.dtype.itemsize
    sign = 1 << (8 * size - 1)
    for block in row_blocks(array):
        bits = np.ascontiguousarray(block)
        if bits.size and (
            bits.view(f"i{size}").max() >= limit or bits.view(f"u{size}").max() >= limit + sign
        ):
            return False
    return True


def equal_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """True if two arrays are equal in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    unsigned = np.dtype(f"u{one.dtype.itemsize}")
    return all(
        np.array_equal(
            np.ascontiguousarray(here).view(unsigned), np.ascontiguousarray(there).view(unsigned)
        )
        for here, there in zip(row_blocks(one), row_blocks(other), strict=True)
    )


def check_duplicates(
    source: TensorSource,
    plan: ConversionPlan,
    duplicates: Mapping[str, str],
    is_allowed: Callable[[str], bool],
    owner: str,
) -> None:
    """Compares tensors that should repeat others with these.

    Args:
      source: the tensors.
      plan: mapping of weights to tensors; those that it skips are compared.
      duplicates: name of a tensor, and name of the one that it repeats.
      is_allowed: True for names of tensors that may differ.
      owner: path of the checkpoint, for the message.

    Raises:
      SourceError: a tensor differs from the one that it should repeat.
    """
    for name in plan.skipped:
        twin = matching.resolve_duplicate(duplicates.get(name, name), source.names, duplicates)
        if twin == name or twin not in source.names or is_allowed(name):
            continue
        if not equal_bits(source.read(name), source.read(twin)):
            raise SourceError(
                f"{owner}: {name} should be the same as {twin} in this family, but it is not: one "
                "of them would be lost. If that is meant, python -m t5x_lite.convert "
                f"--allow={name} drops {name}"
            )


def cast_weight(values: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    """Casts a weight.

    Args:
      values: the weight.
      dtype: dtype of the result.
      path: its path, for the message.

    Raises:
      SourceError: values are too large for the dtype.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not is_finite(cast) and is_finite(values):
        raise SourceError(f"{path} has values too large for {dtype}: take a wider dtype")
    return cast


def layer_numbers(leaf: Leaf) -> Sequence[int | None]:
    """Layers of a weight to read one by one; None alone for one that is not stacked."""
    return [None] if leaf.layers is None else range(leaf.layers)


# Makes of a weight that was placed, by its dotted name, what is kept of it.
Keep = Callable[[str, jax.Array], Any]


def keep_all(name: str, weight: jax.Array) -> jax.Array:
    """Returns the weight as it is: the `Keep` of most."""
    return weight


def place_weights(
    weights: Weights, cfg: config.Model, dtype: str | None = None, keep: Keep = keep_all
) -> dict[str, Any]:
    """Reads weights one by one and places each on the mesh in force.

    One weight, all its layers, lies in the host's memory at a time.

    Args:
      weights: where they are read from.
      cfg: config of the model.
      dtype: of the params; None for those of `model.shapes`.
      keep: makes of each weight what is kept, before the next one is read.

    Returns:
      params of `cfg`.
    """
    shapes = model.shapes(cfg)
    placed = []
    for path, shape in flatten_tree(shapes, "/").items():
        stacked = np.empty(shape.shape, jax.numpy.dtype(dtype or shape.dtype))
        for layer in layer_numbers(weights.leaves[path]):
            values = cast_weight(weights.read(path, layer), stacked.dtype, path)
            stacked[() if layer is None else layer] = values
        whole = sharding.place_whole(stacked, shape.sharding)
        placed.append(keep(path.replace("/", "."), whole))
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)


def with_heads(shapes: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """Shapes of a model, of its draft heads and its readout only where the checkpoint has stored
    some."""
    return {
        name: part
        for name, part in shapes.items()
        if name not in (HEADS, READOUT) or name in stored
    }


def check_arrays(
    stored: dict[str, tuple[int, ...]], shapes: dict[str, Any], path: str | Path
) -> None:
    """Compares the arrays of a checkpoint with those of a model.

    Args:
      stored: shapes of the arrays by dotted name.
      shapes: a jax.ShapeDtypeStruct for each weight, as `model.shapes` has them.
      path: the checkpoint, for the message.

    Raises:
      CheckpointMismatchError: they are of another model; the arrays that differ are named.
    """
    checkpoint_io.check_shapes(stored, flatten_tree(shapes), f"{path} is of another model")


def place_arrays(
    shapes: dict[str, Any],
    arrays: dict[str, Any],
    path: str | Path,
    cast: bool = False,
    keep: Keep = keep_all,
) -> dict[str, Any]:
    """Places host arrays, which every process has in full, on the mesh.

    Args:
      shapes: a jax.ShapeDtypeStruct with its placement for each weight, as `model.shapes` has them.
      arrays: numpy arrays in the same structure.
      path: the checkpoint that they are from, for the message.
      cast: give each the dtype of its shape; otherwise it keeps its own.
      keep: makes of each weight what is kept, before the next one is placed.

    Returns:
      params.

    Raises:
      CheckpointMismatchError: they are of another model; the arrays that differ are named.
    """
    check_arrays({name: array.shape for name, array in flatten_tree(arrays).items()}, shapes, path)

    def place(name: str, shape: jax.ShapeDtypeStruct, array: np.ndarray) -> Any:
        array = np.asarray(array, shape.dtype) if cast else array
        return keep(name, sharding.place_whole(array, shape.sharding))

    flat = flatten_tree(arrays)
    placed = [place(name, shape, flat[name]) for name, shape in flatten_tree(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)
