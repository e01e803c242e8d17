# SPDX-License-Identifier: Apache-2.0
"""Drafts of the model's own last layers (direct multi-token decoding).

Luo et al., 2025, arXiv 2510.11958.

b rows    w nodes of a block    d model width
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding.drafters import autoregressive
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Tree,
    VerifyOutput,
    chain,
)
from t5x_lite.utils.not_none import not_none


@dataclass(frozen=True)
class LateLayers:
    """Drafts a chain with the layers from `middle` on, one pass of them for each draft.

    Their input is what the early layers made of the last token that went through all layers, with
    the embedding of that token replaced by the new one's: the residual stream if the early layers
    added the same to both. The first step has seen no token yet, so it drafts nothing. The state is
    what the early layers added, [b d].

    The paper trains a model for it and accepts every draft; here each is verified.

      Drafting(LateLayers(middle=9, tree=chain(4)))    # of 12 layers, the last three

    Attributes:
      middle: the first of the layers.
      tree: the chain.
      stochastic: sample the drafts, and return their distributions (`autoregressive.Proposer`).
      top: 0.
    """

    middle: int
    tree: Tree = chain(4)
    stochastic: bool = False
    top: int = 0

    def begin(self, context: DecodeContext) -> Float[Array, "b d"]:
        """Returns zeros.

        Raises:
          ValueError: the model has fewer layers.
        """
        autoregressive.check_layer_number(
            context.target.num_layers, "LateLayers.middle", self.middle
        )
        tokens, index = context.prompts.tokens[:, :1], 0 * context.prompts.length
        return jnp.zeros_like(self.embed(context, tokens[:, 0], index))

    def embed(
        self, context: DecodeContext, tokens: Int[Array, " b"], index: Int[Array, " b"]
    ) -> Float[Array, "b d"]:
        """Embeds one token per row.

        Args:
          context: constants of the request.
          tokens: the tokens.
          index: their slots.
        """
        early = not_none(context.target.layer_range)(0, self.middle)
        return early.embed(tokens[:, None], index)[:, 0]

    def propose(
        self, context: DecodeContext, drafter_state: Float[Array, "b d"], state: DecodeState
    ) -> tuple[Draft, Float[Array, "b d"]]:
        """Runs the late layers w - 1 times.

        Args:
          context: constants of the request.
          drafter_state: what the early layers added to the last token.
          state: state of the loop.
        """
        late = not_none(context.target.layer_range)(self.middle, context.target.num_layers)

        def embed(token, index):
            return (self.embed(context, token, index) + drafter_state)[:, None]

        draft = autoregressive.propose_with_layers(
            context, state, late, embed, self.tree, self.stochastic
        )
        tokens = jnp.where(state.steps > 0, draft.tokens, -1)
        return draft._replace(tokens=tokens), drafter_state

    def observe(
        self,
        context: DecodeContext,
        drafter_state: Float[Array, "b d"],
        state: DecodeState,
        output: VerifyOutput,
    ) -> Float[Array, "b d"]:
        """Returns what the early layers added to the last accepted node of the block.

        Args:
          context: constants of the request.
          drafter_state: kept in rows that are done.
          state: state of the loop after the commit.
          output: the block, and the input of layer `middle` at its nodes.
        """
        # The last node that was accepted, never a -1; in a union it may be another drafter's.
        place = jnp.arange(output.path.shape[1]) == output.count[:, None] - 1
        last = jnp.sum(jnp.where(place, output.path, 0), axis=1)
        take = jax.vmap(lambda nodes, node: nodes[node])
        token, x = take(output.block, last), take(output.middle, last)
        added = x - self.embed(context, token, state.length - 1)
        return jnp.where(output.count[:, None] > 0, added, drafter_state)
