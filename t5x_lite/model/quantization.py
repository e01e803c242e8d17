# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits for decoding, and products of them, with activations in 8 or 4 bits too.

Symmetric and uniform: a weight w becomes the integer nearest to w / scale, and the largest
magnitude of its channel (or of each `group` of values along the fan-in) becomes 127, or 7 with 4
bits. So |w - q scale| <= scale / 2. Activations are quantized dynamically, with a scale per token.

Only the matrices of layers are quantized, and for computation in int8 the output head; not
embeddings, norms and biases.
Post-training quantization as in LLM.int8 (Dettmers et al., 2022) and ZeroQuant (Yao et al., 2022),
without their outlier columns.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_lite.utils.not_none import not_none

# Levels of the fine half of a 16-bit activation within a level of its coarse half.
FINE_LEVELS = 254
# Number of leading axes of a matrix that are its fan-in; all others are channels.
FAN_IN = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
NAMES = ("int8", "int4", "int8_activations", "int4_activations", "int4_int8_activations")


class QuantizationConfig(NamedTuple):
    """Format of quantized weights and of the activations that they multiply.

    Attributes:
      bits: bits of a weight, 8 or 4.
      activations: bits of an activation, 16, 8 or 4; None for activations that are not quantized.
      group: number of values along the fan-in that share a scale; None for the whole channel.
      channel_axes: number of leading axes of the values that are channels, with the fan-in last;
        None for values whose fan-in is first.
    """

    bits: int
    activations: int | None = None
    group: int | None = None
    channel_axes: int | None = None


