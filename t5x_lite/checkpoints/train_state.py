# SPDX-License-Identifier: Apache-2.0
"""State of training: the weights and everything else that a step changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.model.quantization import array_bytes


class TrainState(NamedTuple):
    """Everything that training changes: together with the config it decides all that follows.

    Attributes:
      step: number of batches used, int32 [].
      params: weights, float32.
      optimizer: state of the optimizer.
      skipped: number of batches whose gradient or update was not finite, int32 [].
      consecutive: number of those that came last in a row, int32 [].
    """

    step: jax.Array
    params: Any
    optimizer: Any
    skipped: jax.Array
    consecutive: jax.Array


def new_state(params: Any, optimizer: Any) -> TrainState:
    """The state before the first step, to be traced; `optimizer` is an optax transformation."""

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(zero(), params, optimizer.init(params), zero(), zero())


def begin_state(params: Any, optimizer: Any) -> TrainState:
    """The state before the first step, the optimizer's part placed as the weights are."""
    return jax.jit(lambda params: new_state(params, optimizer), donate_argnums=0)(params)


def state_shapes(params: Any, optimizer: Any) -> TrainState:
    """The state as a tree of jax.ShapeDtypeStruct with placements, from that of the weights."""

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        placement = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree.map(place, jax.eval_shape(lambda params: new_state(params, optimizer), params))


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Bytes of the leaves' parts that the fullest device holds."""

    def part_bytes(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        return array_bytes(int(np.prod(shape)), leaf.dtype)

    return sum(map(part_bytes, jax.tree.leaves(tree)))
