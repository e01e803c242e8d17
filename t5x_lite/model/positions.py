# SPDX-License-Identifier: Apache-2.0
"""Positions: T5's relative bias, rotary (RoPE) and sinusoidal ones, and window sizes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.kernels.relative import RelativePositionBias


def relative(
    table: Float[Array, "k n"], stack: config.Stack, both_sides: bool
) -> RelativePositionBias:
    """T5's relative position bias (Raffel et al., 2020, section 2.1).

    Args:
      table: [buckets heads] bias of each bucket of distances.
      stack: architecture, for the largest distance.
      both_sides: bidirectional buckets, as in an encoder.
    """
    return RelativePositionBias(table, stack.max_distance, both_sides)


def frequencies(stack: config.Stack, sliding: bool) -> np.ndarray:
    """Rotary frequencies [h/2], radians per position: base^(-2j/h), scaled by `rotary_scaling`."""
    sliding_base = sliding and stack.sliding_rotary_base is not None
    base = np.float32(stack.sliding_rotary_base if sliding_base else stack.rotary_base)
    exponent = np.arange(0, stack.head_dim, 2, dtype=np.float32) / np.float32(stack.head_dim)
    frequency = (1 / base**exponent).astype(np.float32)
    scaling = stack.rotary_scaling
    if scaling is None or sliding_base:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    # Llama 3.1: the rotations within the original length decide how much a frequency is divided.
    rotations = scaling.original * frequency / (2 * np.pi)
    kept = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (kept * frequency + (1 - kept) * frequency / scaling.factor).astype(np.float32)


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], frequency: Float[Array, " h/2"]
) -> Float[Array, "b t n h"]:
    """Rotates halves (x1, x2) of x by angles position * frequency (RoPE; Su et al., 2021).

    The halves are those of GPT-NeoX and Llama checkpoints, not interleaved pairs.

    Args:
      x: [b t n h] queries or keys.
      positions: [b t] positions.
      frequency: [h/2] radians per position.
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cosine - x2 * sine, x2 * cosine + x1 * sine], axis=-1)
    return rotated.astype(x.dtype)


def sinusoids(where: Int[Array, "b t"], stack: config.Stack) -> Float[Array, "b t d"]:
    """Sinusoidal position embeddings (Vaswani et al., 2017, section 3.5), in float32.

    All sines, then all cosines, not interleaved. An odd width has one more sine (vaswani), or ends
    with a zero (tensor2tensor).
    """
    half = stack.embed // 2
    if stack.sinusoids == "vaswani":
        exponent, sines = np.arange(stack.embed - half) * 2 / stack.embed, stack.embed - half
    else:
        exponent, sines = np.arange(half) / (half - 1), half
    frequency = (10000.0**-exponent).astype(np.float32)
    place = (where + stack.position_offset).astype(jnp.float32)
    angle = place[:, :, None] * frequency
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle[:, :, :half])], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, stack.embed - half - sines)))


def window_size(window: int, form: str) -> tuple[int, int]:
    """Number of keys to the left and to the right of a query that a window covers.

    form is `config.Stack.window_form`. A causal mask removes those to the right.
    """
    if form == "halved":
        return (window + 1) // 2 - 1, window // 2
    return (window, window) if form == "within" else (window - 1, window - 1)
