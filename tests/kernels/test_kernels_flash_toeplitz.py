# SPDX-License-Identifier: Apache-2.0
"""Values per distance are along diagonals, and gradients come back along them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from t5x_lite.kernels.flash import toeplitz
from t5x_lite.kernels.relative import RelativePositionBias


def in_kernel(operation, rows: int, x):
    def kernel(x_ref, y_ref):
        y_ref[...] = operation(x_ref[...])

    shape = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


def test_each_row_is_one_place_further_to_the_right():
    x = np.arange(256, dtype=np.float32)[None]
    y = in_kernel(toeplitz.expand_vector, 128, x)
    np.testing.assert_array_equal(y, np.stack([np.roll(x[0], row) for row in range(128)]))


def test_folding_is_the_transpose_of_expanding():
    draw = np.random.default_rng(0)
    y = draw.integers(-9, 9, (128, 256)).astype(np.float32)
    wanted = sum(np.roll(y[row], -row) for row in range(128))
    np.testing.assert_array_equal(in_kernel(toeplitz.fold_rows, 1, y)[0], wanted)


RELATIVE = RelativePositionBias(np.random.default_rng(1).standard_normal((32, 1)), 128, True)
EVERY_DISTANCE = np.asarray(RELATIVE.by_distance(-4096, 8192)[0])
STARTS = [(query, key) for query in (0, 128, 1280) for key in (0, 256, 1536)]


@jax.jit
def tiles_at(offset, queries, keys):
    """The tiles of 128 queries and 256 keys that begin at queries and keys, with an offset between
    them, and the tile with keys by queries."""
    vector, origin = toeplitz.bias_vector(RELATIVE, offset, 256)
    reversed_vector, end = toeplitz.reverse_vector(vector), -(origin + vector.shape[1])
    tiles = read_tiles(vector, keys - queries - origin, (128, 256))
    return tiles, read_tiles(reversed_vector, queries - keys - end, (256, 128))


def read_tiles(vector, starts, shape):
    def kernel(starts_ref, x_ref, y_ref):
        for index in range(starts.shape[0]):
            y_ref[index] = toeplitz.read_tile(x_ref, 0, starts_ref[index], shape)

    expanded = jnp.stack([jnp.roll(vector[0], row) for row in range(128)])[None]
    out = jax.ShapeDtypeStruct((starts.shape[0], *shape), jnp.float32)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(starts, expanded)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [None, -300, -1, 0, 77, 1000])
def test_a_tile_anywhere_reads_the_bias_of_its_distances(offset):
    queries, keys = (np.array(x) for x in zip(*STARTS, strict=True))
    distance = (keys - queries)[:, None, None] + np.arange(256) - np.arange(128)[:, None]
    wanted = EVERY_DISTANCE[distance - (offset or 0) + 4096]
    tiles, transposed = tiles_at(None if offset is None else jnp.int32(offset), queries, keys)
    np.testing.assert_array_equal(tiles, wanted)
    np.testing.assert_array_equal(transposed, np.swapaxes(wanted, 1, 2))
