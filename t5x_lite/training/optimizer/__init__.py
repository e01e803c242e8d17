# SPDX-License-Identifier: Apache-2.0
"""The update rule by name: T5's Adafactor, or any of optax's optimizers."""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import config
from t5x_lite.training.optimizer import adafactor, param_groups
from t5x_lite.utils.nearest import suggest

# They need the loss besides the gradient, which a step does not hand on; the last is deprecated.
LEFT_OUT = ("lbfgs", "polyak_sgd", "optimistic_adam")


def optax_optimizers() -> dict[str, Any]:
    """Optimizers of optax, by name, that take a schedule and read nothing but gradients."""
    optimizers = {}
    for name in dir(optax):
        candidate = getattr(optax, name)
        if not inspect.isfunction(candidate) or name.startswith("_") or name in LEFT_OUT:
            continue
        rate = inspect.signature(candidate).parameters.get("learning_rate")
        if rate is not None and rate.annotation == optax.ScalarOrSchedule:
            optimizers[name] = candidate
    return optimizers


def make_optimizer(
    cfg: config.Optimizer,
    schedule: optax.Schedule,
    axes: Any,
    groups: tuple[config.ParamGroup, ...] = (),
) -> optax.GradientTransformation:
    """Builds the optimizer: clipping, the named rule and decoupled weight decay, in this order.

    With groups its `init` takes all weights, and its `update` the gradients and weights that
    param_groups.Selection takes.

    Args:
      cfg: config of the optimizer.
      schedule: learning rate by step.
      axes: tree of the weights' axis names, as `model.axes` has it.
      groups: Train.param_groups.

    Raises:
      ValueError: an unknown name or option (with near names), or groups that name no weights.
    """
    if groups:
        return optimizer_by_group(cfg, schedule, param_groups.Selection(groups, axes), axes)
    clip = [] if cfg.clip_norm is None else [optax.clip_by_global_norm(cfg.clip_norm)]
    return optax.chain(*clip, *update_rules(cfg, schedule, axes))


def update_rules(cfg: config.Optimizer, schedule: optax.Schedule, axes: Any) -> list:
    """The named rule, and weight decay if it is above 0.

    Args:
      cfg: config of the optimizer.
      schedule: learning rate by step.
      axes: tree of the weights' axis names.
    """
    rules = [update_rule(cfg, schedule, axes)]
    if cfg.weight_decay > 0:
        rules.append(weight_decay(cfg.weight_decay, schedule, axes))
    return rules


class GroupStates(NamedTuple):
    """Optimizer state of weights in groups: number of updates, and the state of every group that
    trains, by its key."""

    count: jax.Array
    groups: dict[str, Any]


def optimizer_by_group(
    cfg: config.Optimizer,
    schedule: optax.Schedule,
    selection: param_groups.Selection,
    axes: Any,
) -> optax.GradientTransformation:
    """One optimizer per group, after clipping by the norm of all that trains.

    A group that does not train yet keeps its state, count included, so that it continues from
    there as if the whole run began then. Frozen weights have no state.

    Args:
      cfg: config of the optimizer.
      schedule: learning rate by step.
      selection: the groups and their weights.
      axes: tree of the weights' axis names.
    """
    trained_axes, optimizers = selection.take(axes), {}
    for group in selection.trained:
        rate = param_groups.group_rate(schedule, group.cfg)
        rules = update_rules(cfg, rate, leaves_of_group(group, trained_axes))
        optimizers[group.key] = optax.chain(*rules)
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)

    def init(params: Any):
        trained = selection.take(params)
        states = {
            group.key: optimizers[group.key].init(leaves_of_group(group, trained))
            for group in selection.trained
        }
        return GroupStates(jnp.zeros((), jnp.int32), states)

    def update(updates: Any, state: Any, params: Any = None):
        moving: Any = selection.moving(updates, state.count)
        gradients: Any = clip.update(moving, clip.init(params))[0]
        updates, states = {}, {}
        for group in selection.trained:
            before = state.groups[group.key]
            change, after = optimizers[group.key].update(
                leaves_of_group(group, gradients), before, leaves_of_group(group, params)
            )
            if group.cfg.begin:
                begun = state.count >= group.cfg.begin
                change, after = where_begun(begun, change, after, before)
            updates |= change
            states[group.key] = after
        return updates, GroupStates(state.count + 1, states)

    return optax.GradientTransformation(init, update)


