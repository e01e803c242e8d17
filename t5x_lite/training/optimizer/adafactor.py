# SPDX-License-Identifier: Apache-2.0
"""Adafactor as T5 was trained with (Shazeer and Stern, 2018; t5x/adafactor.py).

A weight is treated as a matrix whose rows are its axis of a stack's width and whose columns are all
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

from t5x_lite.model.mixed_precision import recompute

ROWS = frozenset(("embed", "encoder_embed"))
COLUMNS = frozenset(("vocab", "mlp", "heads", "kv_heads", "head_dim"))


@dataclasses.dataclass(frozen=True)
class AdafactorSettings:
    """Constants of the update; the defaults are T5's.

    Attributes:
      decay_rate: c in the decay 1 - (t + 1) ** -c of the second moment.
      epsilon: added to the squared gradient.
      scale_epsilon: least RMS that a weight counts with.
      clip_threshold: largest RMS of an update.
      min_dim_factored: least number of rows and of columns of a factored second moment.
    """

    decay_rate: float = 0.8
    epsilon: float = 1e-30
    scale_epsilon: float = 1e-3
    clip_threshold: float = 1.0
    min_dim_factored: int = 128


class Moment(NamedTuple):
    """Second moment, the running mean of the squared gradient: factored, or whole.

    Attributes:
      rows: mean over columns, whose axes have length 1; None if whole.
      columns: mean over rows, whose axes have length 1; None if whole.
      whole: as the weight; None if factored.
    """

    rows: jax.Array | None
    columns: jax.Array | None
    whole: jax.Array | None


class AdafactorState(NamedTuple):
    """Number of updates, and the tree of moments, one Moment per weight."""

    count: jax.Array
    moments: Any


class FactoredAxes(NamedTuple):
    """Numbers of a weight's axes.

    Attributes:
      rows: axes that are rows; empty if the weight is not a matrix.
      columns: axes that are columns; empty if the weight is not a matrix.
      weight: all axes but that of stacked layers.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    weight: tuple[int, ...]


def split_axes(names: str) -> FactoredAxes:
    """Axes by their names, such as "layers embed heads head_dim"."""
    axes = names.split()
    weight = tuple(i for i, axis in enumerate(axes) if axis != "layers")
    rows = tuple(i for i in weight if axes[i] in ROWS)
    columns = tuple(i for i in weight if axes[i] in COLUMNS)
    matrix = rows and columns and len(rows) + len(columns) == len(weight)
    return FactoredAxes(rows, columns, weight) if matrix else FactoredAxes((), (), weight)


def is_factored(shape: tuple[int, ...], axes: FactoredAxes, settings: AdafactorSettings) -> bool:
    """True if the second moment of a weight is factored.

    Args:
      shape: shape of the weight.
      axes: its rows and columns.
      settings: constants of the update.
    """
    rows, columns = (math.prod(shape[i] for i in part) for part in (axes.rows, axes.columns))
    return bool(axes.rows) and min(rows, columns) >= settings.min_dim_factored


def mean_over(x, axes):
    """Mean over axes, which are kept with length 1; x itself without axes."""
    return jnp.mean(x, axis=axes, keepdims=True) if axes else x


def empty_moment(weight, names: str, settings: AdafactorSettings) -> Moment:
    """Zeros for the second moment, split over the mesh as the weight is.

    Args:
      weight: the weight.
      names: names of its axes.
      settings: constants of the update.
    """
    axes = split_axes(names)
    zeros = jnp.zeros_like(weight, dtype=jnp.float32)
    if not is_factored(weight.shape, axes, settings):
        return Moment(None, None, zeros)
    return Moment(mean_over(zeros, axes.columns), mean_over(zeros, axes.rows), None)


def update_moment(
    gradient, moment: Moment, names: str, decay, settings: AdafactorSettings
) -> Moment:
    """Blends the squared gradient into the second moment.

    Args:
      gradient: float32.
      moment: second moment before the step.
      names: names of the weight's axes.
      decay: weight of the old second moment.
      settings: constants of the update.
    """
    axes = split_axes(names)

    def blend(old, new):
        return decay * old + (1 - decay) * (new + settings.epsilon)

    if moment.whole is not None:
        return Moment(None, None, blend(moment.whole, jnp.square(gradient)))
    rows = mean_over(jnp.square(recompute(gradient)), axes.columns)
    columns = mean_over(jnp.square(recompute(recompute(gradient))), axes.rows)
    return Moment(blend(moment.rows, rows), blend(moment.columns, columns), None)


def precondition(gradient, moment: Moment, names: str):
    """Divides by sqrt(second moment), rebuilt as rows * columns / mean(rows).

    Args:
      gradient: float32.
      moment: second moment after the step.
      names: names of the weight's axes.
    """
    if moment.whole is not None:
        return gradient * jax.lax.rsqrt(moment.whole)
    assert moment.rows is not None and moment.columns is not None
    share = moment.rows / mean_over(moment.rows, split_axes(names).rows)
    return gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(moment.columns)


def direction(gradient, moment: Moment, weight, names: str, settings: AdafactorSettings):
    """The step for a learning rate of 1: RMS at most clip_threshold, times the weight's own RMS.

    Args:
      gradient: float32.
      moment: second moment after the step.
      weight: the weight.
      names: names of its axes.
      settings: constants of the update.
    """
    axes = split_axes(names).weight
    update = precondition(recompute(gradient), jax.tree.map(recompute, moment), names)
    rms = jnp.sqrt(mean_over(jnp.square(update), axes))
    size = jnp.maximum(jnp.sqrt(mean_over(jnp.square(weight), axes)), settings.scale_epsilon)
    scale = size / jnp.maximum(1.0, rms / settings.clip_threshold)
    return precondition(gradient, moment, names) * scale


def adafactor(
    schedule: optax.Schedule, axes: Any, settings: AdafactorSettings
) -> optax.GradientTransformation:
    """T5's Adafactor.

    Args:
      schedule: learning rate by step.
      axes: tree of the weights' axis names.
      settings: constants of the update.
    """
    flat_axes = jax.tree.leaves(axes)

    def init(params: Any):
        leaves, structure = jax.tree.flatten(params)
        pairs = zip(leaves, flat_axes, strict=True)
        moments = [empty_moment(w, a, settings) for w, a in pairs]
        return AdafactorState(jnp.zeros((), jnp.int32), structure.unflatten(moments))

    def update(updates: Any, state: Any, params: Any = None):
        structure = jax.tree.structure(updates)
        decay = 1.0 - (state.count + 1.0) ** -settings.decay_rate
        rate = schedule(state.count)
        moments, steps = [], []
        for gradient, moment, weight, names in zip(
            jax.tree.leaves(updates),
            structure.flatten_up_to(state.moments),
            jax.tree.leaves(params),
            flat_axes,
            strict=True,
        ):
            moments.append(update_moment(gradient, moment, names, decay, settings))
            step = direction(gradient, moments[-1], weight, names, settings)
            steps.append(jnp.negative(rate) * step)
        state = AdafactorState(state.count + 1, structure.unflatten(moments))
        return structure.unflatten(steps), state

    return optax.GradientTransformation(init, update)
