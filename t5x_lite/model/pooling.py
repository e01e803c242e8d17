# SPDX-License-Identifier: Apache-2.0
"""One vector for a text from the vectors of its tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite import sharding


def pool(x: Float[Array, "b s d"], exists: Bool[Array, "b s"], kind: str) -> Float[Array, "b d"]:
    """The mean of the tokens that exist, or the first or last of them, in float32; 0 of none."""
    place = jnp.arange(exists.shape[1])
    if kind == "mean":
        share = exists.astype(jnp.float32)
    elif kind == "first":
        share = exists & (place == jnp.argmax(exists, axis=1, keepdims=True))
    else:
        share = exists & (place == jnp.max(jnp.where(exists, place, -1), axis=1, keepdims=True))
    share = share.astype(jnp.float32)
    share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1)
    return jnp.einsum("bs,bsd->bd", sharding.by_rows(share), x.astype(jnp.float32))


def normalized(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """x with Euclidean norm 1; a vector shorter than 1e-12 is left near zero."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)