def where_begun(begun: jax.Array, change: Any, after: Any, before: Any) -> tuple[Any, Any]:
    """Update and state of a group: no change and the old state before it begins.

    Args:
      begun: bool scalar.
      change: update of the weights, if it has begun.
      after: optimizer state after the update.
      before: optimizer state before it.
    """
    # -0.0, as x + -0.0 has the bits of every x, of -0.0 too.
    change = jax.tree.map(lambda update: jnp.where(begun, update, -0.0), change)
    return change, jax.tree.map(lambda new, old: jnp.where(begun, new, old), after, before)


def leaves_of_group(group: param_groups.WeightGroup, taken: dict[str, Any]) -> dict[str, Any]:
    """The leaves of one group, of those of all groups."""
    return {name: taken[name] for name in group.names}


def update_rule(cfg: config.Optimizer, schedule: optax.Schedule, axes: Any):
    """The rule that Optimizer.name names, without weight decay.

    Args:
      cfg: config of the optimizer.
      schedule: learning rate by step.
      axes: tree of the weights' axis names.

    Raises:
      ValueError: an unknown name or option.
    """
    if cfg.name == "adafactor":
        known = [field.name for field in dataclasses.fields(adafactor.AdafactorSettings)]
        check_optimizer_options(cfg, known)
        options: dict[str, Any] = cfg.options
        return adafactor.adafactor(schedule, axes, adafactor.AdafactorSettings(**options))
    optimizers = optax_optimizers()
    if cfg.name not in optimizers:
        raise ValueError(f"Optimizer.name {cfg.name!r} is unknown: {suggest(cfg.name, optimizers)}")
    known = list(inspect.signature(optimizers[cfg.name]).parameters)
    known.remove("learning_rate")
    options = dict(cfg.options)
    if "weight_decay" in known:
        # Added below for every rule alike, to matrices only.
        known.remove("weight_decay")
        options["weight_decay"] = 0.0
    check_optimizer_options(cfg, known)
    return optimizers[cfg.name](learning_rate=schedule, **options)


def check_optimizer_options(cfg: config.Optimizer, known: list[str]) -> None:
    """Raises ValueError for an option of Optimizer.options that is not known."""
    for option in cfg.options:
        config.require(
            option in known,
            f"Optimizer.options has {option!r}, which {cfg.name} does not take. "
            f"It takes {', '.join(known)}",
        )


def is_decayed(names: str) -> bool:
    """True if a weight of these axes is a matrix: scales, biases and position tables do not decay.

    Every matrix goes from or to the width of the model; no bias does but as the vector "norm".
    """
    axes = names.split()
    return ("embed" in axes or "encoder_embed" in axes) and "positions" not in axes


class WeightDecayState(NamedTuple):
    """Number of updates, an int32 scalar."""

    count: jax.Array


def weight_decay(strength: float, schedule: optax.Schedule, axes: Any):
    """Decoupled decay (Loshchilov and Hutter, 2019): subtracts rate * strength * weight.

    Args:
      strength: Optimizer.weight_decay.
      schedule: learning rate by step.
      axes: tree of the weights' axis names.
    """

    def shrink(names, change, weight, rate):
        return change - rate * weight if is_decayed(names) else change

    def init(params: Any):
        return WeightDecayState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        rate = strength * schedule(state.count)
        decayed = jax.tree.map(functools.partial(shrink, rate=rate), axes, updates, params)
        return decayed, WeightDecayState(state.count + 1)

    return optax.GradientTransformation(init, update)
