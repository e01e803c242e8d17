# SPDX-License-Identifier: Apache-2.0
"""Several drafters at once: their drafts below one root, verified in one pass.

b rows    w nodes of a block
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_lite import sharding
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
    Tree,
    VerifyOutput,
)


@dataclass(frozen=True)
class Union:
    """Drafts what each of several drafters would; of equally long accepted paths the first wins.

    A prefix that two drafts share is verified twice: the shape of a block is fixed in the program,
    and a node saved in one row could not be used for anything else.

    DecodeContext.weights are a tuple with one entry per drafter, or None if none has weights. Each
    drafter observes the whole output, renumbered so that its own nodes come first and those of the
    others after them. So it must not conclude from the length of the block that a node is its own,
    and the accepted path may lead through other drafters' nodes.

    Raises:
      ValueError: there are no drafters, or two that observe different layers.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self):
        if not self.drafters:
            raise ValueError("A union of no drafters: it needs at least one")
        if len(observed_layers(self.drafters)) > 1:
            raise ValueError("A union of drafters that see different layers: take those of one")

    @property
    def tree(self) -> Tree:
        """The drafters' trees below one root."""
        parents = [-1]
        for drafter in self.drafters:
            offset = len(parents) - 1
            parents += [parent + offset if parent else 0 for parent in drafter.tree.parents[1:]]
        return Tree(tuple(parents))

    @property
    def top(self) -> int:
        """Most of the most probable tokens that a drafter observes."""
        return max(drafter.top for drafter in self.drafters)

    @property
    def middle(self) -> int | None:
        """The layer whose input drafters observe."""
        return next(iter(observed_layers(self.drafters)), None)

    @property
    def first_nodes(self) -> list[int]:
        """Number of each drafter's first node."""
        counts = [drafter.tree.width - 1 for drafter in self.drafters]
        return [1 + sum(counts[:number]) for number in range(len(counts))]

    def begin(self, context: DecodeContext) -> tuple[Any, ...]:
        """Returns the first state of each drafter."""
        return tuple(drafter.begin(inner) for drafter, inner in self.with_contexts(context))

    def propose(
        self, context: DecodeContext, drafter_state: tuple[Any, ...], state: DecodeState
    ) -> tuple[Draft, tuple[Any, ...]]:
        """Runs one drafter after the other.

        Args:
          context: constants of the request, with the drafters' weights.
          drafter_state: state of each drafter.
          state: state of the loop.
        """
        tokens, states, cache = [], [], None
        for number, (drafter, drafter_context) in enumerate(self.with_contexts(context)):
            # Drafters may overwrite one another's scratch slots of the cache, as the block will.
            state = state if cache is None else state._replace(cache=cache)
            inner = drafter_state[number]
            draft, inner = drafter.propose(
                drafter_context, inner, state._replace(drafter_state=inner)
            )
            tokens.append(draft.tokens)
            states.append(inner)
            cache = cache if draft.cache is None else draft.cache
        return Draft(jnp.concatenate(sharding.by_rows(tokens), axis=1), cache=cache), tuple(states)

    def observe(
        self,
        context: DecodeContext,
        drafter_state: tuple[Any, ...],
        state: DecodeState,
        output: VerifyOutput,
    ) -> tuple[Any, ...]:
        """Passes the output to each drafter, its own nodes first.

        Args:
          context: constants of the request, with the drafters' weights.
          drafter_state: state of each drafter.
          state: state of the loop after the commit.
          output: what the model made of the block.
        """
        states = []
        for number, (drafter, drafter_context) in enumerate(self.with_contexts(context)):
            inner = drafter_state[number]
            state = state._replace(drafter_state=inner)
            states.append(
                drafter.observe(drafter_context, inner, state, self.renumber_output(output, number))
            )
        return tuple(states)

    def with_contexts(self, context: DecodeContext) -> list[tuple[Drafter, DecodeContext]]:
        """Returns the drafters, each with the context that holds its own weights.

        Raises:
          ValueError: there are not as many weights as drafters.
        """
        weights = context.weights or (None,) * len(self.drafters)
        if len(weights) != len(self.drafters):
            raise ValueError(
                f"A union of {len(self.drafters)} drafters needs weights for each, None where it "
                f"has none; got {len(weights)}"
            )
        return [
            (drafter, context._replace(weights=inner))
            for drafter, inner in zip(self.drafters, weights, strict=True)
        ]

    def renumber_output(self, output: VerifyOutput, number: int) -> VerifyOutput:
        """Returns the output with the nodes of one drafter before those of the others."""
        drafter, first = self.drafters[number], self.first_nodes[number]
        nodes = range(first, first + drafter.tree.width - 1)
        others = (node for node in range(1, self.tree.width) if node not in nodes)
        order = np.array([0, *nodes, *others])

        def reorder(x):
            return None if x is None else x[:, order]

        # As a sum and not by index: a constant table cannot be indexed by rows split over a mesh.
        here = output.path[..., None] == order
        return output._replace(
            block=reorder(output.block),
            chosen=reorder(output.chosen),
            hidden=reorder(output.hidden),
            top=reorder(output.top)[..., : drafter.top] if drafter.top else None,
            middle=reorder(output.middle) if getattr(drafter, "middle", None) else None,
            path=jnp.sum(jnp.where(here, np.arange(len(order)), 0), axis=-1),
        )


def observed_layers(drafters: tuple[Drafter, ...]) -> set[int]:
    """Returns the layers whose inputs the drafters observe."""
    return {layer for drafter in drafters if (layer := getattr(drafter, "middle", None))}


def union(*drafters: Drafter) -> Union:
    """Returns the union of drafters; the drafters of a union among them are taken one by one."""
    parts = []
    for drafter in drafters:
        parts += drafter.drafters if isinstance(drafter, Union) else [drafter]
    return Union(tuple(parts))


def draft_sources(drafter: Drafter) -> tuple[str, ...]:
    """Returns the name of each node's drafter, "model" for the root.

    Result.token_node is an index into it.
    """
    drafters = drafter.drafters if isinstance(drafter, Union) else (drafter,)
    names = ["model"]
    for part in drafters:
        names += [type(part).__name__.lower()] * (part.tree.width - 1)
    return tuple(names)
