# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding: the model's choices after rejected drafts are the next drafts.

Santilli et al., 2023, arXiv 2305.10427.

  b rows    w nodes of a block    W drafts kept
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Tree,
    VerifyOutput,
    chain,
)


@dataclass(frozen=True)
class Jacobi:
    """Drafts a chain of what the model chose after each node of the block before.

    The state is the drafts after the root, [b W].

    Attributes:
      tree: the chain.
      kept: W, whatever the width of the tree.
      top: 0.

    Raises:
      ValueError: tree is not a chain of at most kept + 1 nodes.
    """

    tree: Tree = chain(8)
    kept: int = 15
    top: int = 0

    def __post_init__(self):
        if not self.tree.is_chain or self.tree.width > self.kept + 1:
            raise ValueError(f"Jacobi drafts a chain of at most kept + 1 = {self.kept + 1} nodes")

    def begin(self, context: DecodeContext) -> Int[Array, "b W"]:
        """Returns the prompt or the input, repeated: some of it often comes next."""
        tokens, length = context.prompts
        if context.inputs is not None:
            tokens, length = context.inputs, context.inputs_length

        def repeat_row(row, length):
            return row[jnp.arange(self.kept) % jnp.maximum(length, 1)]

        return jax.vmap(repeat_row)(tokens, length)

    def propose(
        self, context: DecodeContext, drafter_state: Int[Array, "b W"], state: DecodeState
    ) -> tuple[Draft, Int[Array, "b W"]]:
        """Returns the first w - 1 kept drafts.

        Args:
          context: constants of the request; unused.
          drafter_state: the drafts.
          state: state of the loop; unused.
        """
        return Draft(drafter_state[:, : self.tree.width - 1]), drafter_state

    def observe(
        self,
        context: DecodeContext,
        drafter_state: Int[Array, "b W"],
        state: DecodeState,
        output: VerifyOutput,
    ) -> Int[Array, "b W"]:
        """Returns the model's choices after the accepted path.

        Args:
          context: constants of the request; unused.
          drafter_state: the drafts of this step.
          state: state of the loop; unused.
          output: the choices.
        """

        def observe_row(later, count):
            where = count + jnp.arange(self.kept)
            return later[jnp.minimum(where, len(later) - 1)]

        # Draft i is for token i + 1 after the root, chosen[i] for the same one.
        chosen = output.chosen[:, : self.tree.width]
        later = sharding.by_rows([chosen, drafter_state[:, chosen.shape[1] :]])
        return jax.vmap(observe_row)(jnp.concatenate(later, axis=1), output.count)
