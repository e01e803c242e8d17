# SPDX-License-Identifier: Apache-2.0
"""Slots of a cache: keys or values [b k s h] of tokens, as they are or quantized.

A vector is quantized by itself, with one scale for each token and head: what a slot holds depends
on no other slot, so that texts are the same whatever is drafted, and in any company.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.model.quantization import round_symmetric
from t5x_lite.sharding import spec

AXES = "batch kv_heads length head_dim"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["integers", "scales"], meta_fields=["bits"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedSlots:
    """Slots in 8 or 4 bits.

    Attributes:
      integers: [b k s h] int8; with 4 bits [b k s h/2], the first half of a vector in the low bits.
      scales: [b k s 1] float32 scale of each vector.
      bits: 8 or 4.
    """

    integers: Any
    scales: Any
    bits: int


# [b k s h] keys or values, or QuantizedSlots.
Slots = Any


def empty_slots(shape: tuple[int, ...], dtype: str, bits: int | None, axes: str = AXES) -> Slots:
    """Returns slots of zeros.

    Args:
      shape: [... b k s h].
      dtype: of keys and values that are not quantized.
      bits: 8 or 4; None for no quantization.
      axes: names of the axes.

    Raises:
      ValueError: 4 bits do not divide the head size.
    """

    def zeros(size: int, dtype: Any) -> Array:
        return jnp.zeros((*shape[:-1], size), dtype, out_sharding=spec(axes))

    size = shape[-1]
    if bits is None:
        return zeros(size, dtype)
    if bits == 4 and size % 2:
        raise ValueError(
            f"A cache of int4 packs two numbers into a byte, and Stack.head_dim is {size}: choose "
            "int8 for Decode.kv_cache"
        )
    return QuantizedSlots(zeros(size * bits // 8, jnp.int8), zeros(1, jnp.float32), bits)


def quantize_slots(x: Float[Array, "b k w h"], bits: int) -> QuantizedSlots:
    """Quantizes keys or values symmetrically: the largest magnitude of a vector is 127, or 7."""
    integers, scales = round_symmetric(x, bits, -1)
    integers = integers.astype(jnp.int8)
    if bits == 4:
        half = x.shape[-1] // 2
        integers = (integers[..., :half] & 15) | (integers[..., half:] << 4)
    return QuantizedSlots(integers, scales, bits)


def read_slots(slots: Slots, dtype: Any) -> Float[Array, "b k s h"]:
    """Returns keys or values; those that are not quantized as they are, others in dtype."""
    if not isinstance(slots, QuantizedSlots):
        return slots
    integers = slots.integers
    if slots.bits == 4:
        # Arithmetic shifts: the sign of each half is kept.
        integers = jnp.concatenate([(integers << 4) >> 4, integers >> 4], axis=-1)
    return (integers.astype(jnp.float32) * slots.scales).astype(dtype)


def encode_block(slots: Slots, block: Float[Array, "b k w h"]) -> Slots:
    """Returns a block in the form of slots."""
    if isinstance(slots, QuantizedSlots):
        return quantize_slots(block, slots.bits)
    return block.astype(slots.dtype)


def write_slots(slots: Slots, block: Float[Array, "b k w h"], index: Int[Array, " b"]) -> Slots:
    """Writes a block of new keys or values, row by row.

    Args:
      slots: those of one layer.
      block: [b k w h] new keys or values.
      index: [b] slot of the first of the w new ones.
    """
    write = functools.partial(write_rows, index=index)
    return jax.tree.map(write, slots, encode_block(slots, block))


def write_rows(
    cache: Float[Array, "b k s h"], block: Float[Array, "b k w h"], index: Int[Array, " b"]
) -> Float[Array, "b k s h"]:
    """Writes a block into an array of one layer, row by row.

    Args:
      cache: [b k s h] keys or values.
      block: [b k w h] new keys or values.
      index: [b] slot of the first of the w new ones.

    Returns:
      The new array.
    """

    def write(row, block, start):
        return jax.lax.dynamic_update_slice_in_dim(row, block, start, axis=1)

    return jax.vmap(write)(cache, block.astype(cache.dtype), index)


def take_slots(slots: Slots, places: Int[Array, "b n"]) -> Slots:
    """Returns the slots of each row at its places."""
    take = jax.vmap(functools.partial(jnp.take, axis=1))
    return jax.tree.map(lambda x: take(x, places), slots)
