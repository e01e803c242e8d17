# SPDX-License-Identifier: Apache-2.0
"""Cross entropy per token with label smoothing and z-loss, as in T5X."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.api import TokenLosses
from t5x_lite.kernels.vocabulary.logits import best_other_logit, smooth_target, target_mask


def target_logits(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """The logit of each target."""
    return jnp.sum(jnp.where(target_mask(logits, targets), logits, 0), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], smoothing: float, z_loss: float
) -> TokenLosses:
    """Computes the losses of each token.

    The objective is cross entropy with the smoothed target, plus z_loss * log(Z)^2. The entropy of
    the smoothed target is subtracted, so that a perfect model has objective 0 (t5x/losses.py). Only
    the objective has a gradient, and it needs the logits alone: softmax minus smoothed target, no
    second [b t v] array is kept.

    Args:
      logits: [b t v] float32.
      targets: [b t] ids.
      smoothing: probability spread over the other ids, T5X's label_smoothing.
      z_loss: coefficient of log(Z)^2.
    """
    return cross_entropy_forward(logits, targets, smoothing, z_loss)[0]


def cross_entropy_forward(logits, targets, smoothing, z_loss):
    """Forward pass.

    Args:
      logits: [b t v] float32.
      targets: [b t] ids.
      smoothing: probability spread over the other ids.
      z_loss: coefficient of log(Z)^2.

    Returns:
      the losses, and (logits, targets, log_z [b t]) for the backward pass.
    """
    target, other, entropy = smooth_target(smoothing, logits.shape[-1])
    # Computed once: XLA on CPU writes out what two sums share, here as large as the logits.
    log_z, correct_logits = jax.nn.logsumexp(logits, axis=-1), target_logits(logits, targets)
    objective = log_z - (target - other) * correct_logits - entropy
    if other > 0:
        objective -= other * jnp.sum(logits, axis=-1)
    if z_loss > 0:
        objective += z_loss * jnp.square(log_z)
    correct = correct_logits > best_other_logit(logits, targets)
    return TokenLosses(objective, log_z - correct_logits, correct), (logits, targets, log_z)


def cross_entropy_backward(smoothing, z_loss, residuals, gradient):
    """Backward pass: softmax minus smoothed target, with the slope of z-loss.

    Args:
      smoothing: probability spread over the other ids.
      z_loss: coefficient of log(Z)^2.
      residuals: logits, targets and log_z, of the forward pass.
      gradient: cotangent of the losses; only that of `objective` counts.
    """
    logits, targets, log_z = residuals
    target, other, _ = smooth_target(smoothing, logits.shape[-1])
    probabilities = jnp.exp(logits - log_z[..., None])
    slope = (1 + 2 * z_loss * log_z)[..., None] * probabilities
    slope -= jnp.where(target_mask(logits, targets), target, other)
    return slope * gradient.objective[..., None], None


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)
