# SPDX-License-Identifier: Apache-2.0
"""Train.param_groups on a tree of weights: which train, which begin later, which are frozen.

A weight's name is its path, "decoder.layers.cross_attention.query". Weights that share a group
are one flat dictionary by name, in the order of the names.
"""

import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import config
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.utils.nearest import near_names

# The group of weights that no pattern names.
REST = config.ParamGroup(("*",))


class WeightGroup(NamedTuple):
    """Weights that train alike.

    Attributes:
      key: name of the group in the optimizer's state.
      cfg: config of the group.
      names: paths of its weights, sorted.
    """

    key: str
    cfg: config.ParamGroup
    names: tuple[str, ...]

    @property
    def frozen(self) -> bool:
        """True if the weights never train."""
        return self.cfg.rate == 0


def assign_groups(cfgs: tuple[config.ParamGroup, ...], tree: Any) -> tuple[WeightGroup, ...]:
    """Assigns every weight to the first group that names it, and all others to the rest.

    Args:
      cfgs: Train.param_groups; without any the result is empty.
      tree: a tree of the weights' structure.

    Raises:
      ValueError: a pattern names no weight (the message has near names), a group has none because
        earlier ones have them all, or nothing trains from the first step on.
    """
    if not cfgs:
        return ()
    known = list(flatten_tree(tree))
    check_patterns(cfgs, known)
    owner = {name: group_number(cfgs, name) for name in known}
    groups = []
    for number, cfg in enumerate((*cfgs, REST)):
        names = tuple(sorted(name for name in known if owner[name] == number))
        key = "rest" if cfg is REST else f"part{number}"
        config.require(
            names or cfg is REST,
            f"Train.param_groups[{number}] ({', '.join(cfg.weights)}) has no weights: earlier "
            "groups name them all. Put the group with the narrower patterns first",
        )
        groups += [WeightGroup(key, cfg, names)] if names else []
    config.require(
        any(not group.frozen and group.cfg.begin == 0 for group in groups),
        "Train.param_groups lets nothing train from the first step on: leave some weights out, or "
        "bind ParamGroup.begin = 0 and a ParamGroup.rate above 0 for them",
    )
    return tuple(groups)


def group_number(cfgs: tuple[config.ParamGroup, ...], name: str) -> int:
    """Number of the first group that names the weight; that of the rest follows the last."""
    for number, cfg in enumerate(cfgs):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.weights):
            return number
    return len(cfgs)


def check_patterns(cfgs: tuple[config.ParamGroup, ...], known: list[str]) -> None:
    """Raises ValueError for a pattern that names none of the known weights."""
    for number, cfg in enumerate(cfgs):
        for pattern in cfg.weights:
            if fnmatch.filter(known, pattern):
                continue
            bare = pattern.replace("*", "")
            near = near_names(bare, known, similar=0.3)
            near = near or [name for name in known if bare.strip(".") in name][:3] or known[:3]
            raise ValueError(
                f"Train.param_groups[{number}] names no weight: {pattern!r}. Near: "
                f"{', '.join(near)} (--dry_run lists every weight; * stands for anything)"
            )


class Selection:
    """The weights that have a gradient, taken out of a whole tree and put back.

    Without Train.param_groups that is the tree as it is.

    Attributes:
      groups: all groups.
      trained: the groups that are not frozen.
    """

    def __init__(self, cfgs: tuple[config.ParamGroup, ...], tree: Any):
        self.groups = assign_groups(cfgs, tree)
        self.trained = tuple(group for group in self.groups if not group.frozen)

    def take(self, tree: Any) -> Any:
        """The leaves {name: leaf} that train now or later, of a tree of the weights' structure."""
        if not self.groups:
            return tree
        named = flatten_tree(tree)
        return {name: named[name] for group in self.trained for name in group.names}

    def put(self, tree: Any, taken: Any) -> Any:
        """The tree with the taken leaves in their places."""
        if not self.groups:
            return taken
        leaves = [taken.get(name, leaf) for name, leaf in flatten_tree(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def moving(self, taken: Any, count: jax.Array) -> Any:
        """The taken leaves, 0 for those whose group begins to train after `count` updates."""
        if not self.groups:
            return taken
        return taken | {
            name: jnp.where(count >= group.cfg.begin, taken[name], 0)
            for group in self.trained
            if group.cfg.begin
            for name in group.names
        }


def group_rate(schedule: optax.Schedule, cfg: config.ParamGroup) -> optax.Schedule:
    """Learning rate of a group by its own count of updates, which begins at ParamGroup.begin."""

    def rate(count):
        rise = jnp.minimum(1.0, (count + 1) / cfg.warmup) if cfg.warmup else 1.0
        return cfg.rate * rise * schedule(cfg.begin + count)

    return rate
