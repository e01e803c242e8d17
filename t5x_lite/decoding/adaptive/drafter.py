# SPDX-License-Identifier: Apache-2.0
"""A drafter whose draft length is chosen step by step, its state and its cost model.

b rows    n widths    w nodes of the widest block
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
    Tree,
    VerifyOutput,
)

# CostModel.fixed_width of a drafter that chooses its widths.
ANY_WIDTH = -1


class CostModel(NamedTuple):
    """Weights of an Adaptive: measured latencies, and the weights of its drafter.

    Attributes:
      seconds: [n] float32, seconds of a step at each width.
      plain_seconds: float32, seconds of a step without drafting.
      fixed_width: int32, index of the width that every step has, which is how latencies are
        measured; ANY_WIDTH to choose.
      drafter_weights: the drafter's own weights.
    """

    seconds: Any
    plain_seconds: Any
    fixed_width: Any
    drafter_weights: Any = None


class AdaptiveState(NamedTuple):
    """State of an Adaptive.

    Attributes:
      drafter_state: state of its drafter.
      next_draft: the draft of the next step, if it is made before the width is chosen.
      accepted: number of accepted drafts: first ones, and those after an accepted one. Older steps
        count less.
      drafted: number of drafts that could have been accepted, counted alike.
      width_index: index of the next step's width, or DISABLED.
      spent: cost of all steps up to the next one, in steps of plain decoding.
      resume_step: while drafting is disabled, the step at which it resumes.
    """

    drafter_state: Any
    next_draft: Draft | None
    accepted: Float[Array, "b 2"]
    drafted: Float[Array, "b 2"]
    width_index: Int[Array, ""]
    spent: Float[Array, ""]
    resume_step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A drafter whose blocks have one of several widths: the first nodes of its tree.

    The state of the drafter must not depend on its tree, and dataclasses.replace(drafter, tree=)
    must make it propose less. Its weights are a `CostModel`.

    Attributes:
      drafter: the drafter, with its widest tree.
      widths: rise from 1 to the width of that tree.
      floor: the width that is always drafted, whatever is verified. 1 stops drafting while it does
        not pay; a drafter with a cache of its own, which must keep up, needs 2. With the full width
        (for drafts that cost next to nothing) the draft comes before the choice of the width:
        nothing is verified if there are no drafts, or if drafts have been wrong lately. If even
        drafting costs more than it gains, it is disabled for some steps.
      first: acceptance rate of a first draft that is assumed before any is verified.

    Raises:
      ValueError: widths do not rise from 1 to the width of the drafter's tree.
    """

    drafter: Drafter
    widths: tuple[int, ...] = (1, 4, 8, 16)
    floor: int = 1
    first: float = 0.6

    def __post_init__(self):
        rising = sorted(set(self.widths)) == list(self.widths)
        if not rising or self.widths[:1] != (1,) or self.widths[-1] != self.tree.width:
            raise ValueError(
                f"Adaptive.widths must rise from 1 to the width of the drafter's tree, "
                f"{self.tree.width}; got {self.widths}"
            )

    @property
    def tree(self) -> Tree:
        """The widest tree."""
        return self.drafter.tree

    @property
    def top(self) -> int:
        """Number of most probable tokens that the drafter observes."""
        return self.drafter.top

    @property
    def middle(self) -> int | None:
        """The layer whose input the drafter observes."""
        return getattr(self.drafter, "middle", None)

    @property
    def drafts_ahead(self) -> bool:
        """True if the draft comes before the choice of the width."""
        return self.floor == self.tree.width

    def with_width(self, width: int) -> Drafter:
        """Returns the drafter of the first `width` nodes."""
        return dataclasses.replace(self.drafter, tree=Tree(self.tree.parents[:width]))

    def begin(self, context: DecodeContext) -> AdaptiveState:
        """Returns the drafter's first state, with no drafts counted."""
        zeros = jnp.zeros_like(context.prompts.length, jnp.float32)[:, None] + np.zeros(2)
        counts = zeros.astype(jnp.float32)
        return AdaptiveState(
            drafter_state=self.drafter.begin(inner_context(context)),
            next_draft=None,
            accepted=counts,
            drafted=counts,
            width_index=jnp.int32(0),
            spent=jnp.float32(0),
            resume_step=jnp.int32(0),
        )

    def propose(
        self, context: DecodeContext, drafter_state: AdaptiveState, state: DecodeState
    ) -> tuple[Draft, AdaptiveState]:
        """Proposes the widest block, for a loop that does not choose widths.

        Args:
          context: constants of the request.
          drafter_state: this drafter's state.
          state: state of the loop.
        """
        inner = drafter_state.drafter_state
        draft, inner = self.drafter.propose(inner_context(context), inner, state)
        return draft, drafter_state._replace(drafter_state=inner)

    def observe(
        self,
        context: DecodeContext,
        drafter_state: AdaptiveState,
        state: DecodeState,
        output: VerifyOutput,
    ) -> AdaptiveState:
        """Passes the output on to the drafter.

        Args:
          context: constants of the request.
          drafter_state: this drafter's state.
          state: state of the loop after the commit.
          output: what the model made of the block.
        """
        inner = drafter_state.drafter_state
        inner = self.drafter.observe(inner_context(context), inner, state, output)
        return drafter_state._replace(drafter_state=inner)


def inner_context(context: DecodeContext) -> DecodeContext:
    """Returns the context with the weights of the drafter inside."""
    return context._replace(weights=context.weights.drafter_weights)
