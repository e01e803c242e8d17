# SPDX-License-Identifier: Apache-2.0
"""Rows whose length is split over the mesh: attention is that of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite import kernels
from t5x_lite.kernels import dispatch
from t5x_lite.kernels.tiles import INTERPRETED

ROWS, LENGTH, HEADS, GROUP, SIZE = 2, 256, 2, 1, 64
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
QUERIES = draw(ROWS, LENGTH, HEADS, GROUP, SIZE) * SIZE**-0.5
KEYS, VALUES = draw(ROWS, HEADS, LENGTH, SIZE), draw(ROWS, HEADS, LENGTH, SIZE)
GRADIENT, TABLE = draw(*QUERIES.shape), draw(32, HEADS)
# Three texts, the second across the border of the devices' parts, and padding.
SEGMENTS = np.repeat([[1, 2, 3, 0]], ROWS, axis=0).repeat([50, 130, 60, 16], axis=1)
PREFIX = np.arange(LENGTH)[None] % 130 < np.full((ROWS, 1), 20)


def attention(q, k, v, table, segments, prefix, how):
    """Causal with prefixes, packed, windowed and biased."""
    sight = kernels.Sight(
        segments, segments, True, prefix, prefix, reach=jnp.array([150, 200], jnp.int32)
    )
    relative = kernels.Relative(table, 128, False)
    sight = kernels.prepared(sight, how)
    source = dispatch.Source(k, v, sight, kernels.laid(relative, sight))
    return kernels.attend(q, (source,), how=how)


def placed(mesh, context):
    specs = (
        P("data", context, "tensor"), P("data", "tensor", context), P("data", "tensor", context),
        P(None, "tensor"), P("data", context), P("data", context),
    )  # fmt: skip
    arrays = (QUERIES, KEYS, VALUES, TABLE, SEGMENTS.astype(np.int32), PREFIX)
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    return [put(x, spec) for x, spec in zip(arrays, specs, strict=True)]


def both_ways(sizes, context, how):
    mesh = jax.make_mesh(
        sizes, ("data", "context", "tensor"), devices=jax.devices()[: np.prod(sizes)]
    )
    with jax.set_mesh(mesh):
        q, k, v, table, *marks = placed(mesh, context)
        gradient = jax.device_put(GRADIENT, jax.NamedSharding(mesh, P("data", context, "tensor")))

        @jax.jit
        def run(q, k, v, table, gradient):
            own = lambda *x: attention(*x, *marks, how)
            context, back = jax.vjp(own, q, k, v, table)
            return context, back(gradient)

        return jax.tree.map(np.asarray, run(q, k, v, table, gradient))


@pytest.mark.parametrize("how", [None, INTERPRETED], ids=["plain XLA", "kernel"])
def test_a_row_split_over_devices_is_attended_whole(how):
    expected = both_ways((1, 1, 1), None, None)
    found = both_ways((2, 2, 2), "context", how)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    jax.tree.map(close, found, expected)


def test_without_a_mesh_it_is_the_same():
    expected = both_ways((1, 1, 1), None, None)[0]
    arrays = (QUERIES, KEYS, VALUES, TABLE, SEGMENTS.astype(np.int32), PREFIX)
    found = attention(*map(jnp.asarray, arrays), None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Two sources, the second seen alike by every query.
    cached = kernels.prepared(jnp.ones((ROWS, LENGTH), bool), None)
    sight = kernels.prepared(kernels.Sight(SEGMENTS, SEGMENTS), None)
    sources = [dispatch.Source(KEYS, VALUES, each) for each in (sight, cached)]
    assert np.isfinite(kernels.attend(jnp.asarray(QUERIES), tuple(sources))).all()
