# SPDX-License-Identifier: Apache-2.0
"""Config of training for early exit (LayerSkip: Elhoushi et al., 2024, arXiv 2404.16710)."""

from dataclasses import dataclass

from t5x_lite.config.checked import Checked, Count, NotNegative, ShareBelowOne, require


@dataclass(frozen=True)
class LayerSkip(Checked):
    """LayerSkip's training: layer dropout and an early-exit loss, for `--drafter=early:N`.

    Layer dropout: a row skips layer l = 0 .. L - 1 with probability
    dropout * (2^(l / (L - 1)) - 1), 0 for the first and `dropout` for the last layer (equation 2
    with D(l); nothing is scaled up).

    Early-exit loss: the state after every layer predicts the target too, through the final norm
    and the shared head. After n of L layers it has weight exits * (1 + 2 + ... + n), the whole
    model L + exits * (1 + 2 + ... + (L - 1)) (section 4.1.2, with layers counted from 1 so that
    the first has a weight), divided by the sum of all weights.

    Attributes:
      dropout: probability that the last layer is skipped.
      exits: scale of the early-exit losses.
      rotation: every `rotation`-th layer exits, the next set at the next step: less time for the
        same loss on average.
      rising: the probabilities grow over the run from 0 in the same way, for training from new
        weights.
    """

    dropout: ShareBelowOne = 0.1
    exits: NotNegative = 0.2
    rotation: Count = 1
    rising: bool = False

    def check_layers(self, layers: int) -> None:
        """Raises ValueError if a decoder of so many layers has none to exit from."""
        require(layers >= 2, f"Train.layer_skip needs a decoder of at least 2 layers; got {layers}")
        require(
            self.rotation < layers,
            f"LayerSkip.rotation {self.rotation} is more than the {layers - 1} layers that can "
            "exit early: at some steps none would",
        )

    def chances(self, layers: int) -> tuple[float, ...]:
        """Probability that a row skips each of so many layers, at the end of the run."""
        return tuple(self.dropout * (2 ** (layer / (layers - 1)) - 1) for layer in range(layers))

    def factors(self, layers: int) -> tuple[float, ...]:
        """Weight of the loss after each of so many layers; they do not sum to 1."""
        sums = [self.exits * count * (count + 1) / 2 for count in range(1, layers)]
        return (*sums, layers + sums[-1])
