# SPDX-License-Identifier: Apache-2.0
"""The decoding loop with a draft length that is chosen before every step.

Drafting has a cost of its own, which for a small model is a good part of a step's. While no step
with a draft is within the budget, steps are plain (`draft_lengths.DISABLED`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import commit, loop, verification
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.adaptive.draft_lengths import (
    DISABLED,
    MAX_DISABLED_STEPS,
    SLACK,
    cost_budget,
    count_accepted,
    relative_costs,
    select_width,
)
from t5x_lite.decoding.adaptive.drafter import (
    ANY_WIDTH,
    Adaptive,
    AdaptiveState,
    inner_context,
)
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, Drafter, Tree, VerifySpec


def run_adaptive_loop(
    context: DecodeContext, adaptive: Adaptive, accept: exact.Acceptance, state: DecodeState
) -> DecodeState:
    """Decodes until every row is done, or paused.

    There is a loop for each width, entered while that width is the best. Loops and not a switch:
    what a loop carries is updated in place.

    The width of the first step is chosen already (`begin_adaptive`), so that the state has the same
    shapes before and after a pause, and one program continues it.

    Args:
      context: constants of the request, with the cost model as weights.
      adaptive: the drafter.
      accept: the acceptance rule.
      state: state to start from, with the width of its first step.

    Returns:
      The last state.
    """
    unfinished = functools.partial(loop.should_continue, context.stopping)

    def run_width(number: int, state: DecodeState) -> DecodeState:
        def is_best(state: DecodeState):
            return unfinished(state) & (state.drafter_state.width_index == number)

        step = functools.partial(adaptive_step, context, adaptive, accept, number)
        return jax.lax.while_loop(is_best, step, state)

    def run_widths(state: DecodeState) -> DecodeState:
        if adaptive.drafts_ahead:
            state = run_plain_steps(context, adaptive, accept, state)
        for number in range(len(adaptive.widths)):
            state = run_width(number, state)
        return state

    # Chosen before the pause, when latencies were perhaps not measured yet.
    fixed, chosen = context.weights.fixed_width, state.drafter_state.width_index
    number = jnp.where(fixed == ANY_WIDTH, chosen, fixed).astype(jnp.int32)
    state = state._replace(drafter_state=state.drafter_state._replace(width_index=number))
    return jax.lax.while_loop(unfinished, run_widths, state)


def run_plain_steps(
    context: DecodeContext, adaptive: Adaptive, accept: exact.Acceptance, state: DecodeState
) -> DecodeState:
    """Runs the steps for which drafting is disabled, if it is.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      accept: the acceptance rule.
      state: state of the loop.

    Returns:
      The state after those steps, with the next width chosen.
    """

    def is_disabled(state: DecodeState):
        disabled = state.drafter_state.width_index == DISABLED
        waiting = disabled & (state.steps < state.drafter_state.resume_step)
        return loop.should_continue(context.stopping, state) & waiting

    step = functools.partial(plain_step, context, adaptive, accept)
    return resume_drafting(context, adaptive, jax.lax.while_loop(is_disabled, step, state))


def resume_drafting(context: DecodeContext, adaptive: Adaptive, state: DecodeState) -> DecodeState:
    """Chooses the next width if drafting was disabled up to this step.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      state: state of the loop.
    """
    disabled = state.drafter_state.width_index == DISABLED
    due = disabled & (state.steps >= state.drafter_state.resume_step)

    def choose(adaptive_state: AdaptiveState) -> AdaptiveState:
        new = choose_next_width(context, adaptive, state._replace(drafter_state=adaptive_state))
        return new.drafter_state

    adaptive_state = jax.lax.cond(due, choose, lambda same: same, state.drafter_state)
    return state._replace(drafter_state=adaptive_state)


def begin_adaptive(context: DecodeContext, adaptive: Adaptive, state: DecodeState) -> DecodeState:
    """Chooses the width of the first step; the steps before it, if any, were plain ones.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      state: state of the loop, with the drafter's first state.
    """
    spent = state.steps.astype(jnp.float32)
    state = state._replace(drafter_state=state.drafter_state._replace(spent=spent))
    return choose_next_width(context, adaptive, state)


def adaptive_step(
    context: DecodeContext,
    adaptive: Adaptive,
    accept: exact.Acceptance,
    number: int,
    state: DecodeState,
) -> DecodeState:
    """Runs one step at a width, and chooses the width of the next.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      accept: the acceptance rule.
      number: index of the width.
      state: state of the loop.

    Returns:
      The state after the step.
    """
    width, adaptive_state = adaptive.widths[number], state.drafter_state
    drafter = adaptive.with_width(width if adaptive.drafts_ahead else max(width, adaptive.floor))
    draft, drafter_state = adaptive_state.next_draft, adaptive_state.drafter_state
    if not adaptive.drafts_ahead:
        draft, drafter_state = propose_tokens(context, drafter, drafter_state, state)
    state, output = verify_and_commit(
        context, adaptive, accept, state, truncate_draft(draft, width)
    )
    drafter_state = drafter.observe(inner_context(context), drafter_state, state, output)
    tree = Tree(adaptive.tree.parents[: draft.tokens.shape[1] + 1])
    adaptive_state = adaptive_state._replace(drafter_state=drafter_state)
    adaptive_state = count_accepted(adaptive_state, tree, draft, output)
    return choose_next_width(context, adaptive, state._replace(drafter_state=adaptive_state))


def plain_step(
    context: DecodeContext, adaptive: Adaptive, accept: exact.Acceptance, state: DecodeState
) -> DecodeState:
    """Runs one step without drafting.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      accept: the acceptance rule.
      state: state of the loop.

    Returns:
      The state after the step.
    """
    empty = Draft(state.root[:, None][:, :0])
    state, output = verify_and_commit(context, adaptive, accept, state, empty)
    adaptive_state = state.drafter_state
    drafter_state = adaptive.with_width(1).observe(
        inner_context(context), adaptive_state.drafter_state, state, output
    )
    return state._replace(drafter_state=adaptive_state._replace(drafter_state=drafter_state))


def verify_and_commit(
    context: DecodeContext,
    adaptive: Adaptive,
    accept: exact.Acceptance,
    state: DecodeState,
    draft: Draft,
):
    """Verifies the first nodes of the tree, and commits what is accepted.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      accept: the acceptance rule.
      state: state of the loop.
      draft: drafts for the first nodes.

    Returns:
      The state after the commit, and the VerifyOutput.
    """
    tree = Tree(adaptive.tree.parents[: draft.tokens.shape[1] + 1])
    spec = VerifySpec(tree, adaptive.top, adaptive.middle)
    output, cache = verification.verify(context, spec, accept, state, draft)
    return commit.commit(context, state._replace(cache=cache), tree, output), output


def truncate_draft(draft: Draft, width: int) -> Draft:
    """Returns the drafts of the first `width` nodes, of which the root is one."""
    log_probability = draft.log_probability
    if log_probability is not None:
        log_probability = log_probability[:, : width - 1]
    return draft._replace(tokens=draft.tokens[:, : width - 1], log_probability=log_probability)


def propose_tokens(
    context: DecodeContext, drafter: Drafter, drafter_state: Any, state: DecodeState
) -> tuple[Draft, Any]:
    """Runs the drafter, unless its tree is only a root.

    Args:
      context: constants of the request.
      drafter: the drafter inside an Adaptive.
      drafter_state: its state.
      state: state of the loop.

    Returns:
      The draft and the drafter's new state.
    """
    if drafter.tree.width == 1:
        return Draft(state.root[:, None][:, :0]), drafter_state
    return drafter.propose(inner_context(context), drafter_state, state)


def choose_next_width(
    context: DecodeContext, adaptive: Adaptive, state: DecodeState
) -> DecodeState:
    """Chooses the width of the next step, with its draft if that comes first.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      state: state of the loop.

    Returns:
      The state with the choice.
    """
    adaptive_state = state.drafter_state
    if not adaptive.drafts_ahead:
        chosen = select_width(context, adaptive, adaptive_state, state)
        return state._replace(drafter_state=chosen)

    def draft_and_select(adaptive_state: AdaptiveState) -> AdaptiveState:
        draft, drafter_state = propose_tokens(
            context, adaptive.drafter, adaptive_state.drafter_state, state
        )
        adaptive_state = adaptive_state._replace(drafter_state=drafter_state, next_draft=draft)
        return select_width(context, adaptive, adaptive_state, state)

    if adaptive_state.next_draft is None:
        return state._replace(drafter_state=draft_and_select(adaptive_state))
    excess = adaptive_state.spent + jnp.min(relative_costs(context)) - cost_budget(context, state)
    excess = jnp.where(context.weights.fixed_width == ANY_WIDTH, excess, -1)
    # Each plain step adds SLACK to the budget: after so many of them the next draft is within it.
    count = jnp.ceil(jnp.clip(excess / SLACK, 1, MAX_DISABLED_STEPS)).astype(jnp.int32)

    def disable(adaptive_state: AdaptiveState) -> AdaptiveState:
        return adaptive_state._replace(
            width_index=jnp.int32(DISABLED),
            spent=adaptive_state.spent + count,
            resume_step=state.steps + count,
        )

    return state._replace(
        drafter_state=jax.lax.cond(excess > 0, disable, draft_and_select, adaptive_state)
    )
