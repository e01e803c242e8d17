# SPDX-License-Identifier: Apache-2.0
"""The model's own heads guess a chain, read in the same product as the model's own logits (Stern et
al., 2018, section 4): one pass over the vocabulary per call.

  b rows    w nodes of a block    g heads    d width    v vocabulary
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding import sampling
from t5x_lite.decoding.drafters import blockwise
from t5x_lite.decoding.protocol import Draft, Setting, State, Tree, Verdict, chain
from t5x_lite.sharding import spec


@dataclass(frozen=True)
class Merged:
    """Guesses what `Blockwise` does, with all heads at all w positions of the verified block.

    That is w * g more rows in the product with the vocabulary, of which g are used, and no second
    product: worth it where reading the table takes the time, at batch 1 on an accelerator. The
    memory is the guesses for the next call, -1 before the first. Heads that see guesses cannot, and
    in a union `Blockwise` has to be taken.

      Drafting(Merged(chain(8)))
    """

    tree: Tree = chain(4)
    top: int = 0

    def begin(self, setting: Setting) -> Int[Array, "b g"]:
        """Raises ValueError where the model has too few heads, or such as see the guesses."""
        heads = blockwise.check(setting, self.tree.width - 1)
        if heads.sequential:
            raise ValueError(
                "The model's heads see the guesses before them (Heads.shape hydra), which a merged "
                "pass does not have yet: use Blockwise"
            )
        return jnp.zeros_like(setting.prompts.length[:, None]) - jnp.ones((heads.count,), jnp.int32)

    def propose(self, setting: Setting, memory: Int[Array, "b g"], state: State):
        return Draft(memory[:, : self.tree.width - 1]), memory

    def beside(self, setting: Setting, hidden: Float[Array, "b w d"]) -> Float[Array, "b w*g d"]:
        """What the heads' logits are read from, at every node of the block."""
        count = setting.target.heads.count
        told = setting.target.heads.guess(hidden, slice(0, count))
        rows, width, _, size = told.shape
        placed = spec("batch length width")
        return jnp.reshape(told, (rows, width * count, size), out_sharding=placed)

    def observe(self, setting: Setting, memory, state: State, verdict: Verdict):
        if verdict.beside is None:
            raise ValueError("Merged reads beside a block of its own: in a union, use Blockwise")
        count = setting.target.heads.count
        last = jnp.maximum(verdict.count - 1, 0)

        def own(logits, path, last):
            return jax.lax.dynamic_slice_in_dim(logits, path[last] * count, count)

        logits = jax.vmap(own)(verdict.beside, verdict.path, last)
        positions = state.length[:, None] + 1 + jnp.arange(count)
        return sampling.choose(logits, positions, setting.rules.sampling)
