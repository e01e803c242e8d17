# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits for decoding, and products of them, with activations in 8 or 4 bits too.

Symmetric and uniform: a weight w becomes the whole number nearest to w / scale, where the largest
of its channel (or of each `group` of numbers along the fan-in) becomes 127, or 7 of 4 bits. So
|w - q scale| <= scale / 2. Activations are rounded as they come, each token by its own largest.

Only the matrices of layers are rounded: embeddings, logits, norms and biases stay as they are.
Rounding after training as in LLM.int8 (Dettmers et al., 2022) and ZeroQuant (Yao et al., 2022),
without their outlier columns.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# Of the axes of a matrix, how many are the fan-in; all others are channels.
FAN_IN = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
NAMES = ("int8", "int4", "int8_activations", "int4_activations", "int4_int8_activations")


class Kind(NamedTuple):
    """How weights are rounded: to `bits`, with one scale for each channel or for each `group` of
    its numbers; activations to as many bits as it says, or not at all."""

    bits: int
    activations: int | None = None
    group: int | None = None


def kind(name: str) -> Kind:
    """The Kind of "int8", "int4_activations", "int4:32" (groups of 32) ...

    Raises ValueError for a name that is none.
    """
    found = re.fullmatch(r"int([48])(?:(?:_int([48]))?(_activations))?(?::(\d{1,6}))?", name)
    if found is None or found[4] == "0" or (found[2] and int(found[2]) < int(found[1])):
        raise ValueError(
            f"--quantize={name} is none of {', '.join(NAMES)}; with :32 at its end, each 32 "
            "numbers of a channel have a scale of their own"
        )
    bits = int(found[1])
    activations = int(found[2] or bits) if found[3] else None
    return Kind(bits, activations, int(found[4]) if found[4] else None)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight as `values`, int8 or int4 in its shape, times float32 `scales` [groups channels].

    Stacked weights have the axis of the layers first in both.
    """

    values: Any
    scales: Any
    kind: Kind


def levels(bits: int) -> int:
    """The largest whole number of so many bits whose negative has as many."""
    return 2 ** (bits - 1) - 1


def rounded(x: Float[Array, "..."], bits: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """x as whole numbers of `bits`, and the float32 scale of what lies along axis, which stays."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / levels(bits), 1.0)
    whole = jnp.clip(jnp.round(wide / scale), -levels(bits), levels(bits))
    return whole.astype(jnp.int8 if bits == 8 else jnp.int4), scale


