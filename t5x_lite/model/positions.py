# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: T5's relative bias, rotary positions, and windows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.sharding import spec


def relative_bucket(distance: Int[Array, "..."], stack: config.Stack, both_sides: bool):
    """The bucket of key index minus query index (Raffel et al., 2020, section 2.1).

    Near distances have a bucket each, far ones share logarithmic ones; with both_sides half of the
    buckets are for keys after the query.
    """
    buckets, side = stack.buckets, 0
    if both_sides:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
    reach = jnp.abs(distance) if both_sides else jnp.maximum(-distance, 0)
    near = buckets // 2
    log_reach = jnp.log(jnp.maximum(reach, 1) / near) / math.log(stack.max_distance / near)
    far = near + (log_reach * (buckets - near)).astype(jnp.int32)
    return side + jnp.where(reach < near, reach, jnp.minimum(far, buckets - 1))


def relative_bias(
    table: Float[Array, "k n"], stack: config.Stack, both_sides: bool, length: int
) -> Float[Array, "n t t"]:
    """The bias of every pair of a row, by index: it stays right inside packed segments.

    One value per head and distance, laid along the diagonals by reshaping: a gather of every pair
    costs more, and its gradient is a scatter.
    """
    size = 2 * length  # distances wrap around modulo size without meeting
    distance = jnp.arange(size)
    distance = jnp.where(distance < length, distance, distance - size)
    nearness = jax.nn.one_hot(relative_bucket(distance, stack, both_sides), stack.buckets)
    by_distance = jnp.einsum("dk,kn->nd", nearness, table.astype(jnp.float32))
    # Row i of [t, size - 1] starts i places later modulo size, so column j is distance j - i.
    rows = jnp.broadcast_to(by_distance[:, None, :], (table.shape[1], length, size))
    rows = rows.reshape(-1, length * size)[:, : length * (size - 1)]
    return rows.reshape(-1, length, size - 1)[:, :, :length]


def relative_bias_of_blocks(
    table: Float[Array, "k n"],
    stack: config.Stack,
    query_positions: Int[Array, "b w"],
    key_positions: Int[Array, "#b s"],
) -> Float[Array, "b n w s"]:
    """The causal bias of a block of queries against the slots of a cache, row by row."""
    distance = key_positions[:, None, :] - query_positions[:, :, None]
    bucket = relative_bucket(distance, stack, both_sides=False)
    placed = spec("batch length length heads")
    bias = table.astype(jnp.float32).at[bucket].get(out_sharding=placed)
    return jnp.moveaxis(bias, -1, 1)


def frequencies(stack: config.Stack, sliding: bool) -> np.ndarray:
    """Radians per position [h/2] of a layer: base^(-2j/h), stretched as `rotary_scaling` says."""
    own = sliding and stack.sliding_rotary_base is not None
    base = np.float32(stack.sliding_rotary_base if own else stack.rotary_base)
    exponent = np.arange(0, stack.head_dim, 2, dtype=np.float32) / np.float32(stack.head_dim)
    frequency = (1 / base**exponent).astype(np.float32)
    scaling = stack.rotary_scaling
    if scaling is None or own:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    # Llama 3.1: turns within the original length decide how much of a frequency is divided.
    turns = scaling.original * frequency / (2 * np.pi)
    whole = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (whole * frequency + (1 - whole) * frequency / scaling.factor).astype(np.float32)


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], frequency: Float[Array, " h/2"]
) -> Float[Array, "b t n h"]:
    """x turned by its position: halves (x1, x2) by angles position * frequency (Su et al., 2021).

    The halves are those of GPT-NeoX and Llama checkpoints, not interleaved pairs.
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([x1 * cosine - x2 * sine, x2 * cosine + x1 * sine], axis=-1)
    return turned.astype(x.dtype)


def within(
    distance: Int[Array, "b t s"], window: Int[Array, ""] | int, form: str
) -> Bool[Array, "b t s"]:
    """Which keys a window shows; distance is query position minus key position.

    form is `config.Stack.window_form`. A causal mask on top leaves distances from 0 on.
    """
    if form == "halved":
        return (distance < (window + 1) // 2) & (-distance < window // 2 + 1)
    return jnp.abs(distance) < window + (form == "within")
