# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA: what every kernel is measured against, and what CPU runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Far below any score, and finite: a row that sees nothing stays a number.
HIDDEN = -1e9


def attend(
    q: Float[Array, "b t k g h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    mask: Bool[Array, " b #t s"],
    bias: Float[Array, "#b k g t s"] | None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention, g query heads to each of k key heads; queries come scaled.

    Scores and softmax are float32. A query that may see nothing gets 0.
    """
    scores = jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    visible = mask[:, None, None]
    scores = jnp.where(visible, scores if bias is None else scores + bias, HIDDEN)
    context = jnp.einsum("bkgts,bksh->btkgh", jax.nn.softmax(scores).astype(v.dtype), v)
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None, None], context, 0)
