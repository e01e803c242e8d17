# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding: the model's choices after wrong guesses are the next guesses.

Santilli et al., 2023, arXiv 2305.10427.

  b rows    w nodes of a block    W guesses kept
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite.decoding.protocol import Draft, Tree, chain


@dataclass(frozen=True)
class Jacobi:
    """Drafts a chain of what the model chose after each node of the block before.

    The memory is what is guessed after the root, `kept` guesses whatever the width of the tree.
    """

    tree: Tree = chain(8)
    kept: int = 15
    top: int = 0

    def __post_init__(self):
        if not self.tree.is_chain or self.tree.width > self.kept + 1:
            raise ValueError(f"Jacobi drafts a chain of at most kept + 1 = {self.kept + 1} nodes")

    def begin(self, setting) -> Int[Array, "b W"]:
        """The end of the prompt or of the input, again and again: some of it often comes next."""
        tokens, length = setting.prompts
        if setting.inputs is not None:
            tokens, length = setting.inputs, setting.inputs_length
        repeat = lambda row, length: row[jnp.arange(self.kept) % jnp.maximum(length, 1)]
        return jax.vmap(repeat)(tokens, length)

    def propose(self, setting, memory, state):
        return Draft(memory[:, : self.tree.width - 1]), memory

    def observe(self, setting, memory, state, verdict):
        def row(guesses, chosen, count):
            # Guess i is for the token i + 1 after the root, chosen[i] for the same one.
            where = count + jnp.arange(self.kept)
            later = jnp.concatenate([chosen, guesses[len(chosen) :]])
            return later[jnp.minimum(where, len(later) - 1)]

        return jax.vmap(row)(memory, verdict.chosen[:, : self.tree.width], verdict.count)
