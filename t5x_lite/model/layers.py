# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes, FSDP's all-gather, projections, norms, dropout, the Mlp."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jaxtyping import Array, Float

from t5x_lite import config, sharding
from t5x_lite.kernels import api as kernels
from t5x_lite.model import adapters, quantization
from t5x_lite.model.adapter_banks import AdapterBank
from t5x_lite.model.adapters import AdaptedWeight
from t5x_lite.model.mixed_precision import GradientSlot
from t5x_lite.model.quantization import Quantized
from t5x_lite.sharding import spec

ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# Folded into a layer's key for the draw of the rows that skip the layer; dropout splits that key.
LAYER_SKIP = 1 << 31


class FlaxModule(nn.Module):
    """A module of flax whose `apply` returns anything: flax annotates a union with the pair that it
    returns with `mutable` alone."""

    if TYPE_CHECKING:

        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
            """Runs a method of the module.

            Args:
              variables: {"params": weights}.
              *args: arguments of the method.
              **kwargs: method, if it is not `__call__`, and its keyword arguments.
            """


class PartitionedWeight(struct.PyTreeNode, meta.AxisMetadata):
    """A new weight boxed with the names of its axes, as Flax's `Partitioned`; only during init.

    value is the array, axes its space-separated axis names.
    """

    value: Any
    axes: str = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        raise NotImplementedError("Layers are stacked by LayerStack, not by a Flax transformation")

    def remove_axis(self, index, params):
        raise NotImplementedError("Layers are stacked by LayerStack, not by a Flax transformation")


def is_partitioned(leaf: Any) -> bool:
    """Returns True for a boxed weight: the `is_leaf` of trees during initialization."""
    return isinstance(leaf, PartitionedWeight)


def weight(module: nn.Module, name: str, axes: str, std: float | None = None) -> jax.Array:
    """One weight in the dtype of activations, gathered along the axis that FSDP shards.

    A quantized weight is returned unchanged; `project` handles it.

    Args:
      module: the module that owns the weight.
      name: its name in the module's params.
      axes: axis names, as in `param`.
      std: standard deviation of the initialization, as in `param`.
    """
    value = param(module, name, axes, std)
    return value if isinstance(value, Quantized) else all_gather(value, axes.replace("->", ""))


def param(module: nn.Module, name: str, axes: str, std: float | None = None) -> jax.Array:
    """One weight in the dtype of activations, sharded as it is stored.

    Args:
      module: the module that owns the weight; its `sizes` has the size of every axis.
      name: the weight's name in the module's params.
      axes: axis names, the fan-in left of an arrow: "embed -> heads head_dim". Without an arrow the
        weight is a scale and is initialized to one, or with std 0 a bias, initialized to zero.
      std: standard deviation of the initialization; None for fan-in ** -0.5.
    """
    if module.has_variable("params", name):
        variable = module.get_variable("params", name)
        if isinstance(variable, Quantized):
            return variable
        if isinstance(variable, AdaptedWeight | AdapterBank):
            return variable.read(module.model.dtype)
        if isinstance(variable, GradientSlot):
            return variable.read()
    fan_in, arrow, _ = axes.partition("->")
    names = axes.replace("->", "").split()
    shape = tuple(module.sizes[axis] for axis in names)
    if std is None:
        std = math.prod(module.sizes[axis] for axis in fan_in.split()) ** -0.5
    draw = nn.initializers.normal(std) if arrow or std == 0 else nn.initializers.ones
    # During init the boxed weight, else the array.
    value: Any = module.param(
        name, lambda key: PartitionedWeight(draw(key, shape), " ".join(names))
    )
    return value.astype(module.model.dtype)


def all_gather(value: jax.Array, axes: str) -> jax.Array:
    """Gathers value along `embed` for FSDP; its transpose reduce-scatters the gradient.

    Until the reduce-scatter every device has the gradient of its own tokens. Both collectives are
    explicit: for a reshard libtpu 0.0.52 emits an all-reduce of whole gradients and a slice where
    `data` is sharded too. Over both sides of a slice it does so even now.
    """
    whole, shards = spec(axes.replace("embed", "width")), FsdpSpec.from_array(value)
    if shards is None:
        return jax.reshard(value, whole)
    placed = whole.update(reduced=sharding.token_axes())
    return jax.shard_map(shards.all_gather, out_specs=placed)(shards.keep_local_gradient(value))


class FsdpSpec(NamedTuple):
    """FSDP sharding of a weight: its array axis `axis` is sharded over the mesh axis `over`."""

    axis: int
    over: str

    @classmethod
    def from_array(cls, value: jax.Array) -> "FsdpSpec | None":
        """Sharding of value; None if it is not sharded, as during initialization."""
        over, size = sharding.weight_axis()
        places = jax.typeof(value).sharding.spec.partitions
        return cls(places.index(over), over) if size > 1 and over in places else None

    def keep_local_gradient(self, value: jax.Array) -> jax.Array:
        """Returns value; each device keeps the gradient of its own tokens until the gather."""
        placed = jax.typeof(value).sharding.spec
        return jax.reshard(value, placed.update(reduced=sharding.token_axes() - {self.over}))

    def all_gather(self, value: jax.Array) -> jax.Array:
        """Gathers a device's shard, inside a shard_map.

        Along the first axis: a reduce-scatter along the last one becomes an all-reduce on every
        chip and a slice of it (libtpu 0.0.52).
        """
        moved = jnp.moveaxis(value, self.axis, 0)
        moved = jax.lax.all_gather(moved, self.over, tiled=True, to="reduced")
        return jnp.moveaxis(moved, 0, self.axis)


