# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: float32 weights, cast layer by layer, with gradients in the activations' dtype.

Gradients of float32 weights would be float32, in twice the memory, with the numbers of bfloat16
(but for a weight that is used twice, whose sum is rounded here). Differentiating with respect to a
bfloat16 copy of the weights keeps the copy from the first layer to the last. Instead each weight
gets a bfloat16 array of zeros, its slot: the cast returns the weight, and its derivative goes to
the slot. The slot's value is unused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from t5x_lite import sharding
from t5x_lite.kernels import api as kernels

# Lanes of a TPU register: a last axis that is not a multiple of them is padded in memory.
LANES = 128


@jax.custom_vjp
def cast_with_slot(weight: jax.Array, slot: jax.Array) -> jax.Array:
    """Casts weight to the dtype of slot, which receives the whole gradient.

    Rounded before the cast: libtpu 0.0.52 hoists a cast alone out of the loop over layers, even
    through a barrier, and makes the copy that the slot is to save.
    """
    bits = jnp.finfo(slot.dtype)
    return jax.lax.reduce_precision(weight, bits.nexp, bits.nmant).astype(slot.dtype)


def cast_forward(weight, slot):
    """Forward pass of `cast_with_slot`; nothing is saved."""
    return cast_with_slot(weight, slot), None


def cast_backward(_, gradient):
    """Backward pass of `cast_with_slot`: the gradient goes to the slot."""
    return None, gradient


cast_with_slot.defvjp(cast_forward, cast_backward)


def by_rows(slot: jax.Array) -> jax.Array:
    """Constrains slot, and so its gradient, to a row-major layout if rows fill the lanes of a TPU.

    Left to itself, libtpu 0.0.52 stacks the gradients of an Mlp column-major, and the optimizer
    copies all of them into the layout of the weights: 4.7 GB of HBM in a step of T5 1.1 large.
    Heads of 64 would take twice their memory row-major; their weights keep XLA's layout. So do rows
    that FSDP shards: the reduce-scatter of their gradients needs columns.
    """
    over, size = sharding.weight_axis()
    split = size > 1 and jax.typeof(slot).sharding.spec.partitions[-1] == over
    if split or slot.shape[-1] % LANES:
        return slot
    return with_layout_constraint(slot, Layout(tuple(range(slot.ndim))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSlot:
    """A weight and the slot that receives its gradient, of the same shape."""

    weight: Any
    slot: Any

    def read(self) -> jax.Array:
        """Returns the weight in the dtype of its slot."""
        return cast_with_slot(self.weight, by_rows(self.slot))


def gradient_slots(weights: Any, dtype: str) -> Any:
    """Returns a slot of zeros in dtype for each weight; the weight itself if it is in dtype."""

    def slot(weight):
        return weight if weight.dtype == dtype else jnp.zeros_like(weight, dtype)

    return jax.tree.map(slot, weights)


def join_slots(weights: Any, slots: Any) -> Any:
    """Returns the weights as the model takes them, each joined with its slot."""

    def join(weight, slot):
        return slot if slot.dtype == weight.dtype else GradientSlot(weight, slot)

    return jax.tree.map(join, weights, slots)


def recompute(x):
    """Returns x behind an optimization barrier on CPU, so that its consumers do not share a value.

    For two sums of one product XLA on CPU materializes the product, which costs ten times what
    computing it twice does: writing all weights takes longer than reading them. On TPU it fuses
    both sums into one pass, and with a barrier materializes float32 gradients for each: 14 GB of
    HBM in 62 of a step of T5 1.1 large.
    """
    return jax.lax.optimization_barrier(x) if kernels.target_device().platform == "cpu" else x


def weight_dtypes(params: Any) -> list[str]:
    """Names of the dtypes of the weights, those of most numbers first."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    return sorted(sizes, key=sizes.__getitem__, reverse=True)
