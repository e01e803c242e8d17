# SPDX-License-Identifier: Apache-2.0
"""Cross entropy per token, in T5X's form: label smoothing and z-loss."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def hits(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Bool[Array, "b t v"]:
    """True at each target's logit: compared, as a gather cannot cross a split vocabulary."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def choose(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """The logit of each target."""
    return jnp.sum(jnp.where(hits(logits, targets), logits, 0), axis=-1)


def smoothed(smoothing: float, vocab: int) -> tuple[float, float, float]:
    """Probability of the target, of every other id, and the entropy of that distribution."""
    target, other = 1.0 - smoothing, smoothing / (vocab - 1)
    entropy = -target * math.log(target)
    if other > 0:
        entropy -= (vocab - 1) * other * math.log(other)
    return target, other, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], smoothing: float, z_loss: float
) -> Float[Array, "b t"]:
    """Loss of each token: cross entropy with the smoothed target, plus z_loss * log(Z)^2.

    The entropy of the smoothed target is taken off, so that a perfect model has loss 0
    (t5x/losses.py). Its gradient needs the logits only: softmax minus smoothed target, no second
    [b t v] array is kept.
    """
    return forward(logits, targets, smoothing, z_loss)[0]


def forward(logits, targets, smoothing, z_loss):
    target, other, entropy = smoothed(smoothing, logits.shape[-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    expected = (target - other) * choose(logits, targets)
    if other > 0:
        expected += other * jnp.sum(logits, axis=-1)
    loss = log_z - expected - entropy
    if z_loss > 0:
        loss += z_loss * jnp.square(log_z)
    return loss, (logits, targets, log_z)


def backward(smoothing, z_loss, kept, gradient):
    logits, targets, log_z = kept
    target, other, _ = smoothed(smoothing, logits.shape[-1])
    probabilities = jnp.exp(logits - log_z[..., None])
    slope = (1 + 2 * z_loss * log_z)[..., None] * probabilities
    slope -= jnp.where(hits(logits, targets), target, other)
    return slope * gradient[..., None], None


cross_entropy.defvjp(forward, backward)


def log_likelihood(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Log-probability of each target, in nats."""
    return choose(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def correct(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Whether the target has the greatest logit."""
    return choose(logits, targets) >= jnp.max(logits, axis=-1)
