# SPDX-License-Identifier: Apache-2.0
"""Choice of the next draft length: the one with the most expected tokens per second.

The latency of a step is measured for every width (`latency`); acceptance is counted on the device,
row by row. A step has one width for all rows; the text does not depend on it.

b rows    n widths    w nodes of the widest block    D its depth
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.decoding.adaptive.drafter import ANY_WIDTH, Adaptive, AdaptiveState
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, Tree, VerifyOutput

# Decay of the counts: after a step that adds to them, and after any other. What happened 10 steps
# ago has lost half of its weight, and a drafter that was given up is tried again in about 40.
FORGET, DRIFT = 0.93, 0.99
# Acceptance rate of a draft after an accepted one that is assumed before any is verified, and the
# number of drafts that such an assumption counts as.
FOLLOWING, WEIGHT = 0.75, 1.0
# How much longer than plain decoding the slowest row may take, by the cost model: 3 % and 1.2
# tokens, which is 5 % of 60 tokens whatever the drafts are worth.
SLACK, START = 0.03, 1.2
# A token of a row that is so many ahead of the last one counts 1/e of the last one's. Eight texts
# of SmolLM2 at latencies of three machines: all steps together took 0.2 % more to 12 % less time.
AHEAD = 4.0
# Index of a width that stands for steps without drafting, and most of them in a row.
DISABLED, MAX_DISABLED_STEPS = -1, 16


def count_accepted(
    adaptive_state: AdaptiveState, tree: Tree, draft: Draft, output: VerifyOutput
) -> AdaptiveState:
    """Compares the drafts, verified or not, with the tokens that the step added to the text.

    Args:
      adaptive_state: the counts so far.
      tree: shape of the drafted block.
      draft: the drafts.
      output: the accepted tokens.

    Returns:
      The state with new counts.
    """
    valid = jnp.arange(output.tokens.shape[1]) < output.count[:, None]
    text = jnp.where(valid, output.tokens, -2)
    depth = int(tree.depth.max())
    text = jnp.pad(text, ((0, 0), (0, max(depth - text.shape[1], 0))), constant_values=-2)
    if not depth:
        return adaptive_state._replace(
            accepted=DRIFT * adaptive_state.accepted, drafted=DRIFT * adaptive_state.drafted
        )
    counts = jax.vmap(lambda row, text: count_row(tree, row, text))(draft.tokens, text)
    accepted, drafted = counts[:, 0], counts[:, 1]
    kept = jnp.where(drafted > 0, FORGET**drafted, DRIFT)
    return adaptive_state._replace(
        accepted=kept * adaptive_state.accepted + accepted,
        drafted=kept * adaptive_state.drafted + drafted,
    )


def count_row(tree: Tree, draft: Int[Array, " w-1"], text: Int[Array, " D"]) -> Float[Array, "2 2"]:
    """Counts the drafts of one row by depth.

    Args:
      tree: shape of the block.
      draft: the draft tokens; -1 for none.
      text: the tokens that follow the root; -2 where none was added.

    Returns:
      Accepted drafts, and drafts whose parent was accepted: at depth 1, and at all greater depths.
    """
    right = text[tree.depth[1:] - 1]
    wrong = jnp.concatenate([jnp.zeros(1, bool), draft != right])
    accepted = ~jnp.any(tree.ancestors & wrong, axis=1)
    drafted = accepted[np.array(tree.parents[1:])] & (draft >= 0) & (right >= 0)
    levels = tree.depth[1:, None] == np.arange(1, int(tree.depth.max()) + 1)

    def by_level(nodes):
        return jnp.any(nodes[:, None] & levels, axis=0).astype(jnp.float32)

    counts = jnp.stack([by_level(accepted[1:] & drafted), by_level(drafted)])
    return jnp.stack([counts[:, 0], jnp.sum(counts[:, 1:], axis=1)], axis=1)


def select_width(
    context: DecodeContext, adaptive: Adaptive, adaptive_state: AdaptiveState, state: DecodeState
) -> AdaptiveState:
    """Selects the width with the most expected tokens per second within the budget.

    Of equal widths the narrowest; width 1 is always within the budget. CostModel.fixed_width
    decides alone.

    Args:
      context: constants of the request, with the cost model.
      adaptive: the drafter.
      adaptive_state: its state.
      state: state of the loop.

    Returns:
      The state with the width, and its cost added.
    """
    expected = expected_tokens(context, adaptive, adaptive_state, state)
    gain = row_weights(context, state)[:, None] * expected
    total = adaptive_state.spent + relative_costs(context)
    affordable = (total <= cost_budget(context, state)) | (np.arange(len(adaptive.widths)) == 0)
    per_second = jnp.sum(gain, axis=0) / jnp.asarray(context.weights.seconds)
    best = jnp.argmax(jnp.where(affordable, per_second, -1)).astype(jnp.int32)
    fixed = jnp.asarray(context.weights.fixed_width, jnp.int32)
    index = jnp.where(fixed == ANY_WIDTH, best, fixed)
    return adaptive_state._replace(width_index=index, spent=total[index])


def relative_costs(context: DecodeContext) -> Float[Array, " n"]:
    """Cost of a step at each width, in steps of plain decoding."""
    return jnp.asarray(context.weights.seconds) / context.weights.plain_seconds


def row_weights(context: DecodeContext, state: DecodeState) -> Float[Array, " b"]:
    """Weight of a token of each row: a batch ends with its last row, which counts most."""
    left = jnp.where(state.done, -1, context.stopping.limit - state.length)
    behind = (left - jnp.max(left)).astype(jnp.float32)
    return jnp.where(state.done, 0, jnp.exp(behind / AHEAD))


def cost_budget(context: DecodeContext, state: DecodeState) -> Float[Array, ""]:
    """Most that the steps up to the next may cost, in steps of plain decoding.

    About the cost of plain decoding for the row that is least far. A plain step is always within
    the budget, and adds to it.
    """
    added = state.length + 2 - context.prompts.length
    least = jnp.min(jnp.where(state.done, jnp.iinfo(jnp.int32).max, added))
    return (1 + SLACK) * least + START


def expected_tokens(
    context: DecodeContext, adaptive: Adaptive, adaptive_state: AdaptiveState, state: DecodeState
) -> Float[Array, "b n"]:
    """Expected number of tokens that a step adds to each row at each width.

    Args:
      context: constants of the request.
      adaptive: the drafter.
      adaptive_state: its acceptance counts and, if made already, the next draft.
      state: state of the loop.
    """
    prior = np.array([adaptive.first, FOLLOWING], np.float32)
    rate = (adaptive_state.accepted + WEIGHT * prior) / (adaptive_state.drafted + WEIGHT)
    first, following = rate[:, :1], rate[:, 1:]
    room = jnp.maximum(context.stopping.limit - 2 - state.length, 0)
    depths = [int(adaptive.tree.depth[:width].max()) for width in adaptive.widths]
    steps = np.arange(max(depths))
    reach = first * following**steps
    has_draft = jnp.ones_like(reach, bool)
    if adaptive_state.next_draft is not None:
        levels = adaptive.tree.depth[1:, None] == steps + 1
        drafted = adaptive_state.next_draft.tokens >= 0
        has_draft = jnp.any(drafted[:, :, None] & levels, axis=1)
    reach = jnp.where(has_draft & (steps < room[:, None]), reach, 0)
    sums = [1 + jnp.sum(reach[:, :depth], axis=1) for depth in depths]
    return jnp.stack(sums, axis=1)
