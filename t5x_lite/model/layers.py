# SPDX-License-Identifier: Apache-2.0
"""A weight in one line, normalisation, dropout, and the feed-forward layer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jaxtyping import Array, Float

from t5x_lite import config
from t5x_lite.sharding import spec

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}


class Named(struct.PyTreeNode, meta.AxisMetadata):
    """A new weight together with the names of its axes, until initialisation is over."""

    value: Any
    axes: str = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        raise NotImplementedError("Layers are stacked by Tower, not by a Flax transformation")

    def remove_axis(self, index, params):
        raise NotImplementedError("Layers are stacked by Tower, not by a Flax transformation")


def weight(module: nn.Module, name: str, axes: str, std: float | None = None) -> jax.Array:
    """One weight, in the dtype of activations, whole along the axis that FSDP splits.

    axes names them, left of the arrow the fan-in: "embed -> heads head_dim" is drawn with
    fan-in ** -0.5 unless std is given; without an arrow it is a scale and starts at one, or with
    std 0 a bias and starts at zero. Sizes are the module's `sizes`, placement is the rules'.
    """
    fan_in, arrow, _ = axes.partition("->")
    names = axes.replace("->", "").split()
    shape = tuple(module.sizes[axis] for axis in names)
    if std is None:
        std = math.prod(module.sizes[axis] for axis in fan_in.split()) ** -0.5
    draw = nn.initializers.normal(std) if arrow or std == 0 else nn.initializers.ones
    value = module.param(name, lambda key: Named(draw(key, shape), " ".join(names)))
    return gathered(value.astype(module.model.activations), " ".join(names))


def gathered(value: jax.Array, axes: str) -> jax.Array:
    """value whole along `embed`: where FSDP's all-gather (and its reduce-scatter) happens."""
    return jax.reshard(value, spec(axes.replace("embed", "width")))


def project(x: jax.Array, matrix: jax.Array, axes: str) -> jax.Array:
    """The last axes of x [b t ...] through matrix; axes "heads head_dim -> width" name both sides.

    One product of two-dimensional arrays: with the axes left apart, XLA's CPU backward pass of a
    T5 1.1 small takes 12 % longer for the whole step.
    """
    inward, outward = (side.split() for side in axes.split("->"))
    inner = math.prod(matrix.shape[: len(inward)])
    flat = jnp.reshape(x, (-1, inner), out_sharding=spec(f"batch {inward[0]}"))
    matrix_axes = spec(f"{inward[0]} {outward[0]}")
    square = jnp.reshape(matrix, (inner, -1), out_sharding=matrix_axes)
    y = jnp.einsum("ti,io->to", flat, square, out_sharding=spec(f"batch {outward[0]}"))
    shape = (*x.shape[:2], *matrix.shape[len(inward) :])
    return jnp.reshape(y, shape, out_sharding=spec(f"batch length {' '.join(outward)}"))


def normalizer(module: nn.Module, name: str, axis: str = "norm") -> Callable:
    """The norm that the module's stack has, with weights of its own: a function of x [... d]."""
    kind, epsilon = module.stack.norm, module.stack.norm_epsilon
    scale = weight(module, name, axis, 0.0 if kind == "rms_plus_one" else None)
    if kind == "rms":
        return lambda x: rms(x, epsilon).astype(x.dtype) * scale
    if kind == "rms_plus_one":
        # In float32 to the end, as Gemma does it: 1 + w has few bits left in bfloat16.
        return lambda x: (rms(x, epsilon) * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    bias = weight(module, f"{name}_bias", axis, 0.0)
    return lambda x: layer_norm(x, epsilon).astype(x.dtype) * scale + bias


def rms(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """x over its root mean square (Zhang and Sennrich, 2019), in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)


def layer_norm(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """x with mean 0 and variance 1 (Ba et al., 2016), in float32."""
    wide = x.astype(jnp.float32)
    return rms(wide - jnp.mean(wide, axis=-1, keepdims=True), epsilon)


def dropout(x: Float[Array, "b t d"], rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share of `rate` of each row's features zero and the rest scaled up; x without a key.

    Every token of a row loses the same features, as in T5X: the masks cost nothing to draw.
    """
    if key is None or rate == 0:
        return x
    shape = (x.shape[0], 1, x.shape[2])
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=jax.typeof(x).sharding)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> list:
    """count keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Mlp(nn.Module):
    model: config.Model
    stack: config.Stack

    @property
    def sizes(self):
        return {"embed": self.stack.embed, "mlp": self.stack.mlp, "norm": self.stack.embed}

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], key=None) -> Float[Array, "b t d"]:
        activation = ACTIVATIONS[self.stack.activation]
        x = normalizer(self, "norm")(x)
        y = activation(self.inward(x, "gate"))
        if self.stack.gated:
            y = y * self.inward(x, "up")
        y = dropout(y, self.model.dropout, key)
        y = project(y, weight(self, "down", "mlp -> embed"), "mlp -> width")
        if self.stack.mlp_bias:
            y = y + weight(self, "down_bias", "norm", 0.0)
        return normalizer(self, "post_norm")(y) if self.stack.post_norms else y

    def inward(self, x, name: str) -> Float[Array, "b t f"]:
        y = project(x, weight(self, name, "embed -> mlp"), "width -> mlp")
        return y + weight(self, f"{name}_bias", "mlp", 0.0) if self.stack.mlp_bias else y
