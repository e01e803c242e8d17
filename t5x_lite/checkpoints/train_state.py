# SPDX-License-Identifier: Apache-2.0
"""State of training: the weights and everything else that a step changes."""

from collections.abc import Callable
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
      average: averaged copy of the weights that train, float32; None without Train.average.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    skipped: jax.Array
    consecutive: jax.Array
    average: Any = None


# Takes out of a tree of the weights' structure those that are averaged.
Take = Callable[[Any], Any]


def new_state(params: Any, optimizer: Any, averaged: Take | None = None) -> TrainState:
    """The state before the first step, to be traced.

    Args:
      params: initial weights.
      optimizer: optax transformation.
      averaged: the weights of which an averaged copy is kept; None keeps none.
    """

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    # A copy: a buffer cannot be donated twice.
    average = None if averaged is None else jax.tree.map(jnp.copy, averaged(params))
    return TrainState(zero(), params, optimizer.init(params), zero(), zero(), average)


def begin_state(params: Any, optimizer: Any, averaged: Take | None = None) -> TrainState:
    """The state before the first step, its other parts placed as the weights are.

    Args:
      params: initial weights.
      optimizer: optax transformation.
      averaged: as of `new_state`.
    """
    make = jax.jit(lambda params: new_state(params, optimizer, averaged), donate_argnums=0)
    return make(params)


def state_shapes(params: Any, optimizer: Any, averaged: Take | None = None) -> TrainState:
    """The state as a tree of jax.ShapeDtypeStruct with placements.

    Args:
      params: shapes and placements of the weights.
      optimizer: optax transformation.
      averaged: as of `new_state`.
    """

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        placement = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    shapes = jax.eval_shape(lambda params: new_state(params, optimizer, averaged), params)
    return jax.tree.map(place, shapes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Bytes of the leaves' parts that the fullest device holds."""

    def part_bytes(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        return array_bytes(int(np.prod(shape)), leaf.dtype)

    return sum(map(part_bytes, jax.tree.leaves(tree)))
