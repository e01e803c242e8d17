# SPDX-License-Identifier: Apache-2.0
"""The model's own first layers draft (LayerSkip, Elhoushi et al., 2024, arXiv 2404.16710).

b rows    w nodes of a block
"""

from dataclasses import dataclass

from t5x_lite.decoding.drafters import guessing
from t5x_lite.decoding.protocol import Setting, State, Tree, chain


@dataclass(frozen=True)
class EarlyExit:
    """Guesses a chain with the first `layers` layers, the final norm and the model's own head.

    Their keys and values go into the model's own cache, after the root, where the block that
    verifies them writes the same again. Worth it for models trained to exit early; it costs
    (w - 1) * layers of the model's layers per call.

      Drafting(EarlyExit(layers=2, tree=chain(4)))
    """

    layers: int
    tree: Tree = chain(5)
    drawn: bool = False
    top: int = 0

    def begin(self, setting: Setting):
        """No memory.

        Raises:
          ValueError: the model has not that many layers.
        """
        whole = setting.target.layers
        if not 1 <= self.layers < whole:
            raise ValueError(
                f"EarlyExit.layers is {self.layers}, but the decoder has {whole}: it must be in "
                f"1..{whole - 1}"
            )
        return None

    def propose(self, setting: Setting, memory, state: State):
        target = setting.target
        first = target.part(0, self.layers)

        def step(token, number, notes):
            index = state.length + number
            x, notes = first.through(first.begin(token[:, None], index), index, notes)
            return target.logits(first.finish(x))[:, 0], notes

        how = guessing.Guesser(self.tree.width - 1, step, drawn=self.drawn)
        draft, notes = guessing.guesses(setting, state, how, first.of(state.cache))
        return draft._replace(cache=first.joined(state.cache, notes)), memory

    def observe(self, setting: Setting, memory, state: State, verdict):
        return memory
