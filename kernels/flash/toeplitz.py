# SPDX-License-Identifier: Apache-2.0
"""Toeplitz tiles: one value per distance along the diagonals, and sums along them.

A tile of 128 rows is a slice of columns of the expanded vector, whose row r is the vector moved r
places to the right. So values are moved once per head, and a tile costs reading it. No strided
rotation (which TPU v4 lacks) is needed: rows are doubled, each time with one rotation.

Axes: d distances, p heads of a block, r rows, c columns of a tile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.kernels.tile_math import LANES


def bias_vector(
    bias: RelativePositionBias, offset: Int[Array, ""] | None, block: int
) -> tuple[Float[Array, "n d"], Int[Array, ""]]:
    """Returns the bias of key index minus query index as a vector, and the difference of its first
    value.

    It reaches so far beyond the distances at which the bias still changes that a tile of `block`
    columns, moved to the nearest place inside, reads what it would have read outside.

    Args:
      bias: the bias by bucket.
      offset: index among the keys of the first query; None is 0.
      block: columns of the widest tile.
    """
    beyond = -(-(bias.last_boundary + block + LANES) // LANES) * LANES
    if offset is None:
        return bias.by_distance(-beyond, 2 * beyond), jnp.int32(-beyond)
    # Tiles are read at multiples of 128, so the vector begins at one.
    first = offset // LANES * LANES - beyond
    return bias.by_distance(first - offset, 2 * beyond + LANES), first.astype(jnp.int32)


def reverse_vector(vector: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Returns the same values by query index minus key index; begins with -(origin + d)."""
    return jnp.roll(vector[..., ::-1], 1, axis=-1)


def expand_vector(vector: Float[Array, "1 d"]) -> Float[Array, "128 d"]:
    """Returns rows of which row r is the vector moved r places to the right, in a kernel."""
    x = jnp.broadcast_to(vector, (8, vector.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (1, 2, 4):
        x = jnp.where(row & bit != 0, pltpu.roll(x, bit, 1), x)
    while x.shape[0] < LANES:
        x = jnp.concatenate([x, pltpu.roll(x, x.shape[0], 1)], axis=0)
    return x


def fold_rows(x: Float[Array, "128 d"]) -> Float[Array, "1 d"]:
    """Returns the sum of rows, row r moved r places to the left: the transpose of
    `expand_vector`."""
    while x.shape[0] > 8:
        half = x.shape[0] // 2
        x = x[:half] + pltpu.roll(x[half:], x.shape[1] - half, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (4, 2, 1):
        x = jnp.where(row & bit != 0, pltpu.roll(x, x.shape[1] - bit, 1), x)
    return jnp.sum(x, axis=0, keepdims=True)


def tile_slices(
    x: Float[Array, "p 128 d"], start: Int[Array, ""], shape: tuple[int, ...]
) -> list[pl.Slice]:
    """Returns the columns of the expanded vector that each 128 rows of a tile read.

    Args:
      x: reference to expanded vectors.
      start: the tile's first column minus its first row minus the vector's origin.
      shape: rows and columns of the tile.
    """
    rows, columns = shape
    limit = x.shape[2] - columns
    begins = [jnp.clip(start - first, LANES, limit) for first in range(0, rows, LANES)]
    return [pl.ds(pl.multiple_of(begin, LANES), columns) for begin in begins]


def read_tile(x, head: int | jax.Array, start, shape: tuple[int, int]) -> Float[Array, "r c"]:
    """Returns a tile with one value per diagonal.

    Args:
      x: reference to expanded vectors, [p 128 d].
      head: which of them.
      start: the tile's first column minus its first row minus the vector's origin.
      shape: rows and columns of the tile.
    """
    return jnp.concatenate([x[head, :, part] for part in tile_slices(x, start, shape)], axis=0)


def add_tile(x, head: int | jax.Array, start, tile: Float[Array, "r c"]) -> None:
    """Adds a tile to what `read_tile` would have read.

    Args:
      x: reference to expanded vectors, [p 128 d].
      head: which of them.
      start: the tile's first column minus its first row minus the vector's origin.
      tile: [r c], what to add.
    """
    for index, part in enumerate(tile_slices(x, start, tile.shape)):
        x[head, :, part] += tile[index * LANES : (index + 1) * LANES]
