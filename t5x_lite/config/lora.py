# SPDX-License-Identifier: Apache-2.0
"""Config of low-rank adapters (LoRA: Hu et al., 2021, arXiv 2106.09685)."""

from dataclasses import dataclass

from t5x_lite.config.checked import Checked, Few, Positive, ShareBelowOne, require


@dataclass(frozen=True)
class Lora(Checked):
    """Adapters that train while all weights of the checkpoint are frozen (LoRA).

    A matrix W of a layer becomes W + scale * A B, with A [inputs, rank] and B [rank, outputs].

    Attributes:
      rank: inner size of A and B.
      alpha: the scale is alpha / rank; peft's `lora_alpha`.
      weights: patterns of the matrices of layers that have an adapter, of names such as
        "decoder.layers.attention.query"; * matches anything.
      dropout: probability of zeroing a feature of what an adapter reads, while it trains.
      rank_stabilized: the scale is alpha / sqrt(rank) (rsLoRA: Kalajdzievski, 2023).
      dora: adds a magnitude for each output of a matrix, whose columns then have norm 1 (DoRA: Liu
        et al., 2024).
      quantize: the frozen matrices of layers in 8 or 4 bits (QLoRA: Dettmers et al., 2023): int8,
        int4, or int4:64 with a scale for each 64 values. None keeps them in Model.dtype.
    """

    rank: Few
    alpha: Positive
    weights: tuple[str, ...] = ("*",)
    dropout: ShareBelowOne = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    quantize: str | None = None

    @property
    def scale(self) -> float:
        """Factor on A B."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def check(self):
        require(len(self.weights) > 0, "Lora.weights is empty: name matrices by patterns, or *")
        require(
            self.quantize is None or "activations" not in self.quantize,
            f"Lora.quantize = {self.quantize!r} rounds activations too, which have no gradient: "
            "bind int8, int4 or int4:64",
        )
