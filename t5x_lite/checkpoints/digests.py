# SPDX-License-Identifier: Apache-2.0
"""Digests of arrays: 32 bits that show damage, the same on every mesh, on the host and by layer.

The last axis is reduced first: each value is mixed with its index, and the results are summed
modulo 2^32, which does not depend on their order; then the next axis, and so on. For one index the
mixing is one-to-one, so a change of one element always changes the digest; as it is not linear,
changes of several elements (of the signs of two) cancel as seldom as chance has it.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODULUS = 2**32
# Key of a digest in the metadata. Checkpoints of earlier versions have "digest": there bits were
# multiplied by odd numbers instead, and a change of two signs left the sum as it was.
MIXED, LINEAR = "mixed_digest", "digest"
GOLDEN = np.uint32(0x9E3779B9)
# Elements that the host reads at once.
BLOCK = 2**24


def weigh_bits(bits: Any, mixed: bool) -> Any:
    """Bits [... n], uint32 of numpy or jax, each mixed with its index along the last axis.

    Args:
      bits: the values.
      mixed: false for the linear digest of earlier versions.
    """
    index = np.arange(bits.shape[-1], dtype=np.uint32)
    if not mixed:
        return bits * (2 * index + 1)
    # The finalizer of MurmurHash3 (Appleby, 2011).
    bits = bits + GOLDEN * (index + 1)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def array_digest(array: jax.Array, mixed: bool = True) -> jax.Array:
    """Digest of an array, uint32 []; `mixed` is that of `weigh_bits`."""
    bits = to_bits(array)
    while bits.ndim:
        bits = jnp.sum(weigh_bits(bits, mixed), axis=-1, dtype=jnp.uint32)
    return bits


@functools.partial(jax.jit, static_argnames="mixed")
def array_digests(arrays: dict[str, jax.Array], mixed: bool = True) -> dict[str, jax.Array]:
    """`array_digest` of every array, uint32 []."""
    return {name: array_digest(array, mixed) for name, array in arrays.items()}


def to_bits(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32, in the shape of the array."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def row_digests(rows: np.ndarray, mixed: bool = True) -> np.ndarray:
    """Digest of every row on the host, uint32 [rows]; `mixed` is that of `weigh_bits`."""
    bits = np.ascontiguousarray(rows).view(np.dtype(f"u{rows.dtype.itemsize}")).astype(np.uint32)
    while bits.ndim > 1:
        bits = np.sum(weigh_bits(bits, mixed), axis=-1, dtype=np.uint32)
    return bits


def combine_digests(digests: Mapping[int | None, int], mixed: bool = True) -> int:
    """The digest of an array from those of its layers (or its rows), which are along its first
    axis; None is the number of the only part of an array that is not stacked."""
    if None in digests:
        return digests[None]
    values = np.array([digests[index] for index in range(len(digests))], np.uint32)
    return int(np.sum(weigh_bits(values, mixed), dtype=np.uint32))


def numpy_digest(array: np.ndarray, mixed: bool = True) -> int:
    """`array_digest` without a device."""
    rows = np.concatenate([row_digests(block, mixed) for block in row_blocks(np.atleast_1d(array))])
    return combine_digests(dict(enumerate(rows.tolist())), mixed) if array.ndim else int(rows[0])


def row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in blocks of rows along its first axis, of at most BLOCK numbers or one row."""
    if array.ndim == 0:
        yield array
        return
    rows = max(1, BLOCK // max(1, array[0].size if len(array) else 1))
    for begin in range(0, max(1, len(array)), rows):
        yield array[begin : begin + rows]


def stored_digest(described: Mapping[str, Any]) -> tuple[int, bool]:
    """Digest that the metadata of an array have, and whether it is mixed."""
    mixed = MIXED in described
    return described[MIXED if mixed else LINEAR], mixed


def changed_arrays(described: Mapping[str, Mapping], arrays: Mapping[str, Any]) -> list[str]:
    """Names of the arrays whose digests are not those that were stored.

    Args:
      described: metadata of each array.
      arrays: numpy or jax arrays by the same names.
    """
    stored = {name: stored_digest(each) for name, each in described.items()}
    if any(isinstance(array, np.ndarray) for array in arrays.values()):
        digests = {name: numpy_digest(arrays[name], mixed) for name, (_, mixed) in stored.items()}
    else:
        digests = {}
        for kind in {mixed for _, mixed in stored.values()}:
            names = [name for name, (_, mixed) in stored.items() if mixed == kind]
            digests |= jax.device_get(array_digests({name: arrays[name] for name in names}, kind))
    return [name for name, (value, _) in stored.items() if int(digests[name]) != value]
