# SPDX-License-Identifier: Apache-2.0
"""Laws of the attention of plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels import reference

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


Q, K, V = draw(3, 5, 2, 2, 8), draw(3, 2, 7, 8), draw(3, 2, 7, 8)
MASK = RNG.random((3, 5, 7)) < 0.6
MASK[1, 2] = False  # a fully masked query
GRADIENT = draw(3, 5, 2, 2, 8)
BIASES = {"none": None, "shared": draw(1, 2, 2, 5, 7), "by row": draw(3, 2, 2, 5, 7)}


def plain(q, k, v, mask, bias, softcap):
    scores = jnp.einsum("btkgh,bksh->bkgts", q, k)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9))
    context = jnp.einsum("bkgts,bksh->btkgh", weights, v)
    return jnp.where(mask.any(-1)[:, :, None, None, None], context, 0)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", [MASK, MASK[:, :1]], ids=["by query", "by row"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_context_and_gradients_are_those_of_the_plain_formula(bias, mask, softcap):
    arrays = (Q, K, V, BIASES[bias])
    context, back = jax.vjp(
        lambda *x: reference.reference_attention(*x[:3], mask, x[3], softcap), *arrays
    )
    with jax.enable_x64(True):
        exact = jax.tree.map(np.float64, arrays)
        expected, back_exact = jax.vjp(lambda *x: plain(*x[:3], mask, x[3], softcap), *exact)
        gradients = back_exact(jnp.asarray(GRADIENT, np.float64))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())

    jax.tree.map(close, (context, back(GRADIENT)), (expected, gradients))


def test_huge_scores_stay_finite():
    context, back = jax.vjp(lambda q: reference.reference_attention(q, K, V, MASK, None), 1e4 * Q)
    assert np.isfinite(context).all()
    assert np.isfinite(back(GRADIENT)[0]).all()
