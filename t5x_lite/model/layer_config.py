# SPDX-License-Identifier: Apache-2.0
"""Settings of attention that differ by layer: windows and rotations."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.model import positions
from t5x_lite.utils.not_none import not_none

# Window of the full-attention layers in a stack that has sliding-window layers too.
EVERYTHING = 1 << 30


class LayerConfig(NamedTuple):
    """Settings that differ by layer, besides weights: arrays [layers ...], or of one layer.

    A field is None if no layer of the stack has it.

    Attributes:
      window_size: [2] window to the left and to the right, in keys.
      frequency: [h/2] rotary frequencies, radians per position.
      magnitude: [] factor on rotated queries and keys (YaRN).
      stretched: [] True where `raise_base` applies (dynamic scaling).
    """

    window_size: Any
    frequency: Any
    magnitude: Any = None
    stretched: Any = None


def layer_configs(stack: config.Stack, both_sides: bool) -> LayerConfig:
    """Returns the settings of all layers of a stack, stacked along a first axis.

    both_sides is true if the mask that they share is bidirectional.
    """
    causal = stack.causal_layers(both_sides)
    windows = [not_none(stack.window) if sliding else EVERYTHING for sliding in stack.sliding]
    frequency = [positions.frequencies(stack, sliding) for sliding in stack.sliding]
    forms = ["below" if each else stack.window_form for each in causal]
    sizes = [positions.window_size(*each) for each in zip(windows, forms, strict=True)]
    if both_sides:
        # The shared mask is bidirectional: the window of a causal layer ends at the token itself.
        pairs = zip(sizes, causal, strict=True)
        sizes = [(left, 0 if alone else right) for (left, right), alone in pairs]
    window_size = np.array(sizes, np.int32)
    windowed = any(stack.sliding) or (both_sides and any(causal))
    if stack.position_functions.rotated is None:
        return LayerConfig(window_size if windowed else None, None)
    magnitude = np.array([positions.rotary_magnitude(stack, each) for each in stack.sliding])
    dynamic = stack.rotary_scaling is not None and stack.rotary_scaling.kind == "dynamic"
    stretched = [not (each and stack.sliding_rotary_base) for each in stack.sliding]
    return LayerConfig(
        window_size if windowed else None,
        np.stack(frequency),
        magnitude.astype(np.float32) if any(magnitude != 1) else None,
        np.array(stretched) if dynamic else None,
    )


def apply_rope(
    x: Float[Array, "b t n h"],
    where: Int[Array, "b t"] | None,
    layer_config: LayerConfig | None,
    stack: config.Stack,
) -> Float[Array, "b t n h"]:
    """x rotated by its positions (RoPE) in rotary layers, unchanged in others.

    Args:
      x: [b t n h] queries or keys.
      where: [b t] positions; None for no rotation.
      layer_config: settings of the layer.
      stack: architecture, for the length of segments and for scaling by position.
    """
    if where is None or layer_config is None or layer_config.frequency is None:
        return x
    if stack.segment_length is not None:
        where = where // stack.segment_length
    frequency = layer_config.frequency
    if layer_config.stretched is not None:
        raised = positions.raise_base(frequency, where, not_none(stack.rotary_scaling))
        frequency = jnp.where(layer_config.stretched, raised, frequency)
    x = positions.rotate(x, where, frequency)
    if layer_config.magnitude is None:
        return x
    return (x * layer_config.magnitude).astype(x.dtype)
