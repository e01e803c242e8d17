# SPDX-License-Identifier: Apache-2.0
"""Flash attention against the same attention in float64 with all pairs at hand."""

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from flash_toys import SMALL, Kind, case, context_and_gradients, difference, exactly, flash

from t5x_lite.kernels.flash.api import AttentionSource, flash_attention
from t5x_lite.kernels.mask import Mask

KINDS = {
    "encoder": Kind(),
    "decoder": Kind(heads=(1, 1, 128), lengths=(200, 200), causal=True),
    "prefix": Kind(lengths=(200, 200), causal=True, prefix=True, biased=False, heads=(1, 3, 64)),
    "window": Kind(window=True, offset=True, softcap=2.0),
    "merged": Kind(causal=True, window=True, second=140, biased=False, softcap=3.0),
}


def agrees(kind: Kind, seed: int) -> None:
    q, sources, gradient = case(kind, seed)
    value, gradients = context_and_gradients(flash, q, sources, gradient, kind.softcap)
    exact_value, exact_gradients = exactly(q, sources, gradient, kind.softcap)
    assert difference(value, exact_value) < 2e-6
    assert difference(gradients, exact_gradients) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_exact(name):
    for seed in range(3):
        agrees(KINDS[name], seed)


EVERYTHING = Kind(
    heads=(2, 2, 32), causal=True, prefix=True, window=True, offset=True, second=140, softcap=2.0
)
WIDE = [
    *KINDS.values(),
    EVERYTHING,
    Kind(heads=(3, 1, 96), lengths=(90, 260), offset=True),
    Kind(heads=(1, 1, 256), causal=True, lengths=(260, 100)),
    Kind(heads=(3, 3, 64), window=True, lengths=(128, 256)),
    Kind(heads=(1, 8, 64), causal=True, softcap=5.0, lengths=(140, 140)),
]


@pytest.mark.slow
# The last ones are the dearest: sizes, without a feature that the others lack.
@pytest.mark.parametrize("kind", mark_exhaustive(range(len(WIDE)), kept=[*range(5), 6, 7]))
def test_drawn_cases_are_exact(kind):
    for seed in range(100, 120):
        agrees(WIDE[kind], seed)


def test_bfloat16_is_as_near_as_its_operands():
    q, sources, gradient = case(KINDS["encoder"], 3, jnp.bfloat16)
    value, gradients = context_and_gradients(flash, q, sources, gradient, None)
    exact_value, exact_gradients = exactly(q, sources, gradient, None)
    assert value.dtype == gradients[0].dtype == jnp.bfloat16
    assert difference(value, exact_value) < 1e-2
    assert difference(gradients, exact_gradients) < 2e-2


def test_fully_masked_queries_give_zero_and_no_gradient():
    kind = Kind(causal=True, biased=True, lengths=(140, 140))
    q, (source,), gradient = case(kind, 0)
    mask = Mask(np.zeros((2, 140), np.int32), source.mask.key_segments, causal=True)
    masked = (source._replace(mask=mask),)
    value, gradients = context_and_gradients(flash, q, masked, gradient, None)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves((value, gradients)))


@pytest.mark.slow
def test_parts_join_by_their_log_z_gradients_too():
    """As in ring attention: keys in two parts, each on its own, weighed by log(Z)."""
    q, (source,), gradient = case(Kind(lengths=(130, 256), heads=(1, 1, 64), biased=False), 1)
    segments = source.mask.query_segments, source.mask.key_segments

    def joined(q, k, v):
        parts = []
        for part in (slice(0, 128), slice(128, 256)):
            mask = Mask(segments[0], segments[1][:, part])
            sources = (AttentionSource(k[:, :, part], v[:, :, part], mask),)
            parts.append(flash_attention(q, sources, None, chips.backend_for("tpu"), SMALL))
        contexts, log_z = zip(*parts, strict=True)
        probs = jax.nn.softmax(jnp.stack(log_z), axis=0)
        probs = jnp.swapaxes(probs, 2, 3)[:, :, :, :, None, None]
        return sum(context * weight for context, weight in zip(contexts, probs, strict=True))

    value, pull = jax.vjp(joined, q, source.keys, source.values)
    exact_value, (of_q, of_parts) = exactly(q, (source,), gradient, None)
    assert difference(value, exact_value) < 2e-6
    assert difference(pull(gradient), (of_q, *of_parts[0][:2])) < 1e-5


def test_table_gradient_is_that_of_finite_differences():
    q, sources, gradient = case(Kind(lengths=(40, 50), heads=(1, 1, 64), causal=True), 2)
    loss = jax.jit(lambda table: jnp.sum(with_table(q, sources[0], table) * gradient))
    table = sources[0].bias.table
    gradients = jax.grad(loss)(table)
    for bucket in (0, 3, 15):
        step = np.zeros_like(table)
        step[bucket] = 0.05
        # Of third order: the error is that of float32 sums over 80 queries.
        expected = (loss(table + step) - loss(table - step)) / 0.1
        np.testing.assert_allclose(expected, np.sum(gradients[bucket]), atol=2e-3)


def with_table(q, source: AttentionSource, table):
    bias = type(source.bias)(table, source.bias.max_distance, False)
    return flash(q, (source._replace(bias=bias),), None)