def project(x: jax.Array, matrix: Any, axes: str) -> jax.Array:
    """Matrix product of the last axes of x with a weight.

    One product of two-dimensional arrays: with the axes left apart, XLA's CPU backward pass of a
    T5 1.1 small takes 12 % longer for the whole step.

    Args:
      x: [b t ...], with the input axes last.
      matrix: weight as `param` returns it, not gathered.
      axes: input and output axes of the weight, such as "heads head_dim -> embed".
    """
    inward, outward = (side.split() for side in axes.split("->"))

    def placed(axes):
        return spec(axes.replace("embed", "width"))

    if isinstance(matrix, AdaptedWeight):
        return project_adapted(x, matrix, axes)
    if isinstance(matrix, AdapterBank):
        return matrix.add_to(project(x, matrix.weight, axes), x)
    if isinstance(matrix, Quantized):
        return quantization.quantized_matmul(x, matrix, placed(f"batch length {' '.join(outward)}"))
    inner = math.prod(matrix.shape[: len(inward)])
    # Flattened before the gather: a reshape between a product and its reduce-scatter makes XLA
    # all-reduce the whole gradient on every device (libtpu 0.0.52).
    square_axes = f"{inward[0]} {outward[0]}"
    kept = jax.typeof(matrix).sharding.spec.partitions
    kept = jax.sharding.PartitionSpec(kept[0], kept[len(inward)])
    square = all_gather(jnp.reshape(matrix, (inner, -1), out_sharding=kept), square_axes)
    # Rows that are sharded along their length are not merged with the batch axis.
    rows = "batch" if spec("length") == spec("whole") else "batch length"
    many = x.shape[:2] if rows == "batch length" else (-1,)
    flat = jnp.reshape(x, (*many, inner), out_sharding=placed(f"{rows} {inward[0]}"))
    single = flat.dtype == jnp.bfloat16 and flat.shape[:-1] == (1,)
    if single:
        # XLA's CPU multiplies a matrix and a vector ten times faster with a second row.
        flat = jnp.concatenate([flat, jnp.zeros_like(flat)])
    y = jnp.einsum("...i,io->...o", flat, square, out_sharding=placed(f"{rows} {outward[0]}"))
    y = y[:1] if single else y
    shape = (*x.shape[:2], *matrix.shape[len(inward) :])
    return jnp.reshape(y, shape, out_sharding=placed(f"batch length {' '.join(outward)}"))


def project_adapted(x: jax.Array, adapted: AdaptedWeight, axes: str) -> jax.Array:
    """Matrix product with a frozen weight and its adapter.

    As in peft, dropout is on what the adapter reads. With DoRA, what it drops passes the frozen
    weight as it would without an adapter: W (x - d) + m (W d + scale d A B) for d = dropout(x).

    Args:
      x: [b t ...], with the input axes last.
      adapted: the weight as `param` returns it.
      axes: its input and output axes, as in `project`.
    """
    inward, outward = (side.strip() for side in axes.split("->"))
    thinned = dropout(x, adapted.dropout, adapted.key)
    dora = adapted.magnitude is not None
    y = project(thinned if dora else x, adapted.weight, axes)
    low = project(thinned, adapted.a, f"{inward} -> rank")
    y = y + adapted.scale * project(low, adapted.b, f"rank -> {outward}")
    if not dora:
        return y
    gathered = dataclasses.replace(
        adapted,
        a=all_gather(adapted.a, f"{inward} rank"),
        b=all_gather(adapted.b, f"rank {outward}"),
        magnitude=all_gather(adapted.magnitude, outward.replace("embed", "norm")),
    )
    if not isinstance(adapted.weight, Quantized):
        gathered = dataclasses.replace(
            gathered, weight=all_gather(adapted.weight, axes.replace("->", ""))
        )
    y = y * adapters.column_scales(gathered, outward, len(inward.split())).astype(y.dtype)
    return y if thinned is x else y + project(x - thinned, adapted.weight, axes)


def project_to_vocabulary(
    hidden: Float[Array, "b t d"], table: jax.Array | Quantized, tied: bool
) -> Float[Array, "b t v"]:
    """Matrix product of hidden states with an embedding or an output head.

    Args:
      hidden: [b t d] hidden states.
      table: [v d] embedding if tied, else [d v] head, as `param` returns it.
      tied: which one it is.
    """
    if isinstance(table, Quantized):
        return project(hidden, table, "embed -> vocab")
    table = all_gather(table, "vocab embed" if tied else "embed vocab")
    if not tied:
        return jnp.einsum("btd,dv->btv", hidden, table)
    if kernels.target_device().platform == "cpu":
        # The table first, as XLA's CPU would otherwise pack all of it anew for a few rows: 8
        # rows of T5-base take 9.7 ms of one core for 17.4, 64 rows 43 for 50 (jaxlib 0.10.2).
        return jnp.moveaxis(jnp.einsum("vd,btd->vbt", table, hidden), 0, 2)
    return jnp.einsum("btd,vd->btv", hidden, table)


