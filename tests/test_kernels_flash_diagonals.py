# SPDX-License-Identifier: Apache-2.0
"""Numbers per distance lie along diagonals, and gradients come back along them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from t5x_lite.kernels import diagonals
from t5x_lite.kernels.relative import Relative


def in_kernel(operation, rows: int, x):
    def kernel(x_ref, y_ref):
        y_ref[...] = operation(x_ref[...])

    shape = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


def test_each_row_is_one_place_further_to_the_right():
    x = np.arange(256, dtype=np.float32)[None]
    y = in_kernel(diagonals.expanded, 128, x)
    np.testing.assert_array_equal(y, np.stack([np.roll(x[0], row) for row in range(128)]))


def test_folding_is_the_transpose_of_expanding():
    draw = np.random.default_rng(0)
    y = draw.integers(-9, 9, (128, 256)).astype(np.float32)
    wanted = sum(np.roll(y[row], -row) for row in range(128))
    np.testing.assert_array_equal(in_kernel(diagonals.folded, 1, y)[0], wanted)


RELATIVE = Relative(np.random.default_rng(1).standard_normal((32, 1)), 128, True)
EVERY_DISTANCE = np.asarray(RELATIVE.by_distance(-4096, 8192)[0])
STARTS = [(query, key) for query in (0, 128, 1280) for key in (0, 256, 1536)]


@jax.jit
def tiles_at(offset, queries, keys):
    """The tiles of 128 queries and 256 keys that begin there, and keys by queries."""
    vector, origin = diagonals.by_difference(RELATIVE, offset, 256)
    turned, end = diagonals.reversed_vector(vector), -(origin + vector.shape[1])
    upright = read(vector, keys - queries - origin, (128, 256))
    return upright, read(turned, queries - keys - end, (256, 128))


def read(vector, starts, shape):
    def kernel(starts_ref, x_ref, y_ref):
        for index in range(starts.shape[0]):
            y_ref[index] = diagonals.tile(x_ref, 0, starts_ref[index], shape)

    expanded = jnp.stack([jnp.roll(vector[0], row) for row in range(128)])[None]
    out = jax.ShapeDtypeStruct((starts.shape[0], *shape), jnp.float32)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(starts, expanded)


@pytest.mark.parametrize("offset", [None, -300, -1, 0, 77, 1000])
def test_a_tile_anywhere_reads_the_bias_of_its_distances(offset):
    queries, keys = (np.array(x) for x in zip(*STARTS, strict=True))
    given = None if offset is None else jnp.int32(offset)
    distance = (keys - queries)[:, None, None] + np.arange(256) - np.arange(128)[:, None]
    wanted = EVERY_DISTANCE[distance - (offset or 0) + 4096]
    upright, turned = tiles_at(given, queries, keys)
    np.testing.assert_array_equal(upright, wanted)
    np.testing.assert_array_equal(turned, np.swapaxes(wanted, 1, 2))
