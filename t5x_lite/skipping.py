# SPDX-License-Identifier: Apache-2.0
"""Training a decoder to exit early (LayerSkip: Elhoushi et al., 2024, arXiv 2404.16710)."""

from dataclasses import dataclass

from t5x_lite.typed import Checked, require


@dataclass(frozen=True)
class LayerSkip(Checked):
    """A decoder whose first layers can write by themselves: what `--decoder=early:N` drafts with.

    Layer dropout: each row skips layer l = 0 .. L - 1 with chance dropout * (2^(l / (L - 1)) - 1),
    0 for the first and `dropout` for the last (equation 2 with D(l); nothing is scaled up). With
    `rising` the chances grow over the run from 0 in the same way, for training from new weights.

    Early exit loss: the state after every layer, through the final norm and the shared head, is
    asked for the target too. After n of L layers it weighs exits * (1 + 2 + ... + n), the whole
    model L + exits * (1 + 2 + ... + (L - 1)) (section 4.1.2, with layers counted from 1 so that
    the first has a say), over the sum of all that count. `rotation` R lets every R-th layer exit,
    the next set at the next step: less time for the same on average.
    """

    dropout: float = 0.1
    exits: float = 0.2
    rotation: int = 1
    rising: bool = False

    def check(self):
        require(0 <= self.dropout < 1, f"LayerSkip.dropout must be in [0, 1); got {self.dropout}")
        require(self.exits >= 0, f"LayerSkip.exits cannot be negative; got {self.exits}")
        require(self.rotation >= 1, f"LayerSkip.rotation must be at least 1; got {self.rotation}")

    def check_layers(self, layers: int) -> None:
        """Raises ValueError where a decoder of that many layers has none to exit from."""
        require(layers >= 2, f"Train.layer_skip needs a decoder of at least 2 layers; got {layers}")
        require(
            self.rotation < layers,
            f"LayerSkip.rotation {self.rotation} is more than the {layers - 1} layers that can "
            "exit early: at some steps none would",
        )

    def chances(self, layers: int) -> tuple[float, ...]:
        """How often a row skips each of so many layers, at the end of the run."""
        return tuple(self.dropout * (2 ** (layer / (layers - 1)) - 1) for layer in range(layers))

    def factors(self, layers: int) -> tuple[float, ...]:
        """The weight of the loss after each of so many layers; they do not sum to 1."""
        sums = [self.exits * count * (count + 1) / 2 for count in range(1, layers)]
        return (*sums, layers + sums[-1])
