# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA: what every kernel is measured against, and what CPU runs."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from t5x_lite.kernels.tiles import device

# Far below any score, and finite: a row that sees nothing stays a number.
HIDDEN = -1e9
# The name, for policies of rematerialisation, of what the backward pass cannot do without.
KEPT = "attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q: Float[Array, "b t k g h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    mask: Bool[Array, " b #t s"],
    bias: Float[Array, "#b k g t s"] | None,
    softcap: float | None = None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention, g query heads to each of k key heads; queries come scaled.

    softcap c turns scores x into c tanh(x / c), before bias and mask. Scores and softmax are
    float32. A query that may see nothing gets 0. The backward pass is that of Dao et al. (2022,
    appendix B.2): from the context and log(Z) of each query, so nothing of size [t s] is kept;
    against XLA's own a step of T5 1.1 small takes 6 % less on CPU.
    """
    return forward(q, k, v, mask, bias, softcap)[0]


def product(equation: str, x, y) -> Float[Array, "..."]:
    """jnp.einsum with a float32 result."""
    if device()[0] == "cpu":
        # XLA's CPU runs not every batched product of bfloat16 into float32 (jaxlib 0.10.2).
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def scores_of(q, k, mask, bias, softcap) -> Float[Array, "b k g t s"]:
    scores = product("btkgh,bksh->bkgts", q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask[:, None, None], scores if bias is None else scores + bias, HIDDEN)


def probabilities(q, k, mask, bias, softcap=None) -> Float[Array, "b k g t s"]:
    """The shares in which `attend` adds up the values, float32: the rows of pairs [t s] sum to 1,
    or to 0 where a query sees nothing."""
    shares = jax.nn.softmax(scores_of(q, k, mask, bias, softcap))
    return jnp.where(jnp.any(mask, axis=-1)[:, None, None, :, None], shares, 0)


def where_seeing(mask, x):
    """x [b t k g h], with 0 for the queries that see nothing."""
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None, None], x, 0)


def forward(q, k, v, mask, bias, softcap):
    scores = scores_of(q, k, mask, bias, softcap)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    shares = jnp.exp(scores - peak)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    context = product("bkgts,bksh->btkgh", shares.astype(v.dtype), v)
    # Divided here, not before the product: h is smaller than s.
    context = (context / jnp.moveaxis(total, 3, 1)).astype(v.dtype)
    context = checkpoint_name(where_seeing(mask, context), KEPT)
    log_z = checkpoint_name(peak + jnp.log(total), KEPT)
    return context, (q, k, v, mask, bias, context, log_z)


def backward(softcap, kept, gradient):
    q, k, v, mask, bias, context, log_z = kept
    gradient = where_seeing(mask, gradient)
    scores = scores_of(q, k, mask, bias, softcap)
    probabilities = jnp.exp(scores - log_z)
    slope = product("btkgh,bksh->bkgts", gradient, v)
    mean = jnp.sum(gradient.astype(jnp.float32) * context, axis=-1, keepdims=True)
    of_scores = probabilities * (slope - jnp.moveaxis(mean, 1, 3))
    of_bias = of_scores if bias is not None else None
    if bias is not None and bias.shape[0] == 1:
        of_bias = jnp.sum(of_scores, axis=0, keepdims=True)
    if softcap is not None:
        # tanh' = 1 - tanh^2; what is hidden has probability 0, whatever its slope.
        capped = scores if bias is None else scores - bias
        of_scores = of_scores * jnp.where(mask[:, None, None], 1 - (capped / softcap) ** 2, 0)
    of_scores = of_scores.astype(q.dtype)
    of_q = jnp.einsum("bkgts,bksh->btkgh", of_scores, k)
    # Where the queries of a row are split over devices, here is the sum over them.
    alone = jax.sharding.get_abstract_mesh().empty
    placed = None if alone else jax.typeof(k).sharding
    of_keys = functools.partial(jnp.einsum, "bkgts,btkgh->bksh", out_sharding=placed)
    of_k, of_v = of_keys(of_scores, q), of_keys(probabilities.astype(v.dtype), gradient)
    if bias is not None and not alone:
        of_bias = jax.reshard(of_bias, jax.typeof(bias).sharding)
    return of_q, of_k, of_v, None, of_bias


attend.defvjp(forward, backward)
