# SPDX-License-Identifier: Apache-2.0
"""Cross entropy per token, in T5X's form: label smoothing and z-loss."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import TokenLosses
from t5x_lite.kernels.token_losses import smoothed


def hits(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Bool[Array, "b t v"]:
    """True at each target's logit: compared, as a gather cannot cross a split vocabulary."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def choose(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """The logit of each target."""
    return jnp.sum(jnp.where(hits(logits, targets), logits, 0), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], smoothing: float, z_loss: float
) -> TokenLosses:
    """The losses of each token; the objective is cross entropy with the smoothed target, plus
    z_loss * log(Z)^2.

    The entropy of the smoothed target is taken off, so that a perfect model has objective 0
    (t5x/losses.py). Only the objective has a gradient, and it needs the logits alone: softmax minus
    smoothed target, no second [b t v] array is kept.
    """
    return forward(logits, targets, smoothing, z_loss)[0]


def forward(logits, targets, smoothing, z_loss):
    target, other, entropy = smoothed(smoothing, logits.shape[-1])
    # Chosen once: what two sums share, XLA on CPU writes out, and this is as large as the logits.
    log_z, chosen = jax.nn.logsumexp(logits, axis=-1), choose(logits, targets)
    objective = log_z - (target - other) * chosen - entropy
    if other > 0:
        objective -= other * jnp.sum(logits, axis=-1)
    if z_loss > 0:
        objective += z_loss * jnp.square(log_z)
    correct = chosen >= jnp.max(logits, axis=-1)
    return TokenLosses(objective, log_z - chosen, correct), (logits, targets, log_z)


def backward(smoothing, z_loss, kept, gradient):
    logits, targets, log_z = kept
    target, other, _ = smoothed(smoothing, logits.shape[-1])
    probabilities = jnp.exp(logits - log_z[..., None])
    slope = (1 + 2 * z_loss * log_z)[..., None] * probabilities
    slope -= jnp.where(hits(logits, targets), target, other)
    return slope * gradient.objective[..., None], None


cross_entropy.defvjp(forward, backward)
