# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.training.losses import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 11)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 11, (3, 5))


def reference(logits, targets, smoothing, z_loss):
    """Cross entropy of logits and targets in float64, with smoothing written out and a z_loss
    (t5x/losses.py)."""
    vocab = logits.shape[-1]
    soft = np.full(logits.shape, smoothing / (vocab - 1))
    np.put_along_axis(soft, targets[..., None], 1 - smoothing, axis=-1)
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(soft * np.log(soft), axis=-1)
    cross = -(soft * (logits - log_z[..., None])).sum(-1)
    return cross - entropy + z_loss * log_z**2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_is_smoothed_cross_entropy_plus_z_loss(smoothing, z_loss):
    ours = cross_entropy.cross_entropy(LOGITS, TARGETS, smoothing, z_loss).objective
    np.testing.assert_allclose(ours, reference(LOGITS, TARGETS, smoothing, z_loss), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_that_of_the_plain_formula(smoothing):
    def plain(logits):
        soft = jax.nn.one_hot(TARGETS, 11) * (1 - smoothing - smoothing / 10) + smoothing / 10
        log_z = jax.nn.logsumexp(logits, axis=-1)
        loss = -(soft * (logits - log_z[..., None])).sum(-1) + 1e-2 * log_z**2
        return jnp.sum(loss * jnp.arange(5.0))

    def ours(logits):
        return jnp.sum(
            cross_entropy.cross_entropy(logits, TARGETS, smoothing, 1e-2).objective
            * jnp.arange(5.0)
        )

    np.testing.assert_allclose(
        jax.grad(ours)(LOGITS), jax.grad(plain)(LOGITS), rtol=1e-5, atol=1e-6
    )


def test_perfect_prediction_of_a_smoothed_target_costs_nothing():
    logits = np.where(np.arange(11) == TARGETS[..., None], np.log(0.9), np.log(0.01))
    loss = cross_entropy.cross_entropy(logits.astype(np.float32), TARGETS, 0.1, 0.0).objective
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_likelihood_and_accuracy_agree_with_softmax_and_argmax():
    expected = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(LOGITS)), TARGETS[..., None], axis=-1
    )[..., 0]
    token_losses = cross_entropy.cross_entropy(LOGITS, TARGETS, 0.1, 1e-2)
    np.testing.assert_allclose(token_losses.nll, -expected, rtol=1e-5)
    np.testing.assert_array_equal(token_losses.correct, LOGITS.argmax(-1) == TARGETS)


def test_a_tie_for_the_best_logit_is_not_correct():
    logits = np.array([[[1.0, 1, 0], [2, 1, 0], [0, 0, 0], [-np.inf, -np.inf, 0]]], np.float32)
    for target, expected in ((0, [0, 1, 0, 0]), (1, [0, 0, 0, 0]), (2, [0, 0, 0, 1])):
        targets = np.full((1, 4), target)
        losses = cross_entropy.cross_entropy(logits, targets, 0.0, 0.0)
        np.testing.assert_array_equal(losses.correct[0], np.array(expected, bool))


def test_huge_logits_stay_finite():
    logits = np.array([[[1e30, -1e30, 0.0]]], np.float32)

    def objective(x):
        return cross_entropy.cross_entropy(x, np.array([[0]]), 0.0, 0.0).objective.sum()

    assert np.isfinite(objective(logits))
    assert np.isfinite(jax.grad(objective)(logits)).all()
