# SPDX-License-Identifier: Apache-2.0
"""Drafts of the model's own heads, a chain (Stern et al., 2018, arXiv 1811.03115), and the state
that all drafters with those heads share.

  b rows    w nodes of a block    g heads    d model width    v vocabulary
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding.drafters import autoregressive
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    TargetHeads,
    Tree,
    VerifyOutput,
    chain,
)
from t5x_lite.sharding import spec
from t5x_lite.utils.not_none import not_none


class LastHidden(NamedTuple):
    """Hidden state that the root was read from.

    Attributes:
      hidden: the state.
      known: False before the first step, which computes the first one.
    """

    hidden: Float[Array, "b d"]
    known: Bool[Array, " b"]


class HiddenStateDrafter:
    """Base of the drafters whose state is the hidden state of the root."""

    def observe(
        self,
        context: DecodeContext,
        drafter_state: LastHidden,
        state: DecodeState,
        output: VerifyOutput,
    ) -> LastHidden:
        """Returns the hidden state of the new root.

        Args:
          context: constants of the request; unused.
          drafter_state: the last hidden state, kept in rows that are done.
          state: state of the loop; unused.
          output: hidden states of the block, and the accepted path.
        """
        return update_hidden(drafter_state, output)


@dataclass(frozen=True)
class Blockwise(HiddenStateDrafter):
    """Drafts w - 1 tokens, one with each of the first heads, at the accepted position alone.

    That is 1 position with w - 1 heads, where the single pass of the paper has w positions with all
    of them.

      Drafting(Blockwise(chain(8)))

    Attributes:
      tree: the chain.
      stochastic: sample the drafts, and return their distributions (`autoregressive.Proposer`).
      top: 0.
    """

    tree: Tree = chain(4)
    stochastic: bool = False
    top: int = 0

    def begin(self, context: DecodeContext) -> LastHidden:
        """Returns an unknown hidden state.

        Raises:
          ValueError: the model has fewer heads than the block has drafts.
        """
        check_heads(context, self.tree.width - 1)
        return unknown_hidden(context)

    def propose(
        self, context: DecodeContext, drafter_state: LastHidden, state: DecodeState
    ) -> tuple[Draft, LastHidden]:
        """Applies the heads to the last hidden state.

        Args:
          context: constants of the request.
          drafter_state: the last hidden state.
          state: state of the loop.
        """
        count, sequential = self.tree.width - 1, not_none(context.target.heads).sequential
        if count == 0:
            return Draft(state.root[:, None][:, :0]), drafter_state
        every = None if sequential else head_logits(context, drafter_state, slice(0, count))
        tokens, distributions = [], []
        for number in range(count):
            if sequential:
                before = jnp.stack([state.root, *tokens], axis=1)
                head = slice(number, number + 1)
                logits = head_logits(context, drafter_state, head, before)[:, 0]
            else:
                logits = not_none(every)[:, number]
            token, log_probability = autoregressive.draft_token(
                context, state, logits, number, self.stochastic
            )
            tokens.append(token)
            distributions.append(log_probability)
        log_probability = jnp.stack(distributions, axis=1) if self.stochastic else None
        tokens = mask_unknown(drafter_state, jnp.stack(tokens, axis=1))
        return Draft(tokens, log_probability), drafter_state


def check_heads(context: DecodeContext, count: int) -> TargetHeads:
    """Returns the model's heads.

    Raises:
      ValueError: it has none, or fewer than `count`.
    """
    heads = context.target.heads
    if heads is None:
        raise ValueError(
            "The model has no heads that predict later tokens: train some with configs/runs/"
            "heads_g2p.gin as a pattern (Model.draft_heads), or choose a drafter that needs none"
        )
    if heads.count < count:
        raise ValueError(
            f"The block has {count} drafts in a row, but the model has {heads.count} heads: "
            f"choose a block of at most {heads.count + 1} tokens"
        )
    return heads


def unknown_hidden(context: DecodeContext) -> LastHidden:
    """Returns the state before the first step, in width and dtype of the model's hidden states."""
    tokens, index = context.prompts.tokens[:, :1], context.prompts.length
    like = jax.eval_shape(not_none(context.target.layer_range)(0, 1).embed, tokens, index)
    zeros = jnp.zeros((like.shape[0], like.shape[2]), like.dtype, out_sharding=spec("batch width"))
    return LastHidden(zeros, index < 0)


def update_hidden(last_hidden: LastHidden, output: VerifyOutput) -> LastHidden:
    """Returns the hidden state of the new root; rows that are done keep their old one."""
    last = jnp.maximum(output.count - 1, 0)
    hidden = jax.vmap(lambda hidden, path, last: hidden[path[last]])(
        output.hidden, output.path, last
    )
    moved = output.count > 0
    hidden = hidden.astype(last_hidden.hidden.dtype)
    hidden = jnp.where(moved[:, None], hidden, last_hidden.hidden)
    return LastHidden(hidden, last_hidden.known | moved)


def head_logits(
    context: DecodeContext,
    last_hidden: LastHidden,
    heads: slice,
    before: Int[Array, "b j"] | None = None,
) -> Float[Array, "b g v"]:
    """Computes the logits of some heads for the tokens after the root.

    Args:
      context: constants of the request.
      last_hidden: the last hidden state.
      heads: the heads.
      before: the root and the drafts before, for sequential heads.
    """
    before = None if before is None else before[:, None]
    hidden = not_none(context.target.heads).apply(last_hidden.hidden[:, None], heads, before)
    return context.target.logits(hidden[:, 0])


def mask_unknown(last_hidden: LastHidden, tokens: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """Sets tokens to -1 in rows whose hidden state is not known yet."""
    return jnp.where(last_hidden.known[:, None], tokens, -1)