def parse_quantization(name: str) -> QuantizationConfig:
    """Parses "int8", "int4_activations", "int4:32" (groups of 32) ...

    Raises:
      ValueError: the name is not one of these.
    """
    match = re.fullmatch(r"int([48])(?:(?:_int([48]))?(_activations))?(?::(\d{1,6}))?", name)
    if match is None or match[4] == "0" or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError(
            f"quantize {name!r} is not one of {', '.join(NAMES)}; with :32 at its end, each 32 "
            "values of a channel have a scale of their own"
        )
    bits = int(match[1])
    activations = int(match[2] or bits) if match[3] else None
    return QuantizationConfig(bits, activations, int(match[4]) if match[4] else None)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized weight: values times scales. Stacked weights have the layer axis first in both.

    Attributes:
      values: int8 or int4 array of the shape of the weight.
      scales: [groups channels] float32.
      kind: format.
    """

    values: Any
    scales: Any
    kind: QuantizationConfig


def max_level(bits: int) -> int:
    """Largest magnitude of a symmetric signed `bits`-bit integer: 2**(bits-1) - 1."""
    return 2 ** (bits - 1) - 1


def round_symmetric(x: Float[Array, "..."], bits: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes x to integers with one scale per slice.

    Args:
      x: values.
      bits: 8 or 4.
      axis: the axis along which values share a scale.

    Returns:
      int8 or int4 values, and float32 scales, in which `axis` has length 1.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / max_level(bits), 1.0)
    integers = jnp.clip(jnp.round(wide / scale), -max_level(bits), max_level(bits))
    return integers.astype(jnp.int8 if bits == 8 else jnp.int4), scale


def quantize(matrix: Float[Array, "..."], fan_in: int, kind: QuantizationConfig) -> Quantized:
    """Quantizes a matrix of one layer.

    Args:
      matrix: weights.
      fan_in: number of leading axes that a product sums over.
      kind: format.

    Raises:
      ValueError: groups do not divide the fan-in.
    """
    inner = math.prod(matrix.shape[:fan_in])
    groups = group_count(inner, kind)
    grouped = matrix.reshape(groups, inner // groups, -1)
    values, scales = round_symmetric(grouped, kind.bits, 1)
    return Quantized(values.reshape(matrix.shape), scales[:, 0], kind)


def group_count(inner: int, kind: QuantizationConfig) -> int:
    """Number of groups in a channel of `inner` values."""
    if kind.group is not None and inner % kind.group:
        smaller = max(size for size in range(1, min(kind.group, inner) + 1) if not inner % size)
        raise ValueError(
            f"quantize: groups of {kind.group} do not divide a fan-in of {inner}; choose a divisor "
            f"such as {smaller}, or no groups"
        )
    return inner // (kind.group or inner)


def dequantize(weight: Quantized) -> Float[Array, "..."]:
    """Returns the float32 values of a quantized weight that is not stacked, its fan-in first."""
    groups, channels = weight.scales.shape
    outward = weight.kind.channel_axes
    if outward is not None:
        rows = weight.values.reshape(channels, -1).astype(jnp.float32) * weight.scales.T
        axes = range(weight.values.ndim)
        order = (*axes[outward:], *axes[:outward])
        return jnp.transpose(rows.reshape(weight.values.shape), order)
    grouped = weight.values.astype(jnp.float32).reshape(groups, -1, weight.scales.shape[1])
    return (grouped * weight.scales[:, None]).reshape(weight.values.shape)


def quantized_matmul(
    x: Float[Array, "b t ..."], weight: Quantized, placed: P
) -> Float[Array, "b t ..."]:
    """Matrix product with a quantized weight; integer products are summed exactly, in int32.

    Args:
      x: [b t ...] activations, the fan-in axes last.
      weight: quantized weight of one layer.
      placed: sharding of the result.

    Returns:
      The product, in the dtype of x.
    """
    matmul = functools.partial(local_matmul, weight.kind)
    return jax.sharding.auto_axes(matmul, out_sharding=placed)(x, weight.values, weight.scales)


def local_matmul(
    kind: QuantizationConfig, x: jax.Array, values: jax.Array, scales: jax.Array
) -> jax.Array:
    """`quantized_matmul` without shardings.

    Args:
      kind: format.
      x: [b t ...] activations.
      values: integers of the weight.
      scales: [groups channels] scales of the weight.
    """
    groups, channels = scales.shape
    size = math.prod(values.shape) // channels
    if kind.channel_axes is not None:
        rows = values.reshape(channels, size)
        y = rowwise_matmul(x.reshape(-1, size), rows, scales[0], not_none(kind.activations))
        return y.astype(x.dtype).reshape(*x.shape[:2], *values.shape[: kind.channel_axes])
    rank = next(n for n in range(values.ndim + 1) if math.prod(values.shape[:n]) == size)
    flat = x.reshape(-1, size)
    # Both operands of an integer product need the same dtype.
    grouped = values.astype(jnp.int8).reshape(groups, size // groups, channels)
    if kind.activations is not None:
        rows = flat.reshape(-1, *grouped.shape[:2])
        y = integer_matmul(rows, grouped, scales, kind.activations)
    elif groups == 1:
        # 8-bit integers are exact in bfloat16; sums and scales are float32.
        integers = grouped[0].astype(x.dtype)
        y = jnp.matmul(flat, integers, preferred_element_type=jnp.float32) * scales
    else:
        y = flat @ (grouped * scales[:, None]).astype(x.dtype).reshape(size, channels)
    return y.astype(x.dtype).reshape(*x.shape[:2], *values.shape[rank:])


def rowwise_matmul(
    x: Float[Array, "r i"], values: Int[Array, "o i"], scales: Float[Array, " o"], bits: int
) -> Float[Array, "r o"]:
    """`integer_matmul` of a weight whose channels are its rows, without groups.

    XLA's CPU multiplies a few rows with it a fifth faster, the weight first (jaxlib 0.12.0.1).

    Args:
      x: [r i] activations.
      values: [o i] int8 values of the weight.
      scales: [o] float32 scales of the weight.
      bits: bits of an activation.
    """
    integers, sizes = round_activations(x, bits)
    sums = jax.lax.dot_general(
        values.astype(jnp.int8),
        integers,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return add_parts(sums.T.astype(jnp.float32) * sizes * scales, bits)


def integer_matmul(
    x: Float[Array, "r g i"], values: Int[Array, "g i o"], scales: Float[Array, "g o"], bits: int
) -> Float[Array, "r o"]:
    """Quantizes activations and multiplies integers; |sum| < 2**31 up to a fan-in of 133,000.

    Args:
      x: [r g i] activations by rows and groups.
      values: [g i o] int8 values of the weight.
      scales: [g o] float32 scales of the weight.
      bits: bits of an activation.
    """
    integers, sizes = round_activations(x, bits)
    if len(scales) == 1:
        sums = jnp.matmul(integers[:, 0], values[0], preferred_element_type=jnp.int32)
        return add_parts(sums.astype(jnp.float32) * sizes[:, 0] * scales, bits)
    sums = jnp.einsum("rgi,gio->rgo", integers, values, preferred_element_type=jnp.int32)
    products = jnp.einsum("rgo,rg,go->ro", sums.astype(jnp.float32), sizes[:, :, 0], scales)
    return add_parts(products, bits)


def round_activations(x: Float[Array, "r ..."], bits: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes activations to int8, with a scale for each slice of the last axis.

    16 bits are two rows of int8 for each row: the nearest levels, and what they leave in levels of
    1 / 254 of theirs. XLA's CPU has no fast product of an int8 matrix and a vector (12 of
    [3072, 768] take 47 ms with one row and 1.3 with two, jaxlib 0.12.0.1), so that a row that is
    decoded alone has the second one for nothing.

    Args:
      x: activations by rows.
      bits: 4, 8 or 16.

    Returns:
      int8 values and float32 scales; with 16 bits all coarse rows first, then all fine ones.
    """
    if bits != 16:
        integers, sizes = round_symmetric(x, bits, x.ndim - 1)
        return integers.astype(jnp.int8), sizes
    coarse, sizes = round_symmetric(x, 8, x.ndim - 1)
    rest = x.astype(jnp.float32) / sizes - coarse.astype(jnp.float32)
    fine = jnp.round(rest * FINE_LEVELS).astype(jnp.int8)
    return jnp.concatenate([coarse, fine]), jnp.concatenate([sizes, sizes / FINE_LEVELS])


