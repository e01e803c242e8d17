# SPDX-License-Identifier: Apache-2.0
"""Several drafters at once: their guesses under one root, verified in one pass."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_lite.decoding.protocol import Draft, Drafter, Setting, State, Tree, Verdict


@dataclass(frozen=True)
class Union:
    """Drafts what each of `drafters` would; of equally long right ways the first one's is taken.

    Beginnings that two guesses share are verified once for each: the shape of a block is the
    program's, and a node saved in one row could not be used for anything else.

    Setting.weights are a tuple with one entry per drafter, or None where none has weights. A
    drafter is shown the whole verdict, numbered so that its own nodes come first and those of the
    others after them; so it must not take a node for its own by the length of the block, and the
    way may lead through nodes that are not its own.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self):
        if not self.drafters:
            raise ValueError("A union of no drafters: it needs at least one")
        if len({of.middle for of in self.drafters if getattr(of, "middle", None)}) > 1:
            raise ValueError("A union of drafters that see different layers: take those of one")

    @property
    def tree(self) -> Tree:
        parents = [-1]
        for drafter in self.drafters:
            before = len(parents) - 1
            parents += [of + before if of else 0 for of in drafter.tree.parents[1:]]
        return Tree(tuple(parents))

    @property
    def top(self) -> int:
        return max(drafter.top for drafter in self.drafters)

    @property
    def middle(self) -> int | None:
        return next((of.middle for of in self.drafters if getattr(of, "middle", None)), None)

    @property
    def firsts(self) -> list[int]:
        """The number of each drafter's first node."""
        widths = [drafter.tree.width - 1 for drafter in self.drafters]
        return [1 + sum(widths[:number]) for number in range(len(widths))]

    def begin(self, setting: Setting) -> tuple[Any, ...]:
        return tuple(of.begin(given) for of, given in self.each(setting))

    def propose(self, setting: Setting, memory: tuple[Any, ...], state: State):
        tokens, memories, cache = [], [], None
        for (drafter, given), own in zip(self.each(setting), memory, strict=True):
            # What a drafter notes in the cache the next one may overwrite, as the block will.
            state = state if cache is None else state._replace(cache=cache)
            draft, own = drafter.propose(given, own, state._replace(memory=own))
            tokens.append(draft.tokens)
            memories.append(own)
            cache = cache if draft.cache is None else draft.cache
        return Draft(jnp.concatenate(tokens, axis=1), cache=cache), tuple(memories)

    def observe(self, setting: Setting, memory: tuple[Any, ...], state: State, verdict: Verdict):
        observed = []
        for number, (drafter, given) in enumerate(self.each(setting)):
            own = memory[number]
            shown = self.shown(verdict, number)
            observed.append(drafter.observe(given, own, state._replace(memory=own), shown))
        return tuple(observed)

    def each(self, setting: Setting) -> list[tuple[Drafter, Setting]]:
        """The drafters, each with the setting that holds its own weights."""
        weights = setting.weights or (None,) * len(self.drafters)
        if len(weights) != len(self.drafters):
            raise ValueError(
                f"A union of {len(self.drafters)} drafters needs weights for each, None where it "
                f"has none; got {len(weights)}"
            )
        return [
            (drafter, setting._replace(weights=own))
            for drafter, own in zip(self.drafters, weights, strict=True)
        ]

    def shown(self, verdict: Verdict, number: int) -> Verdict:
        """verdict with the nodes of one drafter before those of the others."""
        drafter, first = self.drafters[number], self.firsts[number]
        own = range(first, first + drafter.tree.width - 1)
        order = np.array([0, *own, *(i for i in range(1, self.tree.width) if i not in own)])
        moved = lambda x: None if x is None else x[:, order]
        # As a sum and not by index: a table has no place on the mesh, a row has.
        here = verdict.path[..., None] == order
        return verdict._replace(
            block=moved(verdict.block),
            chosen=moved(verdict.chosen),
            hidden=moved(verdict.hidden),
            top=moved(verdict.top)[..., : drafter.top] if drafter.top else None,
            middle=moved(verdict.middle) if getattr(drafter, "middle", None) else None,
            path=jnp.sum(jnp.where(here, np.arange(len(order)), 0), axis=-1),
        )


def union(*drafters: Drafter) -> Union:
    """The union of drafters, those that are unions taken apart."""
    return Union(
        tuple(
            part
            for drafter in drafters
            for part in (drafter.drafters if isinstance(drafter, Union) else (drafter,))
        )
    )


def sources(drafter: Drafter) -> tuple[str, ...]:
    """Who guesses each node of a block, by name; "model" for the root, which is its own choice.

    Result.node indexes it.
    """
    drafters = drafter.drafters if isinstance(drafter, Union) else (drafter,)
    names = [(type(of).__name__.lower(),) * (of.tree.width - 1) for of in drafters]
    return ("model", *(name for each in names for name in each))
