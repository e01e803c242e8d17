# SPDX-License-Identifier: Apache-2.0
"""Rows whose length is split over the mesh: attention is that of whole rows."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.kernels import api as kernels
from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import INTERPRETED
from t5x_lite.planning import collectives, hlo, trips

ROWS, LENGTH, HEADS, GROUP, SIZE = 2, 256, 2, 1, 64
ROTATING = replace(INTERPRETED, ring=True)
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


QUERIES = draw(ROWS, LENGTH, HEADS, GROUP, SIZE) * SIZE**-0.5
KEYS, VALUES = draw(ROWS, HEADS, LENGTH, SIZE), draw(ROWS, HEADS, LENGTH, SIZE)
GRADIENT, TABLE = draw(*QUERIES.shape), draw(32, HEADS)
# Three texts, the second across the border of the devices' parts, and padding.
SEGMENTS = np.repeat([[1, 2, 3, 0]], ROWS, axis=0).repeat([50, 130, 60, 16], axis=1)
PREFIX = np.arange(LENGTH)[None] % 130 < np.full((ROWS, 1), 20)


def attention(q, k, v, table, segments, prefix, backend, causal=True):
    """Attention that is packed and biased, and causal with prefixes in a window or bidirectional.

    Args:
      q: queries.
      k: keys.
      v: values.
      table: of the bias.
      segments: segment ids.
      prefix: tokens that all attend to.
      backend: what runs it.
      causal: causal.
    """
    mask = kernels.Mask(segments, segments)
    if causal:
        window_size = jnp.array([150, 200], jnp.int32)
        mask = kernels.Mask(segments, segments, True, prefix, prefix, window_size)
    relative = kernels.RelativePositionBias(table, 128, not causal)
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


class BothWays(NamedTuple):
    """The context and the gradients, on the host, and the program that has computed them.

    Attributes:
      values: of all arrays.
      program: HLO text.
    """

    values: Any
    program: str


def both_ways(sizes, context, backend, causal=True) -> BothWays:
    """Attention and its gradients on a mesh.

    Args:
      sizes: of data, context and tensor.
      context: "context" splits the length of rows; None does not.
      backend: what runs it.
      causal: causal.
    """
    mesh = jax.make_mesh(
        sizes, ("data", "context", "tensor"), devices=jax.devices()[: np.prod(sizes)]
    )
    with jax.set_mesh(mesh):
        q, k, v, table, *marks = placed(mesh, context)
        gradient = jax.device_put(GRADIENT, jax.NamedSharding(mesh, P("data", context, "tensor")))

        @jax.jit
        def run(q, k, v, table, gradient):
            context, back = jax.vjp(
                lambda *x: attention(*x, *marks, backend, causal), q, k, v, table
            )
            return context, back(gradient)

        compiled = run.lower(q, k, v, table, gradient).compile()
        values = compiled(q, k, v, table, gradient)
        return BothWays(jax.tree.map(np.asarray, values), compiled.as_text())


def assert_close(actual: BothWays, expected: BothWays) -> None:
    """Checks every array to 1e-5 of its largest value."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    jax.tree.map(close, actual.values, expected.values)


@pytest.mark.parametrize("backend", [None, INTERPRETED], ids=["plain XLA", "kernel"])
def test_a_row_split_over_devices_is_attended_whole(backend):
    assert_close(both_ways((2, 2, 2), "context", backend), both_ways((1, 1, 1), None, None))


def received_bytes(program: str) -> int:
    """Bytes that a device receives in a program, loops by their trips.

    Of n devices it receives all but its own part of what they gather, or of what they sum and
    split; a sum that stays whole is both.
    """
    module, total = hlo.parse_module(program), 0
    runs = trips.executions(module)
    for name, times in runs.times.items():
        computation = module.computations[name]
        for each, kind, _ in collectives.computation_collectives(module, computation):
            n = collectives.replica_groups(each.attributes, jax.device_count()).shape[1]
            share = {
                "all-gather": (n - 1) / n,
                "reduce-scatter": n - 1,
                "all-reduce": 2 * (n - 1) / n,
                "collective-permute": 1,
            }[kind]
            total += int(share * times * each.bytes)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, causal", [((2, 2, 2), True), ((1, 8, 1), False)], ids=["causal", "bidirectional"]
)
def test_keys_that_rotate_are_attended_as_gathered_ones(sizes, causal):
    actual = both_ways(sizes, "context", ROTATING, causal)
    assert_close(actual, both_ways((1, 1, 1), None, None, causal))
    if not causal:
        # Keys and values of the seven other devices; on the way back those of all eight, and their
        # gradients. Beside them the table's gradient, 256 bytes, is summed over the devices.
        arrays = 7 * 2 + 8 * 4
        assert received_bytes(actual.program) == arrays * KEYS.nbytes // 8 + 256 * 2 * 7 // 8


def test_without_a_mesh_it_is_the_same():
    expected = both_ways((1, 1, 1), None, None).values[0]
    arrays = (QUERIES, KEYS, VALUES, TABLE, SEGMENTS.astype(np.int32), PREFIX)
    actual = attention(*map(jnp.asarray, arrays), None)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Two sources; every query attends to the second alike.
    cached = kernels.prepare_mask(jnp.ones((ROWS, LENGTH), bool), None)
    mask = kernels.prepare_mask(kernels.Mask(SEGMENTS, SEGMENTS), None)
    sources = [dispatch.AttentionSource(KEYS, VALUES, each) for each in (mask, cached)]
    assert np.isfinite(kernels.dot_product_attention(jnp.asarray(QUERIES), tuple(sources))).all()