def add_parts(products: Float[Array, "r o"], bits: int) -> Float[Array, "r o"]:
    """Adds the products of the coarse and the fine rows of `round_activations`."""
    if bits != 16:
        return products
    coarse, fine = jnp.split(products, 2)
    return coarse + fine


def quantize_params(params: dict, kind: QuantizationConfig) -> dict:
    """Quantizes the matrices of layers in stacked params.

    Raises:
      ValueError: groups do not divide a fan-in.
    """

    def convert(path, weight):
        fan_in = layer_fan_in(path)
        return weight if fan_in is None else quantize_layers(weight, fan_in, kind)

    return jax.tree_util.tree_map_with_path(convert, params)


def layer_fan_in(path: Sequence[Any]) -> int | None:
    """Number of leading axes that are the fan-in of a layer's matrix; None for other weights.

    path is the path of the weight in params, stacked or one tree per layer.
    """
    names = [str(getattr(key, "key", "")) for key in path]
    return FAN_IN.get(names[-1]) if "layers" in names else None


def quantize_layers(weight: jax.Array, fan_in: int, kind: QuantizationConfig) -> Quantized:
    """Applies `quantize` to every layer of a stacked weight.

    The values have the sharding of the weight, the scales that of its layer axis.

    Args:
      weight: [layers ...] weight.
      fan_in: number of axes of a layer that a product sums over.
      kind: format.
    """
    group_count(math.prod(weight.shape[1 : 1 + fan_in]), kind)
    where = jax.typeof(weight).sharding.spec
    each = jax.vmap(lambda matrix: quantize(matrix, fan_in, kind))
    placed = Quantized(P(*where), P(where[0], None, None), kind)
    return jax.jit(jax.sharding.auto_axes(each, out_sharding=placed))(weight)


def quantize_channels(weight: jax.Array, fan_in: int) -> Quantized:
    """Quantizes a weight that is not stacked to int8, channels first, for `rowwise_matmul`.

    Activations have 16 bits.

    Args:
      weight: the weight.
      fan_in: number of leading axes that a product sums over.
    """
    kind = QuantizationConfig(8, 16, channel_axes=weight.ndim - fan_in)
    order = (*range(fan_in, weight.ndim), *range(fan_in))
    where = jax.typeof(weight).sharding.spec.partitions
    placed = Quantized(P(*(where[axis] for axis in order)), P(None, None), kind)

    def convert(weight):
        few = quantize(weight, fan_in, kind)
        return dataclasses.replace(few, values=jnp.transpose(few.values, order))

    return jax.jit(jax.sharding.auto_axes(convert, out_sharding=placed))(weight)


def dequantize_params(params: dict) -> dict:
    """Returns params of `quantize_params` in float32."""

    def convert(weight):
        if not isinstance(weight, Quantized):
            return weight
        where = jax.typeof(weight.values).sharding.spec
        each = jax.vmap(lambda *parts: dequantize(Quantized(*parts, weight.kind)))
        return jax.jit(jax.sharding.auto_axes(each, out_sharding=where))(
            weight.values, weight.scales
        )

    return jax.tree.map(convert, params, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Returns True for a quantized weight."""
    return isinstance(leaf, Quantized)


def has_quantized(params: Any) -> bool:
    """Returns True if params contain a quantized weight."""
    return any(map(is_quantized, weight_leaves(params)))


def weight_leaves(params: Any) -> list:
    """Returns the weights of params; a quantized one is a single leaf."""
    return jax.tree.leaves(params, is_leaf=is_quantized)


def array_bytes(size: int, dtype: Any) -> int:
    """Bytes of an array of `size` numbers; XLA packs two 4-bit values into one byte."""
    return size // 2 if dtype == jnp.int4 else size * jnp.dtype(dtype).itemsize


def weight_bytes(params: Any) -> int:
    """Bytes of all weights."""
    return sum(array_bytes(array.size, array.dtype) for array in jax.tree.leaves(params))
