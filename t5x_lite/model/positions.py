# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: T5's relative bias, rotary positions, and windows."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.kernels.relative import Relative


def relative(table: Float[Array, "k n"], stack: config.Stack, both_sides: bool) -> Relative:
    """The bias that a stack's table gives to distances (Raffel et al., 2020, section 2.1)."""
    return Relative(table, stack.max_distance, both_sides)


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


def reach(window: int, form: str) -> tuple[int, int]:
    """How many keys behind and ahead of its own a query sees through a window.

    form is `config.Stack.window_form`. A causal mask on top leaves those behind.
    """
    if form == "halved":
        return (window + 1) // 2 - 1, window // 2
    return (window, window) if form == "within" else (window - 1, window - 1)
