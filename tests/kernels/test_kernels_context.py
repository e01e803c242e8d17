# SPDX-License-Identifier: Apache-2.0
"""Rows whose length is split over the mesh: attention is that of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.kernels import api as kernels
from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import INTERPRETED

ROWS, LENGTH, HEADS, GROUP, SIZE = 2, 256, 2, 1, 64
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


QUERIES = draw(ROWS, LENGTH, HEADS, GROUP, SIZE) * SIZE**-0.5
KEYS, VALUES = draw(ROWS, HEADS, LENGTH, SIZE), draw(ROWS, HEADS, LENGTH, SIZE)
GRADIENT, TABLE = draw(*QUERIES.shape), draw(32, HEADS)
# Three texts, the second across the border of the devices' parts, and padding.
SEGMENTS = np.repeat([[1, 2, 3, 0]], ROWS, axis=0).repeat([50, 130, 60, 16], axis=1)
PREFIX = np.arange(LENGTH)[None] % 130 < np.full((ROWS, 1), 20)


def attention(q, k, v, table, segments, prefix, backend):
    """Attention that is causal with prefixes, packed, windowed and biased.

    Args:
      q: queries.
      k: keys.
      v: values.
      table: of the bias.
      segments: segment ids.
      prefix: tokens that all attend to.
      backend: what runs it.
    """
    mask = kernels.Mask(
        segments, segments, True, prefix, prefix, window_size=jnp.array([150, 200], jnp.int32)
    )
    relative = kernels.RelativePositionBias(table, 128, False)
    mask = kernels.prepare_mask(mask, backend)
    source = dispatch.AttentionSource(k, v, mask, kernels.prepare_bias(relative, mask))
    return kernels.dot_product_attention(q, (source,), backend=backend)


def placed(mesh, context):
    specs = (
        P("data", context, "tensor"), P("data", "tensor", context), P("data", "tensor", context),
        P(None, "tensor"), P("data", context), P("data", context),
    )  # fmt: skip
    arrays = (QUERIES, KEYS, VALUES, TABLE, SEGMENTS.astype(np.int32), PREFIX)
    return [
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]


def both_ways(sizes, context, backend):
    mesh = jax.make_mesh(
        sizes, ("data", "context", "tensor"), devices=jax.devices()[: np.prod(sizes)]
    )
    with jax.set_mesh(mesh):
        q, k, v, table, *marks = placed(mesh, context)
        gradient = jax.device_put(GRADIENT, jax.NamedSharding(mesh, P("data", context, "tensor")))

        @jax.jit
        def run(q, k, v, table, gradient):
            context, back = jax.vjp(lambda *x: attention(*x, *marks, backend), q, k, v, table)
            return context, back(gradient)

        return jax.tree.map(np.asarray, run(q, k, v, table, gradient))


@pytest.mark.parametrize("backend", [None, INTERPRETED], ids=["plain XLA", "kernel"])
def test_a_row_split_over_devices_is_attended_whole(backend):
    expected = both_ways((1, 1, 1), None, None)
    actual = both_ways((2, 2, 2), "context", backend)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    jax.tree.map(close, actual, expected)


def test_without_a_mesh_it_is_the_same():
    expected = both_ways((1, 1, 1), None, None)[0]
    arrays = (QUERIES, KEYS, VALUES, TABLE, SEGMENTS.astype(np.int32), PREFIX)
    actual = attention(*map(jnp.asarray, arrays), None)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Two sources; every query attends to the second alike.
    cached = kernels.prepare_mask(jnp.ones((ROWS, LENGTH), bool), None)
    mask = kernels.prepare_mask(kernels.Mask(SEGMENTS, SEGMENTS), None)
    sources = [dispatch.AttentionSource(KEYS, VALUES, each) for each in (mask, cached)]
    assert np.isfinite(kernels.dot_product_attention(jnp.asarray(QUERIES), tuple(sources))).all()
