# SPDX-License-Identifier: Apache-2.0
"""A weight in one line, normalisation, dropout, and the feed-forward layer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jaxtyping import Array, Float

from t5x_lite import config, quantization, sharding
from t5x_lite.narrow import Slotted
from t5x_lite.quantization import Quantised
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

    What `stored` says of axes and std holds. One in few bits is given as it is: `project` knows it.
    """
    value = stored(module, name, axes, std)
    return value if isinstance(value, Quantised) else gathered(value, axes.replace("->", ""))


def stored(module: nn.Module, name: str, axes: str, std: float | None = None) -> jax.Array:
    """One weight, in the dtype of activations, split as it is kept.

    axes names them, left of the arrow the fan-in: "embed -> heads head_dim" is drawn with
    fan-in ** -0.5 unless std is given; without an arrow it is a scale and starts at one, or with
    std 0 a bias and starts at zero. Sizes are the module's `sizes`, placement is the rules'.
    """
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Quantised):
            return given
        if isinstance(given, Slotted):
            return given.read()
    fan_in, arrow, _ = axes.partition("->")
    names = axes.replace("->", "").split()
    shape = tuple(module.sizes[axis] for axis in names)
    if std is None:
        std = math.prod(module.sizes[axis] for axis in fan_in.split()) ** -0.5
    draw = nn.initializers.normal(std) if arrow or std == 0 else nn.initializers.ones
    value = module.param(name, lambda key: Named(draw(key, shape), " ".join(names)))
    return value.astype(module.model.activations)


def gathered(value: jax.Array, axes: str) -> jax.Array:
    """value whole along `embed`: FSDP's all-gather, and on the way back the reduce-scatter of its
    gradient, of which every device has its own tokens' share until then.

    Both are said by name: of a reshard libtpu 0.0.52 makes the sum of whole gradients and a slice
    of it where `data` is split too. Over both sides of a slice it does so even now.
    """
    whole, shards = spec(axes.replace("embed", "width")), Shards.of(value)
    if shards is None:
        return jax.reshard(value, whole)
    placed = whole.update(reduced=sharding.token_axes())
    return jax.shard_map(shards.gathered, out_specs=placed)(shards.with_shares(value))


class Shards(NamedTuple):
    """How a weight is split for FSDP: along which of its axes, over which axis of the mesh."""

    axis: int
    over: str

    @classmethod
    def of(cls, value: jax.Array) -> "Shards | None":
        """How value is split; None where it is whole, as a weight is that is being drawn."""
        over, size = sharding.weight_axis()
        places = jax.typeof(value).sharding.spec.partitions
        return cls(places.index(over), over) if size > 1 and over in places else None

    def with_shares(self, value: jax.Array) -> jax.Array:
        """value, each device keeping its own share of the gradient until its gathering's end."""
        placed = jax.typeof(value).sharding.spec
        return jax.reshard(value, placed.update(reduced=sharding.token_axes() - {self.over}))

    def gathered(self, value: jax.Array) -> jax.Array:
        """A device's part made whole, inside a shard_map.

        Along the first axis: a reduce-scatter along the last one becomes a sum of the whole on
        every chip and a slice of it (libtpu 0.0.52).
        """
        turned = jnp.moveaxis(value, self.axis, 0)
        turned = jax.lax.all_gather(turned, self.over, tiled=True, to="reduced")
        return jnp.moveaxis(turned, 0, self.axis)


def project(x: jax.Array, matrix: jax.Array | Quantised, axes: str) -> jax.Array:
    """The last axes of x [b t ...] through matrix as it is `stored`; axes "heads head_dim ->
    embed" name both sides.

    One product of two-dimensional arrays: with the axes left apart, XLA's CPU backward pass of a
    T5 1.1 small takes 12 % longer for the whole step.
    """
    inward, outward = (side.split() for side in axes.split("->"))
    placed = lambda axes: spec(axes.replace("embed", "width"))
    if isinstance(matrix, Quantised):
        return quantization.product(x, matrix, placed(f"batch length {' '.join(outward)}"))
    inner = math.prod(matrix.shape[: len(inward)])
    # Gathered when it is flat: a reshape between a product and its reduce-scatter makes XLA sum
    # the gradient whole on every device (libtpu 0.0.52).
    square_axes = f"{inward[0]} {outward[0]}"
    kept = jax.typeof(matrix).sharding.spec.partitions
    kept = jax.sharding.PartitionSpec(kept[0], kept[len(inward)])
    square = gathered(jnp.reshape(matrix, (inner, -1), out_sharding=kept), square_axes)
    # Rows that are split along their length stay apart.
    rows = "batch" if spec("length") == spec("whole") else "batch length"
    many = x.shape[:2] if rows == "batch length" else (-1,)
    flat = jnp.reshape(x, (*many, inner), out_sharding=placed(f"{rows} {inward[0]}"))
    y = jnp.einsum("...i,io->...o", flat, square, out_sharding=placed(f"{rows} {outward[0]}"))
    shape = (*x.shape[:2], *matrix.shape[len(inward) :])
    return jnp.reshape(y, shape, out_sharding=placed(f"batch length {' '.join(outward)}"))


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
    rows, _, features = jax.typeof(x).sharding.spec.partitions
    placed = jax.sharding.PartitionSpec(rows, None, features)
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=placed)
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
        y = project(y, stored(self, "down", "mlp -> embed"), "mlp -> embed")
        if self.stack.mlp_bias:
            y = y + weight(self, "down_bias", "norm", 0.0)
        return normalizer(self, "post_norm")(y) if self.stack.post_norms else y

    def inward(self, x, name: str) -> Float[Array, "b t f"]:
        y = project(x, stored(self, name, "embed -> mlp"), "embed -> mlp")
        return y + weight(self, f"{name}_bias", "mlp", 0.0) if self.stack.mlp_bias else y
