# SPDX-License-Identifier: Apache-2.0
"""The model's own last layers draft (direct multi-token decoding: Luo et al., 2025, 2510.11958).

b rows    w nodes of a block    d model width
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.decoding.drafters import guessing
from t5x_lite.decoding.protocol import Draft, Setting, State, Tree, Verdict, chain


@dataclass(frozen=True)
class LateLayers:
    """Guesses a chain with the layers from `middle` on, one pass of them for each guess.

    They are given what the early layers made of the last token that went through all layers, with
    the embedding of that token exchanged for the new one's: what the residual stream would be if
    the early layers added the same to both. Keys and values are noted in the model's own cache, as
    `EarlyExit` does. The first call has seen nothing yet, so it guesses nothing.

    The paper trains a model for it and accepts every guess; here each is verified.

      Drafting(LateLayers(middle=9, tree=chain(4)))    # of 12 layers, the last three
    """

    middle: int
    tree: Tree = chain(4)
    drawn: bool = False
    top: int = 0

    def begin(self, setting: Setting) -> Float[Array, "b d"]:
        """What the early layers added to the embedding of the last token: nothing yet.

        Raises:
          ValueError: the model has not that many layers.
        """
        whole = setting.target.layers
        if not 1 <= self.middle < whole:
            raise ValueError(
                f"LateLayers.middle is {self.middle}, but the decoder has {whole} layers: it must "
                f"be in 1..{whole - 1}"
            )
        tokens, index = setting.prompts.tokens[:, :1], 0 * setting.prompts.length
        return jnp.zeros_like(self.embedded(setting, tokens[:, 0], index))

    def embedded(self, setting: Setting, tokens, index) -> Float[Array, "b d"]:
        return setting.target.part(0, self.middle).begin(tokens[:, None], index)[:, 0]

    def propose(self, setting: Setting, added: Float[Array, "b d"], state: State):
        target = setting.target
        late = target.part(self.middle, target.layers)

        def step(token, number, notes):
            index = state.length + number
            x = self.embedded(setting, token, index) + added
            x, notes = late.through(x[:, None], index, notes)
            return target.logits(late.finish(x))[:, 0], notes

        how = guessing.Guesser(self.tree.width - 1, step, drawn=self.drawn)
        draft, notes = guessing.guesses(setting, state, how, late.of(state.cache))
        tokens = jnp.where(state.calls > 0, draft.tokens, -1)
        return Draft(tokens, draft.log_probability, late.joined(state.cache, notes)), added

    def observe(self, setting: Setting, added, state: State, verdict: Verdict):
        # The last node that held, which is no -1; in a union it may be of another drafter.
        place = jnp.arange(verdict.path.shape[1]) == verdict.count[:, None] - 1
        last = jnp.sum(jnp.where(place, verdict.path, 0), axis=1)
        pick = jax.vmap(lambda nodes, node: nodes[node])
        token, states = pick(verdict.block, last), pick(verdict.middle, last)
        new = states - self.embedded(setting, token, state.length - 1)
        return jnp.where(verdict.count[:, None] > 0, new, added)
