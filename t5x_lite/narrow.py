# SPDX-License-Identifier: Apache-2.0
"""Weights that are kept in float32 and read, layer by layer, in the dtype of activations.

A gradient has the dtype of what it is asked for, and is float32 for a float32 weight: the numbers
are those of bfloat16 (but for a weight that is read twice, whose sum is rounded here), in twice the
memory. Asked for a bfloat16 copy of the weights it has their dtype, but then the copy is there from
the first layer to the last. So it is asked for a slot beside the weight, whose value nobody reads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from t5x_lite import sharding

# Of a TPU's registers: an array whose last axis is no multiple of them is padded in memory.
LANES = 128


@jax.custom_vjp
def read(weight: jax.Array, slot: jax.Array) -> jax.Array:
    """weight in the dtype of slot, which alone has the gradient; rounded as a cast rounds.

    Rounded first and cast then: a cast alone libtpu 0.0.52 takes out of the loop over layers, even
    through a barrier, and makes the copy that the slot is to save.
    """
    bits = jnp.finfo(slot.dtype)
    return jax.lax.reduce_precision(weight, bits.nexp, bits.nmant).astype(slot.dtype)


def read_forward(weight, slot):
    return read(weight, slot), None


def read_backward(_, slope):
    return None, slope


read.defvjp(read_forward, read_backward)


def by_rows(slot: jax.Array) -> jax.Array:
    """slot, and so its gradient, kept row by row in memory, where rows fill the lanes of a TPU.

    Left to itself libtpu 0.0.52 stacks the gradients of an Mlp column by column, and the optimizer
    writes all of them out again in the order of the weights: 4.7 GB of HBM in a step of T5 1.1
    large. Heads of 64 would take twice their memory row by row; their weights are not kept so. Nor
    are rows that FSDP splits: the reduce-scatter of their gradients asks for columns.
    """
    over, size = sharding.weight_axis()
    split = size > 1 and jax.typeof(slot).sharding.spec.partitions[-1] == over
    if split or slot.shape[-1] % LANES:
        return slot
    return with_layout_constraint(slot, Layout(tuple(range(slot.ndim))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slotted:
    """A weight and its slot, of one shape."""

    weight: Any
    slot: Any

    def read(self) -> jax.Array:
        return read(self.weight, by_rows(self.slot))


def slots(weights: Any, dtype: str) -> Any:
    """What to ask a gradient in dtype for: a slot of zeros for each weight, itself if it is in
    dtype."""
    own = lambda weight: weight if weight.dtype == dtype else jnp.zeros_like(weight, dtype)
    return jax.tree.map(own, weights)


def joined(weights: Any, slots: Any) -> Any:
    """The weights as the model reads them, each with its slot."""
    join = lambda weight, slot: slot if slot.dtype == weight.dtype else Slotted(weight, slot)
    return jax.tree.map(join, weights, slots)
