# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA: the reference of every kernel, and what CPUs run.

Axes: b batch, t queries, s keys, k key heads, g query heads per key head, h head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from t5x_lite.kernels.backend import target_device
from t5x_lite.kernels.tile_math import MASK_VALUE, apply_softcap

# Name, for policies of rematerialization, of the arrays that the backward pass of attention needs.
CHECKPOINT_NAME = "attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def reference_attention(
    q: Float[Array, "b t k g h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    mask: Bool[Array, " b #t s"],
    bias: Float[Array, "#b k g t s"] | None,
    softcap: float | None = None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention; scores and softmax are float32, a fully masked query gets 0.

    The backward pass is that of Dao et al. (2022, appendix B.2): from the context and log(Z) of
    each query, so nothing of size [t s] is kept; against XLA's own a step of T5 1.1 small takes
    6 % less on CPU.

    Args:
      q: [b t k g h], queries, already scaled.
      k: [b k s h], keys.
      v: [b k s h], values.
      mask: [b t s] or [b 1 s], True where a query attends to a key.
      bias: [b k g t s] or [1 k g t s], added to scores after the softcap; None without one.
      softcap: c turns scores x into c tanh(x / c); None without one.
    """
    return attention_fwd(q, k, v, mask, bias, softcap)[0]


def einsum_f32(equation: str, x: jax.Array, y: jax.Array) -> Float[Array, "..."]:
    """Returns jnp.einsum(equation, x, y) with a float32 result.

    Args:
      equation: the subscripts.
      x: left operand.
      y: right operand.
    """
    if target_device().platform == "cpu":
        # XLA on CPU lacks some batched products of bfloat16 into float32 (jaxlib 0.10.2).
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def masked_scores(q, k, mask, bias, softcap) -> Float[Array, "b k g t s"]:
    """Returns the scores that the softmax is taken of; parameters are those of attention.

    Args:
      q: queries.
      k: keys.
      mask: True where a query attends to a key.
      bias: added after the softcap, or None.
      softcap: cap of the scores, or None.
    """
    scores = apply_softcap(einsum_f32("btkgh,bksh->bkgts", q, k), softcap)
    scores = scores if bias is None else scores + bias
    return jnp.where(mask[:, None, None], scores, MASK_VALUE)


def softmax_probs(q, k, mask, bias, softcap=None) -> Float[Array, "b k g t s"]:
    """Returns the weights by which attention sums the values, float32.

    The rows of [t s] sum to 1, or to 0 where a query is fully masked.

    Args:
      q: queries.
      k: keys.
      mask: True where a query attends to a key.
      bias: added after the softcap, or None.
      softcap: cap of the scores, or None.
    """
    probs = jax.nn.softmax(masked_scores(q, k, mask, bias, softcap))
    return jnp.where(jnp.any(mask, axis=-1)[:, None, None, :, None], probs, 0)


def zero_fully_masked(mask, x: Float[Array, "b t k g h"]) -> Float[Array, "b t k g h"]:
    """Returns x with 0 for the queries that attend to nothing."""
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None, None], x, 0)


def attention_fwd(q, k, v, mask, bias, softcap):
    """Forward rule of `reference_attention`: the context, and what the backward pass needs.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: True where a query attends to a key.
      bias: added after the softcap, or None.
      softcap: cap of the scores, or None.
    """
    scores = masked_scores(q, k, mask, bias, softcap)
    m = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - m)
    l = jnp.sum(p, axis=-1, keepdims=True)
    context = einsum_f32("bkgts,bksh->btkgh", p.astype(v.dtype), v)
    # Divided here, not before the product: h is smaller than s.
    context = (context / jnp.moveaxis(l, 3, 1)).astype(v.dtype)
    context = checkpoint_name(zero_fully_masked(mask, context), CHECKPOINT_NAME)
    log_z = checkpoint_name(m + jnp.log(l), CHECKPOINT_NAME)
    return context, (q, k, v, mask, bias, context, log_z)


def attention_bwd(softcap, residuals, dout):
    """Backward rule of `reference_attention`, in the names of FlashAttention-2 (Dao, 2023).

    Args:
      softcap: cap of the scores, or None.
      residuals: what `attention_fwd` kept.
      dout: [b t k g h], gradient of the context.
    """
    q, k, v, mask, bias, context, log_z = residuals
    dout = zero_fully_masked(mask, dout)
    scores = masked_scores(q, k, mask, bias, softcap)
    p = jnp.exp(scores - log_z)
    dp = einsum_f32("btkgh,bksh->bkgts", dout, v)
    delta = jnp.sum(dout.astype(jnp.float32) * context, axis=-1, keepdims=True)
    ds = p * (dp - jnp.moveaxis(delta, 1, 3))
    dbias = ds if bias is not None else None
    if bias is not None and bias.shape[0] == 1:
        dbias = jnp.sum(ds, axis=0, keepdims=True)
    if softcap is not None:
        # tanh' = 1 - tanh^2; a masked pair has probability 0, whatever its score.
        capped = scores if bias is None else scores - bias
        ds = ds * jnp.where(mask[:, None, None], 1 - (capped / softcap) ** 2, 0)
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("bkgts,bksh->btkgh", ds, k)
    # Where the queries of a row are split over devices, here is the sum over them.
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    sharding = jax.typeof(k).sharding if on_mesh else None
    sum_queries = functools.partial(jnp.einsum, "bkgts,btkgh->bksh", out_sharding=sharding)
    dk, dv = sum_queries(ds, q), sum_queries(p.astype(v.dtype), dout)
    if bias is not None and on_mesh:
        dbias = jax.reshard(dbias, jax.typeof(bias).sharding)
    return dq, dk, dv, None, dbias


reference_attention.defvjp(attention_fwd, attention_bwd)
