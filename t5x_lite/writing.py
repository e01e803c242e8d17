# SPDX-License-Identifier: Apache-2.0
"""How text is written: config tree."""

from dataclasses import dataclass

from t5x_lite.typed import Checked, require


@dataclass(frozen=True)
class Decode(Checked):
    """How text is written: greedily (temperature 0), by sampling, or by beam search (beams > 1).

    `length` is the most new tokens of a row. `top_k` 0 and `top_p` 1 leave the distribution whole.
    Beams are ranked by log-probability / ((5 + length) / 6) ** alpha (Wu et al., 2016, eq. 14).

    `decoder` names who guesses ahead, which changes the speed and not the text: auto, plain,
    lookup, early:4, draft:PATH, lookup+recycling, ... (infer --help lists them); `width` is how
    many tokens a block has with its first, 0 for what measurement says is best; `accept` is the
    rule by which guesses hold, of which some change the text and say so.
    """

    length: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    alpha: float = 0.6
    n_best: int = 1
    decoder: str = "auto"
    width: int = 0
    accept: str = "exact"

    def check(self):
        require(self.length >= 1, f"Decode.length must be at least 1; got {self.length}")
        require(self.temperature >= 0, "Decode.temperature cannot be negative")
        require(self.top_k >= 0, "Decode.top_k cannot be negative")
        require(0 < self.top_p <= 1, f"Decode.top_p must be in (0, 1]; got {self.top_p}")
        require(self.beams >= 1, "Decode.beams must be at least 1")
        require(
            1 <= self.n_best <= self.beams,
            f"Decode.n_best must be in 1..Decode.beams ({self.beams}); got {self.n_best}",
        )
        require(
            self.beams == 1 or self.temperature == 0,
            "Decode.beams searches for the most probable text: it cannot also sample "
            "(temperature > 0)",
        )
        require(
            self.beams == 1 or self.decoder in ("auto", "plain"),
            f"Decode.decoder {self.decoder} guesses ahead for one text per row; beam search "
            "(beams > 1) is written by plain or auto",
        )
        require(
            self.width == 0 or 2 <= self.width <= 64,
            f"Decode.width must be 0 (measured) or in 2..64; got {self.width}",
        )
