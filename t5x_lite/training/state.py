# SPDX-License-Identifier: Apache-2.0
"""What a training step reads and gives back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TrainState(NamedTuple):
    """Everything that training changes: together with the config it decides all that follows.

    `step` counts batches seen; `skipped` those whose gradient was not finite, `consecutive` how
    many of them came last in a row.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    skipped: jax.Array
    consecutive: jax.Array


def fresh(params: Any, optimizer: Any) -> TrainState:
    """The state before the first step, to be traced; `optimizer` is an optax transformation."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), params, optimizer.init(params), zero(), zero())


def begin(params: Any, optimizer: Any) -> TrainState:
    """The state before the first step, the optimizer's part placed as the weights are."""
    return jax.jit(lambda params: fresh(params, optimizer), donate_argnums=0)(params)


def shapes(params: Any, optimizer: Any) -> TrainState:
    """The state as a tree of jax.ShapeDtypeStruct with placements, from that of the weights."""

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        placement = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree.map(place, jax.eval_shape(lambda params: fresh(params, optimizer), params))


def names(tree: Any) -> list[str]:
    """Each leaf's path, "encoder.layers.attention.query", in the order of jax.tree.leaves."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def size(tree: Any) -> int:
    """Bytes of all leaves together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size_per_device(tree: Any) -> int:
    """Bytes of the leaves' parts that the fullest device holds."""
    parts = lambda leaf: leaf.sharding.shard_shape(leaf.shape)
    count = lambda leaf: jnp.dtype(leaf.dtype).itemsize * int(np.prod(parts(leaf)))
    return sum(count(leaf) for leaf in jax.tree.leaves(tree))
