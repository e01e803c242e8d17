# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of frozen weights: LoRA, DoRA, and both over quantized weights (QLoRA).

A transformation of the tree of weights: `attach_adapters` puts an `AdaptedWeight` in the place of
every matrix that has an adapter, and `layers.project` multiplies with it. No other part of the
model knows of adapters. W + scale A B is never computed for a product: x W + scale (x A) B has the
same value, for rank / inputs of the work.
"""

import dataclasses
import fnmatch
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_lite import config
from t5x_lite.model import quantization
from t5x_lite.model.mixed_precision import GradientSlot
from t5x_lite.model.quantization import FAN_IN, Quantized
from t5x_lite.sharding import named_sharding, spec
from t5x_lite.utils.nearest import near_names

# Folded into a step's key for the masks of adapters; the model's own dropout splits that key.
ADAPTER_KEY = 1 << 30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "a", "b", "magnitude", "key"],
    meta_fields=["scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A frozen matrix and its adapter; stacked ones have the layer axis first in every array.

    Attributes:
      weight: the matrix [inputs ... outputs ...], an array or Quantized.
      a: [inputs ... rank].
      b: [rank outputs ...].
      magnitude: [outputs ...] norm of each column (DoRA); None for LoRA.
      key: random key of the adapter's dropout; None for no dropout.
      scale: factor on a b.
      dropout: probability of zeroing a feature of the adapter's input.
    """

    weight: Any
    a: Any
    b: Any
    magnitude: Any
    key: Any
    scale: float
    dropout: float

    def read(self, dtype: str) -> "AdaptedWeight":
        """Returns all arrays of one layer in the dtype of activations."""

        def cast(leaf):
            if leaf is None or isinstance(leaf, Quantized):
                return leaf
            return leaf.read() if isinstance(leaf, GradientSlot) else leaf.astype(dtype)

        arrays = {name: cast(getattr(self, name)) for name in ("weight", "a", "b", "magnitude")}
        return dataclasses.replace(self, **arrays)


def is_adapted(leaf: Any) -> bool:
    """Returns True for a weight with an adapter."""
    return isinstance(leaf, AdaptedWeight)


def has_adapted(params: Any) -> bool:
    """Returns True if params contain a weight with an adapter."""
    return any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted)))


def find_adapted(lora: config.Lora, names: Mapping[str, Any]) -> list[str]:
    """Names of the matrices that have adapters, in order.

    Args:
      lora: config of the adapters.
      names: dotted names of all weights of the model.

    Raises:
      ValueError: a pattern matches none of the matrices of layers; near names are listed.
    """
    known = [name for name in names if ".layers." in name and name.split(".")[-1] in FAN_IN]
    for pattern in lora.weights:
        if fnmatch.filter(known, pattern):
            continue
        near = near_names(pattern.replace("*", ""), known, similar=0.3) or known[:3]
        raise ValueError(
            f"Lora.weights has {pattern!r}, which names no matrix of a layer. Near: "
            f"{', '.join(near)} (--dry_run lists every weight; * stands for anything)"
        )
    return [name for name in known if any(fnmatch.fnmatchcase(name, p) for p in lora.weights)]


def adapter_axes(lora: config.Lora, axes: Mapping[str, str]) -> dict[str, str]:
    """Axis names of every array of the adapters, by name: "decoder.layers.mlp.gate.a".

    Args:
      lora: config of the adapters.
      axes: axis names of every weight of the model by dotted name.
    """
    named = {}
    for name in find_adapted(lora, axes):
        layers, inward, outward = split_axes(name, axes[name])
        named[f"{name}.a"] = f"{layers} {inward} rank"
        named[f"{name}.b"] = f"{layers} rank {outward}"
        if lora.dora:
            # A vector of the model's width is placed and decayed as the scale of a norm is.
            named[f"{name}.magnitude"] = f"{layers} {outward.replace('embed', 'norm')}"
    return named


def split_axes(name: str, axes: str) -> tuple[str, str, str]:
    """Splits axis names of a stacked matrix into the layers, its inputs and its outputs."""
    layers, *rest = axes.split()
    count = FAN_IN[name.split(".")[-1]]
    return layers, " ".join(rest[:count]), " ".join(rest[count:])


