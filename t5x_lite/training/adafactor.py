# SPDX-License-Identifier: Apache-2.0
"""Adafactor as T5 was trained with (Shazeer and Stern, 2018; t5x/adafactor.py).

A weight is seen as a matrix whose rows are its axis of a tower's width and whose columns are all
its other axes joined; the running mean of its squared gradient is kept as one vector of row means
and one of column means. No array is reshaped for it: means are taken over several axes at once, so
weights and statistics may be split over any mesh. The leading axis of stacked layers is a batch of
weights.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import kernels

ROWS = frozenset(("embed", "encoder_embed"))
COLUMNS = frozenset(("vocab", "mlp", "heads", "kv_heads", "head_dim"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the update; the defaults are T5's.

    `epsilon` is added to the squared gradient, `scale_epsilon` is the least size a weight counts
    with, `clip_threshold` the greatest RMS of an update, `decay_rate` the c in 1 - (t + 1) ** -c,
    `min_dim_factored` the least number of rows and of columns for which means are kept apart.
    """

    decay_rate: float = 0.8
    epsilon: float = 1e-30
    scale_epsilon: float = 1e-3
    clip_threshold: float = 1.0
    min_dim_factored: int = 128


class Moment(NamedTuple):
    """Mean squared gradient: rows and columns (axes of length 1 where averaged), or whole."""

    rows: jax.Array | None
    columns: jax.Array | None
    whole: jax.Array | None


class State(NamedTuple):
    count: jax.Array
    moments: Any


class Axes(NamedTuple):
    """Which axes of a weight are its rows, its columns, and all but the layers."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    weight: tuple[int, ...]


def split_axes(names: str) -> Axes:
    """Where rows and columns are in "layers embed heads head_dim"; both empty if not a matrix."""
    axes = names.split()
    weight = tuple(i for i, axis in enumerate(axes) if axis != "layers")
    rows = tuple(i for i in weight if axes[i] in ROWS)
    columns = tuple(i for i in weight if axes[i] in COLUMNS)
    matrix = rows and columns and len(rows) + len(columns) == len(weight)
    return Axes(rows, columns, weight) if matrix else Axes((), (), weight)


def factored(shape: tuple[int, ...], axes: Axes, settings: Settings) -> bool:
    rows, columns = (math.prod(shape[i] for i in part) for part in (axes.rows, axes.columns))
    return bool(axes.rows) and min(rows, columns) >= settings.min_dim_factored


def mean(x, axes):
    return jnp.mean(x, axis=axes, keepdims=True) if axes else x


def empty_moment(weight, names: str, settings: Settings) -> Moment:
    """Zeros of the right shapes, split over the mesh as the weight is."""
    axes = split_axes(names)
    zeros = jnp.zeros_like(weight, dtype=jnp.float32)
    if not factored(weight.shape, axes, settings):
        return Moment(None, None, zeros)
    return Moment(mean(zeros, axes.columns), mean(zeros, axes.rows), None)


def anew(x):
    """x itself; on CPU as another value to the compiler.

    Two sums of one product make XLA on CPU write the product out to share it, which costs ten times
    what computing it twice does: writing all weights takes longer than reading them. For TPU it
    takes both sums in one reading, and with other values writes float32 gradients out for each: of
    a step of T5 1.1 large, 14 GB of HBM in 62.
    """
    return jax.lax.optimization_barrier(x) if kernels.device()[0] == "cpu" else x


def update_moment(gradient, moment: Moment, names: str, decay, settings: Settings) -> Moment:
    axes = split_axes(names)
    blend = lambda old, new: decay * old + (1 - decay) * (new + settings.epsilon)
    if moment.whole is not None:
        return Moment(None, None, blend(moment.whole, jnp.square(gradient)))
    rows = mean(jnp.square(anew(gradient)), axes.columns)
    columns = mean(jnp.square(anew(anew(gradient))), axes.rows)
    return Moment(blend(moment.rows, rows), blend(moment.columns, columns), None)


def precondition(gradient, moment: Moment, names: str):
    """gradient / sqrt(mean square), the mean square rebuilt as rows * columns / mean(rows)."""
    if moment.whole is not None:
        return gradient * jax.lax.rsqrt(moment.whole)
    share = moment.rows / mean(moment.rows, split_axes(names).rows)
    return gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(moment.columns)


def direction(gradient, moment: Moment, weight, names: str, settings: Settings):
    """The step for a learning rate of 1: RMS at most clip_threshold, times the weight's own RMS."""
    axes = split_axes(names).weight
    update = precondition(anew(gradient), jax.tree.map(anew, moment), names)
    rms = jnp.sqrt(mean(jnp.square(update), axes))
    size = jnp.maximum(jnp.sqrt(mean(jnp.square(weight), axes)), settings.scale_epsilon)
    scale = size / jnp.maximum(1.0, rms / settings.clip_threshold)
    return precondition(gradient, moment, names) * scale


def adafactor(
    schedule: optax.Schedule, axes: Any, settings: Settings
) -> optax.GradientTransformation:
    """T5's Adafactor for a tree of weights whose axes are named by the tree `axes`."""
    flat_axes = jax.tree.leaves(axes)

    def init(weights):
        leaves, structure = jax.tree.flatten(weights)
        pairs = zip(leaves, flat_axes, strict=True)
        moments = [empty_moment(w, a, settings) for w, a in pairs]
        return State(jnp.zeros((), jnp.int32), structure.unflatten(moments))

    def update(gradients, state, weights):
        structure = jax.tree.structure(gradients)
        decay = 1.0 - (state.count + 1.0) ** -settings.decay_rate
        rate = schedule(state.count)
        moments, updates = [], []
        for gradient, moment, weight, names in zip(
            jax.tree.leaves(gradients),
            structure.flatten_up_to(state.moments),
            jax.tree.leaves(weights),
            flat_axes,
            strict=True,
        ):
            moments.append(update_moment(gradient, moment, names, decay, settings))
            step = direction(gradient, moments[-1], weight, names, settings)
            updates.append(-rate * step)
        state = State(state.count + 1, structure.unflatten(moments))
        return structure.unflatten(updates), state

    return optax.GradientTransformation(init, update)
