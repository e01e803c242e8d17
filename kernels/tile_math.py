# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the kernels share: products in float32, softcap, and the online softmax.

Names are those of FlashAttention-2 (Dao, 2023, algorithm 1): m is the running maximum of a query's
scores, l the running sum of exp(score - m), acc the output before its division by l, and alpha the
factor exp(m_old - m_new) by which l and acc shrink when a new tile raises m.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Lanes of a TPU's vector register.
LANES = 128
# Score of a masked pair: far below any other, and finite, so that a query that attends to nothing
# stays a number.
MASK_VALUE = -1e30


def dot_precision(dtype) -> jax.lax.Precision | None:
    """Returns the precision that keeps all 24 bits of float32 operands, which TPUs would round to
    bfloat16's 8 and GPUs to TF32; None for narrower operands."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot_f32(
    x: jax.Array, y: jax.Array, axes: tuple[int, int], batch: tuple[int, ...] = ()
) -> jax.Array:
    """Returns the product of x and y summed over one axis of each, accumulated in float32.

    Args:
      x: left operand; of float32 operands the product is exact to float32.
      y: right operand.
      axes: the contracted axis of x and that of y.
      batch: axes of both over which products are independent.
    """
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), (batch, batch)),
        precision=dot_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def apply_softcap(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Returns softcap * tanh(scores / softcap), or the scores where softcap is None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


class SoftmaxUpdate(NamedTuple):
    """An online softmax after one more tile of scores.

    Attributes:
      p: exp(scores - m), of the tile's shape; 0 where masked.
      alpha: exp(m_old - m), the factor for what was accumulated before.
      m: the running maximum.
      l: the running sum of p.
    """

    p: jax.Array
    alpha: jax.Array
    m: jax.Array
    l: jax.Array


def update_softmax(
    m: jax.Array, l: jax.Array, scores: jax.Array, visible: jax.Array | None = None, axis: int = -1
) -> SoftmaxUpdate:
    """Takes one more tile of scores into an online softmax (FlashAttention-2, algorithm 1).

    Args:
      m: running maximum, float32: without the keys' axis, or with one of any length, the same all
        along it.
      l: running sum, shaped like m.
      scores: float32 scores of the tile, MASK_VALUE (or -inf) where masked.
      visible: like scores, True where a query attends to a key. Without it a query that attends to
        nothing so far has m = MASK_VALUE and wrong p and l, until alpha = 0 takes them out again.
      axis: the keys' axis of scores.
    """
    keepdims = m.ndim == scores.ndim
    m_new = jnp.maximum(m, jnp.max(scores, axis=axis, keepdims=keepdims))
    shift = m_new if keepdims else jnp.expand_dims(m_new, axis)
    if shift.shape[axis] > 1:
        shift = jax.lax.slice_in_dim(shift, 0, 1, axis=axis)
    p = jnp.exp(scores - shift)
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    alpha = jnp.exp(m - m_new)
    return SoftmaxUpdate(p, alpha, m_new, alpha * l + jnp.sum(p, axis=axis, keepdims=keepdims))


def finish_softmax(m: jax.Array, l: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the divisor of acc, and log(Z) of every query; of fully masked ones (l = 0) these are
    1 and MASK_VALUE."""
    fully_masked = l == 0
    divisor = jnp.where(fully_masked, 1.0, l)
    return divisor, jnp.where(fully_masked, MASK_VALUE, m + jnp.log(divisor))