def quantise(matrix: Float[Array, "..."], fan_in: int, kind: Kind) -> Quantised:
    """matrix, of which the first `fan_in` axes are summed over, in few bits.

    Raises ValueError where groups do not divide the fan-in.
    """
    inner = math.prod(matrix.shape[:fan_in])
    groups = count(inner, kind)
    grouped = matrix.reshape(groups, inner // groups, -1)
    values, scales = rounded(grouped, kind.bits, 1)
    return Quantised(values.reshape(matrix.shape), scales[:, 0], kind)


def count(inner: int, kind: Kind) -> int:
    """How many groups a channel has."""
    if kind.group is not None and inner % kind.group:
        smaller = max(size for size in range(1, min(kind.group, inner) + 1) if not inner % size)
        raise ValueError(
            f"--quantize: groups of {kind.group} do not divide a fan-in of {inner}; choose a "
            f"divisor such as {smaller}, or no groups"
        )
    return inner // (kind.group or inner)


def dequantise(weight: Quantised) -> Float[Array, "..."]:
    """The float32 numbers that a weight (not stacked) stands for."""
    groups = weight.scales.shape[0]
    grouped = weight.values.astype(jnp.float32).reshape(groups, -1, weight.scales.shape[1])
    return (grouped * weight.scales[:, None]).reshape(weight.values.shape)


def product(x: Float[Array, "b t ..."], weight: Quantised, placed: P) -> Float[Array, "b t ..."]:
    """The last axes of x through weight, laid out as `placed` says; in x's dtype.

    Whole numbers times whole numbers are summed exactly, in int32.
    """
    return jax.sharding.auto_axes(
        functools.partial(plain_product, weight.kind), out_sharding=placed
    )(x, weight.values, weight.scales)


def plain_product(kind: Kind, x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """`product` without a word on where things lie."""
    rank, size = 0, 1
    while size < math.prod(values.shape) // scales.shape[1]:
        size, rank = size * values.shape[rank], rank + 1
    flat = x.reshape(-1, size)
    groups, channels = scales.shape
    # Both sides of a product of whole numbers have to be of one type.
    grouped = values.astype(jnp.int8).reshape(groups, size // groups, channels)
    if kind.activations is not None:
        y = whole_product(flat.reshape(-1, *grouped.shape[:2]), grouped, scales, kind.activations)
    elif groups == 1:
        # A number of 8 bits is exact in bfloat16; sums and their scales are float32.
        whole = grouped[0].astype(x.dtype)
        y = jnp.matmul(flat, whole, preferred_element_type=jnp.float32) * scales
    else:
        y = flat @ (grouped * scales[:, None]).astype(x.dtype).reshape(size, channels)
    return y.astype(x.dtype).reshape(*x.shape[:2], *values.shape[rank:])


def whole_product(
    x: Float[Array, "r g i"], values: Int[Array, "g i o"], scales: Float[Array, "g o"], bits: int
) -> Float[Array, "r o"]:
    """x rounded to bits, times values; |sum| < 2 ** 31 up to a fan-in of 133,000."""
    whole, sizes = rounded(x, bits, 2)
    whole = whole.astype(jnp.int8)
    if len(scales) == 1:
        sums = jnp.matmul(whole[:, 0], values[0], preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * sizes[:, 0] * scales
    sums = jnp.einsum("rgi,gio->rgo", whole, values, preferred_element_type=jnp.int32)
    return jnp.einsum("rgo,rg,go->ro", sums.astype(jnp.float32), sizes[:, :, 0], scales)


def quantised(params: dict, kind: Kind) -> dict:
    """params, stacked as training has them, with the matrices of their layers in few bits.

    Raises ValueError where groups do not divide a fan-in.
    """

    def changed(path, weight):
        names = [str(getattr(key, "key", "")) for key in path]
        if "layers" not in names or names[-1] not in FAN_IN:
            return weight
        return stacked(weight, FAN_IN[names[-1]], kind)

    return jax.tree_util.tree_map_with_path(changed, params)


def stacked(weight: jax.Array, fan_in: int, kind: Kind) -> Quantised:
    """`quantise` of every layer; values lie where the weight did, scales as their channels."""
    count(math.prod(weight.shape[1 : 1 + fan_in]), kind)
    where = jax.typeof(weight).sharding.spec
    each = jax.vmap(lambda matrix: quantise(matrix, fan_in, kind))
    made = Quantised(P(*where), P(where[0], None, None), kind)
    return jax.jit(jax.sharding.auto_axes(each, out_sharding=made))(weight)


def dequantised(params: dict) -> dict:
    """params of `quantised` in float32 again: what the rounded numbers stand for."""

    def changed(weight):
        if not isinstance(weight, Quantised):
            return weight
        where = jax.typeof(weight.values).sharding.spec
        spread = jax.vmap(lambda *parts: dequantise(Quantised(*parts, weight.kind)))
        return jax.jit(jax.sharding.auto_axes(spread, out_sharding=where))(
            weight.values, weight.scales
        )

    return jax.tree.map(changed, params, is_leaf=few)


def few(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


def holds(params: Any) -> bool:
    """Whether there is a quantised weight in params."""
    return any(map(few, leaves(params)))


def leaves(params: Any) -> list:
    """The weights of params, a quantised one as one."""
    return jax.tree.leaves(params, is_leaf=few)


def size(params: Any) -> int:
    """Bytes of all weights; XLA keeps two numbers of 4 bits in one."""
    bits = lambda array: 4 if array.dtype == jnp.int4 else 8 * array.dtype.itemsize
    return sum(array.size * bits(array) for array in jax.tree.leaves(params)) // 8
