# SPDX-License-Identifier: Apache-2.0
"""KL(teacher || student) per target token, of whole distributions or of the teacher's best ids."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.sharding import spec
from t5x_lite.training.losses import TokenLosses


class Lessons(NamedTuple):
    """Divergence [b t] in nats at the temperature, and where the teacher has a say."""

    divergence: Float[Array, "b t"]
    known: Bool[Array, "b t"]


def mixed(told: TokenLosses, found: Lessons, cfg: config.Distillation) -> Float[Array, "b t"]:
    """(1 - weight) * objective + weight * temperature^2 * divergence (Hinton et al., 2015, 2); the
    objective alone where the teacher has no say."""
    weight = jnp.where(found.known, cfg.weight, 0.0)
    return (1 - weight) * told.objective + weight * cfg.temperature**2 * found.divergence


def whole(logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"], temperature: float):
    """KL [b t] over the teacher's ids, which are the first of the student's."""
    wide = ((0, 0), (0, 0), (0, logits.shape[-1] - teacher.shape[-1]))
    padded = jnp.pad(teacher, wide, constant_values=-jnp.inf)
    return kl(logits, jax.reshard(padded, jax.typeof(logits).sharding.spec), temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kl(logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"], temperature: float):
    """KL [b t] of softmax(teacher / T) from softmax(logits / T); ids of teacher -inf count as 0.

    Only the logits have a gradient, (q - p) / T, and both arrays are all that it needs.
    """
    return kl_forward(logits, teacher, temperature)[0]


def kl_forward(logits, teacher, temperature):
    log_q = jax.nn.log_softmax(logits / temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher / temperature, axis=-1)
    terms = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0)
    return jnp.sum(terms, axis=-1), (logits, teacher)


def kl_backward(temperature, kept, gradient):
    q, p = (jax.nn.softmax(each / temperature, axis=-1) for each in kept)
    return (q - p) / temperature * gradient[..., None], None


kl.defvjp(kl_forward, kl_backward)


def best(teacher: Float[Array, "b t v"], count: int, temperature: float):
    """The `count` most probable ids [b t k], and log-probabilities [b t k + 1] at the temperature,
    the last that of all other ids together."""
    scaled = jax.reshard(teacher, spec("batch length whole")) / temperature
    top, ids = jax.lax.top_k(scaled, count)
    rest = jax.nn.logsumexp(but(scaled, ids), axis=-1, keepdims=True)
    log_z = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    return ids, jnp.concatenate([top, rest], axis=-1) - log_z


def put(x: Float[Array, "b t v"], ids: Int[Array, "b t k"], values) -> Float[Array, "b t v"]:
    """x with values [b t k] at ids."""
    by_token = jax.vmap(jax.vmap(lambda row, at, new: row.at[at].set(new)))
    return by_token(*(jax.reshard(each, spec("batch length whole")) for each in (x, ids, values)))


def but(x: Float[Array, "b t v"], ids: Int[Array, "b t k"]) -> Float[Array, "b t v"]:
    """x with -inf at ids: summed over the others themselves, a small rest keeps its digits."""
    return put(
        x, ids, jnp.full(ids.shape, -jnp.inf, x.dtype, out_sharding=spec("batch length whole"))
    )


def of_best(logits: Float[Array, "b t v"], ids, log_probabilities, temperature: float):
    """KL [b t] where all ids but the teacher's k count as one; that of `whole` if there are none.

    Never more than the divergence of the whole distributions (data processing).
    """
    there = jax.reshard(logits, spec("batch length whole"))
    return best_kl(there, ids, log_probabilities, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def best_kl(logits, ids, log_probabilities, temperature: float):
    """KL [b t] of k ids [b t k] and one class for all others; log_probabilities [b t k + 1]."""
    return best_forward(logits, ids, log_probabilities, temperature)[0]


def best_forward(logits, ids, log_p, temperature):
    scaled = logits / temperature
    chosen = jnp.take_along_axis(scaled, ids, axis=-1)
    rest = jax.nn.logsumexp(but(scaled, ids), axis=-1, keepdims=True)
    log_z = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    log_q = jnp.concatenate([chosen, rest], axis=-1) - log_z
    terms = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0)
    return jnp.sum(terms, axis=-1), (logits, ids, log_p, log_z, rest)


def best_backward(temperature, kept, gradient):
    """(q - m) / T: m is the teacher's on its ids, and its rest shared out as the student does."""
    logits, ids, log_p, log_z, rest = kept
    scaled, share = logits / temperature, log_p[..., -1:]
    others = jnp.where(share > -jnp.inf, jnp.exp(scaled - rest + share), 0)
    wanted = put(others, ids, jnp.exp(log_p[..., :-1]))
    slope = (jnp.exp(scaled - log_z) - wanted) / temperature
    return slope * gradient[..., None], None, None


best_kl.defvjp(best_forward, best_backward)
