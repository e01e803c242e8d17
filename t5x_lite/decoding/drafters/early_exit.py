# SPDX-License-Identifier: Apache-2.0
"""Drafts of the model's own first layers (LayerSkip, Elhoushi et al., 2024, arXiv 2404.16710).

b rows    w nodes of a block
"""

from dataclasses import dataclass

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
class EarlyExit:
    """Drafts a chain with the first layers, the final norm and the model's own output head.

    Pays for models that are trained to exit early; costs (w - 1) * layers of the model's layers per
    step.

      Drafting(EarlyExit(layers=2, tree=chain(4)))

    Attributes:
      layers: number of layers that draft.
      tree: the chain.
      stochastic: sample the drafts, and return their distributions (`autoregressive.Proposer`).
      top: 0.
    """

    layers: int
    tree: Tree = chain(5)
    stochastic: bool = False
    top: int = 0

    def begin(self, context: DecodeContext) -> None:
        """Returns no state.

        Raises:
          ValueError: the model has fewer layers.
        """
        autoregressive.check_layer_number(
            context.target.num_layers, "EarlyExit.layers", self.layers
        )

    def propose(
        self, context: DecodeContext, drafter_state: None, state: DecodeState
    ) -> tuple[Draft, None]:
        """Runs the first layers w - 1 times.

        Args:
          context: constants of the request.
          drafter_state: None.
          state: state of the loop.
        """
        first = not_none(context.target.layer_range)(0, self.layers)

        def embed(token, index):
            return first.embed(token[:, None], index)

        draft = autoregressive.propose_with_layers(
            context, state, first, embed, self.tree, self.stochastic
        )
        return draft, drafter_state

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
