# SPDX-License-Identifier: Apache-2.0
"""Pooling of hidden states into vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite import sharding


def pool_segments(
    x: Float[Array, "b s d"],
    chosen: Bool[Array, "b t s"],
    kind: str,
    query: Float[Array, " d"] | None = None,
) -> Float[Array, "b t d"]:
    """Pools tokens into several float32 vectors per row; zero where no token is chosen.

    Args:
      x: [b s d] hidden states.
      chosen: [b t s] True for the tokens of each vector.
      kind: "mean", "first", "last", or "attention", whose weights are the softmax of the states'
        products with the query.
      query: [d] learned query of attention; None for the others.
    """
    x = x.astype(jnp.float32)
    if query is None:
        weights = token_weights(chosen, kind)
    else:
        scores = jnp.einsum("bsd,d->bs", x, query.astype(jnp.float32)) * x.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores[:, None], axis=-1, where=chosen)
        weights = jnp.where(chosen, weights, 0)
    return jnp.einsum("bts,bsd->btd", sharding.by_rows(weights), x)


def token_weights(exists: Bool[Array, "... s"], kind: str) -> Float[Array, "... s"]:
    """Weights of tokens in their mean, or of the first or last of them; they sum to 1, or to 0
    without tokens."""
    place = jnp.arange(exists.shape[-1])
    if kind == "mean":
        weights = exists
    elif kind == "first":
        weights = exists & (place == jnp.argmax(exists, axis=-1, keepdims=True))
    else:
        weights = exists & (place == jnp.max(jnp.where(exists, place, -1), axis=-1, keepdims=True))
    weights = weights.astype(jnp.float32)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


def normalize(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """L2-normalizes x; a vector shorter than 1e-12 stays near zero."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)
