# SPDX-License-Identifier: Apache-2.0
"""The update rule by name: T5's Adafactor, or any of optax's optimizers."""

import dataclasses
import difflib
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import config
from t5x_lite.training import adafactor
from t5x_lite.training import parts as training_parts

# They need the loss besides the gradient, which a step does not hand on; the last is deprecated.
LEFT_OUT = ("lbfgs", "polyak_sgd", "optimistic_adam")


def optax_optimizers() -> dict[str, Any]:
    """Every optimizer of optax that is made from a schedule and reads gradients only."""
    found = {}
    for name in dir(optax):
        candidate = getattr(optax, name)
        if not inspect.isfunction(candidate) or name.startswith("_") or name in LEFT_OUT:
            continue
        rate = inspect.signature(candidate).parameters.get("learning_rate")
        if rate is not None and rate.annotation == optax.ScalarOrSchedule:
            found[name] = candidate
    return found


def make(
    cfg: config.Optimizer,
    schedule: optax.Schedule,
    axes: Any,
    parts: tuple[config.Part, ...] = (),
) -> optax.GradientTransformation:
    """Clipping, the named rule and decoupled weight decay, one after the other.

    `axes` is the tree of axis names of the weights. With `parts` (Train.parts) its `init` takes all
    weights, and its `update` the gradients and weights that training_parts.Selection takes.

    Raises:
      ValueError: an unknown name or option, near ones are named; or parts that name no weights.
    """
    if parts:
        return by_parts(cfg, schedule, training_parts.Selection(parts, axes), axes)
    clip = [] if cfg.clip_norm is None else [optax.clip_by_global_norm(cfg.clip_norm)]
    return optax.chain(*clip, *rules(cfg, schedule, axes))


def rules(cfg: config.Optimizer, schedule: optax.Schedule, axes: Any) -> list:
    """The named rule and weight decay."""
    made = [rule(cfg, schedule, axes)]
    if cfg.weight_decay > 0:
        made.append(weight_decay(cfg.weight_decay, schedule, axes))
    return made


class PartsState(NamedTuple):
    """How many updates there were, and the state of every group that trains, by its key."""

    count: jax.Array
    groups: dict[str, Any]


def by_parts(
    cfg: config.Optimizer,
    schedule: optax.Schedule,
    selection: training_parts.Selection,
    axes: Any,
) -> optax.GradientTransformation:
    """The optimizer of every group apart, after clipping by the norm of all that trains.

    A group that has not begun keeps its state, count included, so that it goes on from there as if
    all began then. Frozen weights have no state.
    """
    named, made = selection.take(axes), {}
    for group in selection.trained:
        own = training_parts.rate(schedule, group.part)
        made[group.key] = optax.chain(*rules(cfg, own, of(group, named)))
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)

    def init(weights):
        taken = selection.take(weights)
        groups = {group.key: made[group.key].init(of(group, taken)) for group in selection.trained}
        return PartsState(jnp.zeros((), jnp.int32), groups)

    def update(gradients, state, weights):
        gradients, _ = clip.update(selection.moving(gradients, state.count), clip.init(weights))
        updates, groups = {}, {}
        for group in selection.trained:
            before = state.groups[group.key]
            given = of(group, gradients), before, of(group, weights)
            change, after = made[group.key].update(*given)
            if group.part.begin:
                begun = state.count >= group.part.begin
                # -0.0, as x + -0.0 has the bits of every x, of -0.0 too.
                change = jax.tree.map(lambda u, begun=begun: jnp.where(begun, u, -0.0), change)
                keep = lambda new, old, begun=begun: jnp.where(begun, new, old)
                after = jax.tree.map(keep, after, before)
            updates |= change
            groups[group.key] = after
        return updates, PartsState(state.count + 1, groups)

    return optax.GradientTransformation(init, update)


def of(group: training_parts.Group, taken: dict[str, Any]) -> dict[str, Any]:
    """What was taken of a group alone."""
    return {name: taken[name] for name in group.names}


def rule(cfg: config.Optimizer, schedule: optax.Schedule, axes: Any):
    if cfg.name == "adafactor":
        known = [field.name for field in dataclasses.fields(adafactor.Settings)]
        check_options(cfg, known)
        return adafactor.adafactor(schedule, axes, adafactor.Settings(**cfg.options))
    found = optax_optimizers()
    if cfg.name not in found:
        near = difflib.get_close_matches(cfg.name, found, n=3) or sorted(found)
        raise ValueError(f"Optimizer.name is unknown: {cfg.name!r}. Near: {', '.join(near)}")
    known = list(inspect.signature(found[cfg.name]).parameters)
    known.remove("learning_rate")
    options = dict(cfg.options)
    if "weight_decay" in known:
        # Added below for every rule alike, to matrices only.
        known.remove("weight_decay")
        options["weight_decay"] = 0.0
    check_options(cfg, known)
    return found[cfg.name](learning_rate=schedule, **options)


def check_options(cfg: config.Optimizer, known: list[str]) -> None:
    for option in cfg.options:
        config.require(
            option in known,
            f"Optimizer.options has {option!r}, which {cfg.name} does not take. "
            f"It takes {', '.join(known)}",
        )


def decays(names: str) -> bool:
    """Whether a weight of these axes is a matrix: scales, biases and position tables do not decay.

    Every matrix goes from or to the width of the model; no bias does but as the vector "norm".
    """
    axes = names.split()
    return ("embed" in axes or "encoder_embed" in axes) and "positions" not in axes


class DecayState(NamedTuple):
    count: jax.Array


def weight_decay(strength: float, schedule: optax.Schedule, axes: Any):
    """Decoupled decay (Loshchilov and Hutter, 2019): takes rate * strength * weight off."""

    def init(weights):
        return DecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, weights):
        rate = strength * schedule(state.count)
        shrink = lambda names, u, w: u - rate * w if decays(names) else u
        return jax.tree.map(shrink, axes, updates, weights), DecayState(state.count + 1)

    return optax.GradientTransformation(init, update)
