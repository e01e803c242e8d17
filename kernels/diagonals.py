# SPDX-License-Identifier: Apache-2.0
"""A number per distance, laid along the diagonals of a tile, and summed back along them.

A tile of 128 rows is a slice of columns of `expanded`: row r of it is the vector moved r places to
the right. So the numbers are moved once per head, and a tile costs reading it. No strided rotation
(which TPU v4 lacks) is needed: rows are doubled, each time with one rotation.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.relative import Relative

LANES = 128


def by_difference(
    relative: Relative, offset: Int[Array, ""] | None, block: int
) -> tuple[Float[Array, "n d"], Int[Array, ""]]:
    """The bias of key index minus query index, as a vector, and the difference it begins with.

    It reaches so far beyond the distances at which the bias still changes that a tile of `block`
    columns, moved to the nearest place inside, reads what it would have read outside.
    """
    beyond = -(-(relative.farthest + block + LANES) // LANES) * LANES
    if offset is None:
        return relative.by_distance(-beyond, 2 * beyond), jnp.int32(-beyond)
    # Tiles are read at multiples of 128, so the vector begins at one.
    first = offset // LANES * LANES - beyond
    return relative.by_distance(first - offset, 2 * beyond + LANES), first.astype(jnp.int32)


def reversed_vector(vector: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """The same numbers by query index minus key index; begins with -(origin + d)."""
    return jnp.roll(vector[..., ::-1], 1, axis=-1)


def expanded(vector: Float[Array, "1 d"]) -> Float[Array, "128 d"]:
    """Row r is vector moved r places to the right, in a kernel."""
    x = jnp.broadcast_to(vector, (8, vector.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (1, 2, 4):
        x = jnp.where(row & bit != 0, pltpu.roll(x, bit, 1), x)
    while x.shape[0] < LANES:
        x = jnp.concatenate([x, pltpu.roll(x, x.shape[0], 1)], axis=0)
    return x


def folded(x: Float[Array, "128 d"]) -> Float[Array, "1 d"]:
    """The sum of rows, row r moved r places to the left: the transpose of `expanded`."""
    while x.shape[0] > 8:
        half = x.shape[0] // 2
        x = x[:half] + pltpu.roll(x[half:], x.shape[1] - half, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (4, 2, 1):
        x = jnp.where(row & bit != 0, pltpu.roll(x, x.shape[1] - bit, 1), x)
    return jnp.sum(x, axis=0, keepdims=True)


def places(
    x: Float[Array, "p 128 d"], start: Int[Array, ""], shape: tuple[int, int]
) -> list[pl.Slice]:
    """Where in `expanded` (a reference) each 128 rows of a tile are read.

    start: the tile's first column minus its first row minus the vector's origin.
    """
    rows, columns = shape
    inside = lambda place: jnp.clip(place, LANES, x.shape[2] - columns)
    begins = [inside(start - first) for first in range(0, rows, LANES)]
    return [pl.ds(pl.multiple_of(begin, LANES), columns) for begin in begins]


def tile(x, head: int, start, shape: tuple[int, int]) -> Float[Array, "r c"]:
    return jnp.concatenate([x[head, :, place] for place in places(x, start, shape)], axis=0)


def add_tile(x, head: int, start, tile: Float[Array, "r c"]) -> None:
    """Adds to the reference x what `tile` would have read from there."""
    for index, place in enumerate(places(x, start, tile.shape)):
        x[head, :, place] += tile[index * LANES : (index + 1) * LANES]
