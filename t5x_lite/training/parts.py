# SPDX-License-Identifier: Apache-2.0
"""Which weights train, which begin later and which stand still: Train.parts on a tree of weights.

A weight's name is its path, "decoder.layers.cross_attention.query". Weights that share a part are
one flat dictionary by name, in the order of the names.
"""

import difflib
import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import config
from t5x_lite.training import state as states

# What the weights that no part names train as.
REST = config.Part(("*",))


class Group(NamedTuple):
    """Weights that train alike; `key` names them in the optimizer's state."""

    key: str
    part: config.Part
    names: tuple[str, ...]

    @property
    def frozen(self) -> bool:
        return self.part.rate == 0


def groups(parts: tuple[config.Part, ...], tree: Any) -> tuple[Group, ...]:
    """The weights of each part, the first that names them having them, and all others: the rest.

    Empty without parts. `tree` has the structure of the weights.

    Raises:
      ValueError: a pattern names no weight (near names are told), a part has none because earlier
        ones have them all, or nothing trains from the first step on.
    """
    if not parts:
        return ()
    known = states.names(tree)
    check_patterns(parts, known)
    owner = {name: owner_of(parts, name) for name in known}
    made = []
    for number, part in enumerate((*parts, REST)):
        names = tuple(sorted(name for name in known if owner[name] == number))
        key = "rest" if part is REST else f"part{number}"
        config.require(
            names or part is REST,
            f"Train.parts[{number}] ({', '.join(part.weights)}) has no weights: earlier parts name "
            "them all. Put the part with the narrower patterns first",
        )
        made += [Group(key, part, names)] if names else []
    config.require(
        any(not group.frozen and group.part.begin == 0 for group in made),
        "Train.parts lets nothing train from the first step on: leave some weights out, or bind "
        "Part.begin = 0 and a Part.rate above 0 for them",
    )
    return tuple(made)


def owner_of(parts: tuple[config.Part, ...], name: str) -> int:
    """The number of the first part that names the weight; that of the rest follows the last."""
    for number, part in enumerate(parts):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in part.weights):
            return number
    return len(parts)


def check_patterns(parts: tuple[config.Part, ...], known: list[str]) -> None:
    for number, part in enumerate(parts):
        for pattern in part.weights:
            if fnmatch.filter(known, pattern):
                continue
            bare = pattern.replace("*", "")
            near = difflib.get_close_matches(bare, known, n=3, cutoff=0.3)
            near = near or [name for name in known if bare.strip(".") in name][:3] or known[:3]
            raise ValueError(
                f"Train.parts[{number}] names no weight: {pattern!r}. Near: {', '.join(near)} "
                "(--dry_run lists every weight; * stands for anything)"
            )


class Selection:
    """The weights that have a gradient, taken out of a whole tree and put back.

    Without parts that is the tree as it is.
    """

    def __init__(self, parts: tuple[config.Part, ...], tree: Any):
        self.groups = groups(parts, tree)
        self.trained = tuple(group for group in self.groups if not group.frozen)

    def take(self, tree: Any) -> Any:
        """Of a tree with the weights' structure, what trains now or later: {name: leaf}."""
        if not self.groups:
            return tree
        named = dict(zip(states.names(tree), jax.tree.leaves(tree), strict=True))
        return {name: named[name] for group in self.trained for name in group.names}

    def put(self, tree: Any, taken: Any) -> Any:
        """The tree with the taken leaves in their places."""
        if not self.groups:
            return taken
        leaves = [
            taken.get(name, leaf)
            for name, leaf in zip(states.names(tree), jax.tree.leaves(tree), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def moving(self, taken: Any, count: jax.Array) -> Any:
        """What was taken, 0 where its part has not begun after `count` updates."""
        if not self.groups:
            return taken
        return taken | {
            name: jnp.where(count >= group.part.begin, taken[name], 0)
            for group in self.trained
            if group.part.begin
            for name in group.names
        }


def rate(schedule, part: config.Part):
    """The learning rate of a part by its own count of updates, which begins at Part.begin."""

    def own(count):
        rise = jnp.minimum(1.0, (count + 1) / part.warmup) if part.warmup else 1.0
        return part.rate * rise * schedule(part.begin + count)

    return own