def normalizer(module: nn.Module, name: str, axis: str = "norm") -> Callable:
    """Norm of the kind that the module's stack has: a function of x [... d].

    Args:
      module: the module that owns the weights and has a `stack`.
      name: name of the scale in the module's params; a LayerNorm's bias is `name`_bias.
      axis: name of the axis of the weights.
    """
    kind, epsilon = module.stack.norm, module.stack.norm_epsilon
    scale = weight(module, name, axis, 0.0 if kind == "rms_plus_one" else None)
    if kind == "rms":
        return lambda x: rms(x, epsilon).astype(x.dtype) * scale
    if kind == "rms_plus_one":
        # In float32 to the end, as Gemma does it: 1 + w has few bits left in bfloat16.
        return lambda x: (rms(x, epsilon) * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    bias = weight(module, f"{name}_bias", axis, 0.0)
    return lambda x: layer_norm(x, epsilon).astype(x.dtype) * scale + bias


def input_normalizer(module: nn.Module) -> Callable:
    """Norm of what a sublayer reads; the identity in a post-norm stack, whose layers own norms."""
    return normalizer(module, "norm") if module.stack.norm_order == "pre" else identity


def normalize(x: Float[Array, "... d"], stack: config.Stack) -> Float[Array, "... d"]:
    """x with a norm without weights, of the kind that the stack has."""
    norm = layer_norm if stack.norm == "layer" else rms
    return norm(x, stack.norm_epsilon).astype(x.dtype)


def normalize_heads(x: Float[Array, "b t n h"], stack: config.Stack) -> Float[Array, "b t n h"]:
    """x with a norm without weights over all heads together, of the kind that the stack has."""
    wide = x.astype(jnp.float32)
    if stack.norm == "layer":
        wide = wide - jnp.mean(wide, axis=(-2, -1), keepdims=True)
    square = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
    return (wide * jax.lax.rsqrt(square + stack.norm_epsilon)).astype(x.dtype)


def identity(x: jax.Array) -> jax.Array:
    """Returns x."""
    return x


def rms(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """x over its root mean square (Zhang and Sennrich, 2019), in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)


def layer_norm(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """x with mean 0 and variance 1 (Ba et al., 2016), in float32."""
    wide = x.astype(jnp.float32)
    return rms(wide - jnp.mean(wide, axis=-1, keepdims=True), epsilon)


def dropout(x: Float[Array, "b t ..."], rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al., 2014) with one mask per row, shared by its tokens, as in T5X.

    A mask per row costs nothing to draw.

    Args:
      x: [b t ...] activations.
      rate: probability of zeroing a feature; the others are scaled by 1 / (1 - rate).
      key: random key; None for no dropout.
    """
    if key is None or rate == 0:
        return x
    shape = (x.shape[0], 1, *x.shape[2:])
    rows, _, *features = jax.typeof(x).sharding.spec.partitions
    placed = jax.sharding.PartitionSpec(rows, None, *features)
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=placed)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def draw_skips(x, rate, key):
    """Draws the rows [b 1 1] of x that skip a layer.

    Args:
      x: [b t d] hidden states, for their number of rows and their placement.
      rate: probability of a skip.
      key: the layer's key; the draw is independent of the dropout in the layer.
    """
    key = jax.random.fold_in(key, LAYER_SKIP)
    placed = jax.typeof(x).sharding
    return jax.random.bernoulli(key, rate, (x.shape[0], 1, 1), out_sharding=placed)


def split(key: jax.Array | None, count: int) -> list:
    """Splits key into count keys; None into as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Mlp(nn.Module):
    """Feed-forward layer, gated (Shazeer, 2020) if the stack says so.

    model is the architecture of the whole model, stack that of the stack it belongs to.
    """

    model: config.Model
    stack: config.Stack

    @property
    def sizes(self):
        return {"embed": self.stack.embed, "mlp": self.stack.mlp, "norm": self.stack.embed}

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], key=None) -> Float[Array, "b t d"]:
        activation = ACTIVATIONS[self.stack.activation]
        x = input_normalizer(self)(x)
        y = activation(self.inward(x, "gate"))
        if self.stack.gated:
            y = y * self.inward(x, "up")
        y = dropout(y, self.model.dropout, key)
        y = project(y, param(self, "down", "mlp -> embed"), "mlp -> embed")
        if self.stack.mlp_bias:
            y = y + weight(self, "down_bias", "norm", 0.0)
        return normalizer(self, "post_norm")(y) if self.stack.post_norms else y

    def inward(self, x, name: str) -> Float[Array, "b t f"]:
        y = project(x, param(self, name, "embed -> mlp"), "embed -> mlp")
        return y + weight(self, f"{name}_bias", "mlp", 0.0) if self.stack.mlp_bias else y
