# SPDX-License-Identifier: Apache-2.0
"""KL(teacher || student) per target token, of full distributions or of the teacher's top k ids."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.sharding import spec
from t5x_lite.training.losses.cross_entropy import TokenLosses


class DistillationTerms(NamedTuple):
    """Divergence from the teacher.

    Attributes:
      divergence: [b t] KL in nats, at the temperature.
      known: [b t], true where the teacher has a distribution.
    """

    divergence: Float[Array, "b t"]
    known: Bool[Array, "b t"]


def mixed_objective(
    losses: TokenLosses, terms: DistillationTerms, cfg: config.Distillation
) -> Float[Array, "b t"]:
    """(1 - weight) * objective + weight * temperature^2 * divergence (Hinton et al., 2015,
    section 2); the objective alone where the teacher has no distribution.

    Args:
      losses: losses of the targets.
      terms: divergence from the teacher.
      cfg: weight and temperature.
    """
    weight = jnp.where(terms.known, cfg.weight, 0.0)
    return (1 - weight) * losses.objective + weight * cfg.temperature**2 * terms.divergence


def full_divergence(
    logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"], temperature: float
):
    """KL [b t] over the teacher's ids, which are the first of the student's.

    Args:
      logits: [b t v] float32, the student's.
      teacher: [b t v'] float32 logits, v' <= v.
      temperature: divides both.
    """
    widths = ((0, 0), (0, 0), (0, logits.shape[-1] - teacher.shape[-1]))
    padded = jnp.pad(teacher, widths, constant_values=-jnp.inf)
    return kl(logits, jax.reshard(padded, jax.typeof(logits).sharding.spec), temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kl(logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"], temperature: float):
    """KL [b t] of softmax(teacher / T) from softmax(logits / T); ids of teacher -inf count as 0.

    Only the logits have a gradient, (q - p) / T, which needs no more than both arrays.

    Args:
      logits: [b t v] float32, the student's.
      teacher: [b t v] float32 logits.
      temperature: T.
    """
    return kl_forward(logits, teacher, temperature)[0]


def kl_forward(logits, teacher, temperature):
    """Forward pass: KL [b t], and (logits, teacher) for the backward pass.

    Args:
      logits: [b t v] float32, the student's.
      teacher: [b t v] float32 logits.
      temperature: divides both.
    """
    log_q = jax.nn.log_softmax(logits / temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher / temperature, axis=-1)
    terms = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0)
    return jnp.sum(terms, axis=-1), (logits, teacher)


def kl_backward(temperature, residuals, gradient):
    """Backward pass: (q - p) / T for the logits.

    Args:
      temperature: T.
      residuals: logits and teacher, of the forward pass.
      gradient: [b t] cotangent.
    """
    q, p = (jax.nn.softmax(each / temperature, axis=-1) for each in residuals)
    return (q - p) / temperature * gradient[..., None], None


kl.defvjp(kl_forward, kl_backward)


def top_k_log_probabilities(teacher: Float[Array, "b t v"], count: int, temperature: float):
    """The teacher's most probable ids [b t k], and log-probabilities [b t k + 1] at the
    temperature, the last of these that of all other ids together.

    Args:
      teacher: [b t v] float32 logits.
      count: k.
      temperature: divides the logits.
    """
    scaled = jax.reshard(teacher, spec("batch length whole")) / temperature
    top, ids = jax.lax.top_k(scaled, count)
    rest = jax.nn.logsumexp(mask_ids(scaled, ids), axis=-1, keepdims=True)
    log_z = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    return ids, jnp.concatenate([top, rest], axis=-1) - log_z


def set_at_ids(x: Float[Array, "b t v"], ids: Int[Array, "b t k"], values) -> Float[Array, "b t v"]:
    """Sets values at ids, token by token.

    Args:
      x: [b t v].
      ids: [b t k].
      values: [b t k].
    """
    set_by_token = jax.vmap(jax.vmap(lambda row, at, new: row.at[at].set(new)))
    return set_by_token(
        *(jax.reshard(each, spec("batch length whole")) for each in (x, ids, values))
    )


def mask_ids(x: Float[Array, "b t v"], ids: Int[Array, "b t k"]) -> Float[Array, "b t v"]:
    """x with -inf at ids: a small rest is summed over the other ids themselves, as a difference
    from 1 would lose its digits."""
    return set_at_ids(
        x, ids, jnp.full(ids.shape, -jnp.inf, x.dtype, out_sharding=spec("batch length whole"))
    )


def top_k_divergence(logits: Float[Array, "b t v"], ids, log_probabilities, temperature: float):
    """KL [b t] where all ids but the teacher's top k count as one class; equals `full_divergence`
    if there are no other ids.

    Never more than the divergence of the full distributions (data processing inequality).

    Args:
      logits: [b t v] float32, the student's.
      ids: [b t k], the teacher's top k.
      log_probabilities: [b t k + 1], the teacher's, the last that of all other ids.
      temperature: divides the logits.
    """
    gathered = jax.reshard(logits, spec("batch length whole"))
    return top_k_kl(gathered, ids, log_probabilities, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def top_k_kl(logits, ids, log_probabilities, temperature: float):
    """KL [b t] of k ids and one class for all others.

    Args:
      logits: [b t v] float32, vocabulary not split over devices.
      ids: [b t k].
      log_probabilities: [b t k + 1], the teacher's.
      temperature: divides the logits.
    """
    return top_k_kl_forward(logits, ids, log_probabilities, temperature)[0]


def top_k_kl_forward(logits, ids, log_p, temperature):
    """Forward pass: KL [b t], and what the backward pass needs.

    Args:
      logits: [b t v] float32.
      ids: [b t k].
      log_p: [b t k + 1], the teacher's log-probabilities.
      temperature: divides the logits.
    """
    scaled = logits / temperature
    top = jnp.take_along_axis(scaled, ids, axis=-1)
    rest = jax.nn.logsumexp(mask_ids(scaled, ids), axis=-1, keepdims=True)
    log_z = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    log_q = jnp.concatenate([top, rest], axis=-1) - log_z
    terms = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0)
    return jnp.sum(terms, axis=-1), (logits, ids, log_p, log_z, rest)


def top_k_kl_backward(temperature, residuals, gradient):
    """Backward pass: (q - m) / T, where m is the teacher's probability on its ids, and its rest is
    shared out as the student shares it.

    Args:
      temperature: T.
      residuals: logits, ids, log_p, log_z and the log-sum of the other ids.
      gradient: [b t] cotangent.
    """
    logits, ids, log_p, log_z, rest = residuals
    scaled, share = logits / temperature, log_p[..., -1:]
    others = jnp.where(share > -jnp.inf, jnp.exp(scaled - rest + share), 0)
    mixture = set_at_ids(others, ids, jnp.exp(log_p[..., :-1]))
    slope = (jnp.exp(scaled - log_z) - mixture) / temperature
    return slope * gradient[..., None], None, None


top_k_kl.defvjp(top_k_kl_forward, top_k_kl_backward)
