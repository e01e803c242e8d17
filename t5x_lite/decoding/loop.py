# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: propose, verify a block in one forward pass, accept, commit, observe.

  b rows    T slots of a row

Slot i of a row holds its token at position i; a prompt comes first. Invariants between steps:
  slots [0, length[b]) of the cache equal a fresh prefill of tokens[b, :length[b]];
  slots from length[b] on are overwritten before they are read;
  tokens[b, length[b]] is root[b], chosen but not yet in the cache;
  a row that is not done grows by at least one token per step;
  a row's text depends on no other row.
Plain decoding is the loop at width 1.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from t5x_lite.decoding import commit, verification
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
    StoppingCriteria,
    Tree,
    VerifyOutput,
    chain,
)


@dataclass(frozen=True)
class Plain:
    """Drafter of plain decoding: no drafts, one token per forward pass.

    Attributes:
      tree: the root alone.
      top: 0.
    """

    tree: Tree = chain(1)
    top: int = 0

    def begin(self, context: DecodeContext) -> None:
        """Returns no state."""

    def propose(self, context: DecodeContext, drafter_state: None, state: DecodeState):
        """Returns an empty draft.

        Args:
          context: constants of the request; unused.
          drafter_state: None.
          state: state of the loop.
        """
        return Draft(state.root[:, None][:, :0]), drafter_state

    def observe(
        self, context: DecodeContext, drafter_state: None, state: DecodeState, output: VerifyOutput
    ) -> None:
        """Returns no state.

        Args:
          context: constants of the request; unused.
          drafter_state: None.
          state: state of the loop; unused.
          output: what the model made of the block; unused.
        """


def run_loop(
    context: DecodeContext, drafter: Drafter, accept: exact.Acceptance, state: DecodeState
) -> DecodeState:
    """Decodes until every row is done, or paused; all on the device.

    Args:
      context: constants of the request.
      drafter: proposes the blocks.
      accept: the rule that decides which drafts are accepted.
      state: state to start from.

    Returns:
      The last state.
    """

    def iterate(state: DecodeState) -> DecodeState:
        draft, drafter_state = drafter.propose(context, state.drafter_state, state)
        output, cache = verification.verify(context, drafter, accept, state, draft)
        state = commit.commit(context, state._replace(cache=cache), drafter.tree, output)
        return state._replace(drafter_state=drafter.observe(context, drafter_state, state, output))

    unfinished = functools.partial(should_continue, context.stopping)
    return jax.lax.while_loop(unfinished, iterate, state)


def should_continue(stopping: StoppingCriteria, state: DecodeState) -> Bool[Array, ""]:
    """Returns True while some row is not done and the step of the pause is not reached."""
    left = jnp.any(~state.done)
    return left if stopping.pause is None else left & (state.steps < stopping.pause)
