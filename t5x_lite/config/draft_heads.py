# SPDX-License-Identifier: Apache-2.0
"""Config of the heads that draft the tokens after the next one, and of their loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    Checked,
    NotNegative,
    Range,
    ShareAboveZero,
    Width,
    require,
)


@dataclass(frozen=True)
class DraftHeads(Checked):
    """Heads beside the model's own, which draft the tokens after the next one.

    They read the state that the model's own token is read from, and leave it as it is.

    Attributes:
      block: tokens of a block: one of the model's own and one of each of block - 1 heads.
      shape: transformation before the shared projection to the vocabulary.
        stern: one hidden layer of (block - 1) * mlp units for all heads (Stern et al., 2018,
        section 6);
        block_diagonal: the same without the weights from one head's units to another's output;
        medusa: x + silu(W x) (Cai et al., 2024, section 2.1.1);
        hydra: the same, with a projection of the embeddings of the tokens drafted so far added
        inside silu: heads draft one after the other (Ankner et al., 2024).
      mlp: hidden units per head of stern and block_diagonal; None takes the decoder's.
    """

    block: Annotated[int, Range(2, 64)]
    shape: Literal["stern", "block_diagonal", "medusa", "hydra"] = "block_diagonal"
    mlp: Width | None = None

    def check(self):
        require(
            self.mlp is None or not self.residual,
            f"DraftHeads.mlp is for stern and block_diagonal: {self.shape} has no hidden layer",
        )

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.block - 1

    @property
    def residual(self) -> bool:
        """True if a head is a square matrix with a residual connection."""
        return self.shape in ("medusa", "hydra")

    @property
    def sequential(self) -> bool:
        """True if a head reads the tokens that the heads before it drafted."""
        return self.shape == "hydra"


@dataclass(frozen=True)
class DraftHeadLoss(Checked):
    """The loss of a model with draft heads.

    It is main_loss_weight * (the model's own loss) + the sum over heads i = 1, 2, ... of
    decay^(i-1) * (the loss of head i), divided by the sum of these factors.

    Attributes:
      heads: all of them, or a random one per microbatch, drawn by its factor: the same on average,
        for the memory and time of one.
      main_loss_weight: weight of the model's own loss; 0 leaves it out, as for a frozen trunk,
        where it has no gradient.
      decay: factor from one head to the next, in (0, 1].
    """

    heads: Literal["random", "all"] = "random"
    main_loss_weight: NotNegative = 1.0
    decay: ShareAboveZero = 1.0

    def factors(self, count: int) -> tuple[float, ...]:
        """Shares of the model's own loss and of `count` heads in the loss; they sum to 1."""
        weights = [self.main_loss_weight, *(self.decay**i for i in range(count))]
        return tuple(weight / sum(weights) for weight in weights)
