# SPDX-License-Identifier: Apache-2.0
"""Pooling of hidden states into sentence embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite import sharding


def pool(x: Float[Array, "b s d"], exists: Bool[Array, "b s"], kind: str) -> Float[Array, "b d"]:
    """Pools tokens into one float32 vector per row; zero for a row without tokens.

    Args:
      x: [b s d] hidden states.
      exists: [b s] True for tokens, False for padding.
      kind: "mean", "first" or "last" of the tokens.
    """
    place = jnp.arange(exists.shape[1])
    if kind == "mean":
        weights = exists.astype(jnp.float32)
    elif kind == "first":
        weights = exists & (place == jnp.argmax(exists, axis=1, keepdims=True))
    else:
        weights = exists & (place == jnp.max(jnp.where(exists, place, -1), axis=1, keepdims=True))
    weights = weights.astype(jnp.float32)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return jnp.einsum("bs,bsd->bd", sharding.by_rows(weights), x.astype(jnp.float32))


def normalize(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """L2-normalizes x; a vector shorter than 1e-12 stays near zero."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)
