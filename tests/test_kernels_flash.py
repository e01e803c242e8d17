# SPDX-License-Identifier: Apache-2.0
"""Flash attention against the same attention in float64 with all pairs at hand."""

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import SMALL, Kind, case, context_and_gradients, difference, exactly, flash

from t5x_lite.kernels.flash_attention import Source, flash_attention_log_z
from t5x_lite.kernels.sight import Sight

KINDS = {
    "encoder": Kind(),
    "decoder": Kind(heads=(1, 1, 128), lengths=(200, 200), causal=True),
    "prefix": Kind(lengths=(200, 200), causal=True, prefix=True, biased=False, heads=(1, 3, 64)),
    "window": Kind(reach=True, offset=True, softcap=2.0),
    "merged": Kind(causal=True, reach=True, second=140, biased=False, softcap=3.0),
}


def agrees(kind: Kind, seed: int) -> None:
    q, sources, gradient = case(kind, seed)
    value, gradients = context_and_gradients(flash, q, sources, gradient, kind.softcap)
    exact_value, exact_gradients = exactly(q, sources, gradient, kind.softcap)
    assert difference(value, exact_value) < 2e-6
    assert difference(gradients, exact_gradients) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_exact(name):
    for seed in range(3):
        agrees(KINDS[name], seed)


EVERYTHING = Kind(
    heads=(2, 2, 32), causal=True, prefix=True, reach=True, offset=True, second=140, softcap=2.0
)
WIDE = [
    *KINDS.values(),
    EVERYTHING,
    Kind(heads=(3, 1, 96), lengths=(90, 260), offset=True),
    Kind(heads=(1, 1, 256), causal=True, lengths=(260, 100)),
    Kind(heads=(3, 3, 64), reach=True, lengths=(128, 256)),
    Kind(heads=(1, 8, 64), causal=True, softcap=5.0, lengths=(140, 140)),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(len(WIDE)))
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


def test_queries_that_see_nothing_give_zero_and_no_gradient():
    kind = Kind(causal=True, biased=True, lengths=(140, 140))
    q, (source,), gradient = case(kind, 0)
    sight = Sight(np.zeros((2, 140), np.int32), source.sight.key_segments, causal=True)
    blind = (source._replace(sight=sight),)
    value, gradients = context_and_gradients(flash, q, blind, gradient, None)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves((value, gradients)))


def test_parts_join_by_their_log_z_gradients_too():
    """What ring attention does: keys in two parts, each on its own, weighed by log(Z)."""
    q, (source,), gradient = case(Kind(lengths=(130, 256), heads=(1, 1, 64), biased=False), 1)
    sight = source.sight

    def joined(q, k, v):
        parts = []
        for part in (slice(0, 128), slice(128, 256)):
            own = Sight(sight.query_segments, sight.key_segments[:, part])
            sources = (Source(k[:, :, part], v[:, :, part], own),)
            parts.append(flash_attention_log_z(q, sources, None, chips.how("tpu"), SMALL))
        contexts, levels = zip(*parts, strict=True)
        shares = jax.nn.softmax(jnp.stack(levels), axis=0)
        shares = jnp.swapaxes(shares, 2, 3)[:, :, :, :, None, None]
        return sum(context * share for context, share in zip(contexts, shares, strict=True))

    value, pull = jax.vjp(joined, q, source.keys, source.values)
    exact_value, (of_q, of_parts) = exactly(q, (source,), gradient, None)
    assert difference(value, exact_value) < 2e-6
    assert difference(pull(gradient), (of_q, *of_parts[0][:2])) < 1e-5


def test_table_gradient_is_the_slope_of_finite_differences():
    q, sources, gradient = case(Kind(lengths=(40, 50), heads=(1, 1, 64), causal=True), 2)
    loss = jax.jit(lambda table: jnp.sum(with_table(q, sources[0], table) * gradient))
    table = sources[0].relative.table
    slopes = jax.grad(loss)(table)
    for bucket in (0, 3, 15):
        step = np.zeros_like(table)
        step[bucket] = 0.05
        # Of third order: the error is that of float32 sums over 80 queries.
        slope = (loss(table + step) - loss(table - step)) / 0.1
        np.testing.assert_allclose(slope, np.sum(slopes[bucket]), atol=2e-3)


def with_table(q, source: Source, table):
    relative = type(source.relative)(table, source.relative.max_distance, False)
    return flash(q, (source._replace(relative=relative),), None)