def adapter_shapes(
    lora: config.Lora, axes: Mapping[str, str], shapes: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and placement of every array of the adapters by name, float32.

    Args:
      lora: config of the adapters.
      axes: axis names of every weight of the model by dotted name.
      shapes: shapes of the weights by the same names.
    """
    described = {}
    for name, names in adapter_axes(lora, axes).items():
        owner = name.rpartition(".")[0]
        sizes = dict(zip(axes[owner].split(), shapes[owner].shape, strict=True))
        sizes |= {"rank": lora.rank, "norm": sizes.get("embed")}
        shape = tuple(sizes[axis] for axis in names.split())
        placed = named_sharding(names)
        described[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
    return described


def new_adapters(
    lora: config.Lora, axes: Mapping[str, str], base: Mapping[str, Any], key: jax.Array
) -> dict[str, jax.Array]:
    """Draws new adapters, with which the model computes what it computes without them.

    A is uniform within inputs ** -0.5 as in peft, B is 0, and magnitudes are the columns' norms.

    Args:
      lora: config of the adapters.
      axes: axis names of every weight of the model by dotted name.
      base: the frozen weights by the same names, as they are kept.
      key: random key.
    """
    shapes = {name: getattr(leaf, "values", leaf) for name, leaf in base.items()}
    described = adapter_shapes(lora, axes, shapes)

    def draw(key: jax.Array, base: Mapping[str, Any]) -> dict[str, jax.Array]:
        arrays = {}
        for number, (name, shape) in enumerate(described.items()):
            owner, _, part = name.rpartition(".")
            if part == "a":
                limit = math.prod(shape.shape[1:-1]) ** -0.5
                values = jax.random.uniform(
                    jax.random.fold_in(key, number), shape.shape, minval=-limit, maxval=limit
                )
            elif part == "b":
                values = jnp.zeros(shape.shape)
            else:
                inputs = FAN_IN[owner.split(".")[-1]]
                place = P(*shape.sharding.spec)
                # Layer by layer: the dense form of all layers may be as large as the base.
                norms = functools.partial(column_norms, inputs=inputs)
                values = jax.sharding.auto_axes(
                    functools.partial(jax.lax.map, norms), out_sharding=place
                )(base[owner])
            arrays[name] = jax.reshard(values, shape.sharding.spec)
        return arrays

    return jax.jit(draw)(key, base)


def column_norms(weight: Any, delta: jax.Array | None = None, *, inputs: int) -> jax.Array:
    """Float32 norm over the inputs of each output of a matrix of one layer.

    Args:
      weight: the matrix, an array or Quantized.
      delta: added to it; None adds nothing.
      inputs: number of axes of the matrix that are inputs.
    """
    dense = quantization.dequantize(weight) if isinstance(weight, Quantized) else weight
    dense = dense.astype(jnp.float32)
    dense = dense if delta is None else dense + delta
    return jnp.sqrt(jnp.sum(jnp.square(dense), axis=tuple(range(inputs))))


def column_scales(adapted: AdaptedWeight, outward: str, inputs: int) -> jax.Array:
    """Magnitude over the norm of each column of W + scale A B (DoRA, equation 5).

    The norm counts as a constant for the gradient (section 4.3 there), as in peft.

    Args:
      adapted: matrix and adapter of one layer, A and B gathered.
      outward: axis names of the outputs.
      inputs: number of axes of the matrix that are inputs.
    """

    def norms(weight, a, b):
        delta = adapted.scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
        return column_norms(weight, delta, inputs=inputs)

    placed = spec(outward.replace("embed", "norm"))
    arrays = jax.lax.stop_gradient((adapted.weight, adapted.a, adapted.b))
    norm = jax.sharding.auto_axes(norms, out_sharding=placed)(*arrays)
    return adapted.magnitude.astype(jnp.float32) / norm


def attach_adapters(
    base: Any, adapters: dict, lora: config.Lora, key: jax.Array | None = None
) -> Any:
    """Returns the weights of the model with each adapter beside its matrix.

    Args:
      base: tree of the frozen weights.
      adapters: tree of the adapters, with {"a", "b"} and for DoRA "magnitude" in the place of a
        matrix.
      lora: config of the adapters.
      key: random key of dropout; None for no dropout.
    """
    if "a" in adapters:
        # Each is in a GradientSlot while the model computes in another dtype.
        weight, layers = base, jax.tree.leaves(adapters["a"])[0].shape[0]
        keys = None if key is None or lora.dropout == 0 else jax.random.split(key, layers)
        return AdaptedWeight(
            weight,
            **{part: adapters.get(part) for part in ("a", "b", "magnitude")},
            key=keys,
            scale=lora.scale,
            dropout=lora.dropout,
        )
    attached = {}
    for number, (name, part) in enumerate(base.items()):
        below = None if key is None else jax.random.fold_in(key, number)
        adapter = adapters.get(name)
        attached[name] = part if adapter is None else attach_adapters(part, adapter, lora, below)
    return attached


def attach_to_layers(params: dict, adapters: dict, lora: config.Lora) -> dict:
    """`attach_adapters` for weights of `model.unstack`, which are shared and not copied.

    Args:
      params: tree of the weights, with a tuple of trees in the place of stacked layers.
      adapters: tree of the adapters, stacked.
      lora: config of the adapters.
    """
    attached = dict(params)
    for name, stack in adapters.items():
        layers = []
        for number, layer in enumerate(params[name]["layers"]):
            adapter = jax.tree.map(operator.itemgetter(number), stack["layers"])
            layers.append(attach_adapters(layer, adapter, lora))
        attached[name] = params[name] | {"layers": tuple(layers)}
    return attached


def freezer(lora: config.Lora, dtype: str) -> Callable[[str, Any], Any]:
    """Returns the function (dotted name, float32 weight) that makes a weight as it is kept.

    Args:
      lora: config of the adapters.
      dtype: dtype of activations, of what is not quantized.

    Its result raises ValueError where Lora.quantize is not a format, or its groups do not fit.
    """

    def freeze(name: str, weight: Any) -> Any:
        last = name.split(".")[-1]
        if lora.quantize is None or ".layers." not in name or last not in FAN_IN:
            return weight.astype(dtype)
        try:
            kind = quantization.parse_quantization(lora.quantize)
            return quantization.quantize_layers(weight, FAN_IN[last], kind)
        except ValueError as error:
            raise ValueError(f"Lora.quantize: {error}") from error

    return freeze
