# SPDX-License-Identifier: Apache-2.0
"""Heads that guess the tokens after the next one, and how they are trained: config tree."""

from dataclasses import dataclass
from typing import Literal

from t5x_lite.typed import Checked, require


@dataclass(frozen=True)
class Heads(Checked):
    """Heads beside the model's own: of a block of `block` tokens, block - 1 are guessed by a head
    each, all from what the model's own token is read from, which the heads do not touch.

    `shape` of the transformation before the shared projection to the vocabulary:
    stern: one hidden layer of (block - 1) * mlp units for all heads (Stern et al., 2018, section
    6);
    block_diagonal: the same without what goes from one head's units to another head's output;
    medusa: x + silu(W x) (Cai et al., 2024, section 2.1.1);
    hydra: x + silu(W x + what the tokens since then say), which a head is told one after the other
    (Ankner et al., 2024). `mlp` is the hidden width per head of the first two; None takes the
    decoder's.
    """

    block: int
    shape: Literal["stern", "block_diagonal", "medusa", "hydra"] = "block_diagonal"
    mlp: int | None = None

    def check(self):
        require(self.block >= 2, f"Heads.block must be at least 2; got {self.block}")
        require(self.mlp is None or self.mlp >= 1, f"Heads.mlp must be positive; got {self.mlp}")
        require(
            self.mlp is None or not self.residual,
            f"Heads.mlp is for stern and block_diagonal: {self.shape} has no hidden layer",
        )

    @property
    def count(self) -> int:
        return self.block - 1

    @property
    def residual(self) -> bool:
        """Whether a head is one square matrix and a residual (and its tokens')."""
        return self.shape in ("medusa", "hydra")

    @property
    def sequential(self) -> bool:
        """Whether a head sees the guesses of those before it."""
        return self.shape == "hydra"


@dataclass(frozen=True)
class HeadLoss(Checked):
    """What is minimised where the model has heads: own * (the model's own loss) + the sum over
    heads i = 1, 2, ... of decay^(i-1) * (the loss of head i), over the sum of these factors.

    `heads` random takes one head a microbatch, by its factor: the same on average, for the memory
    and time of one. `own` 0 leaves the model's own loss out: for a frozen trunk, whose gradient it
    would not have anyway.
    """

    heads: Literal["random", "all"] = "random"
    own: float = 1.0
    decay: float = 1.0

    def check(self):
        require(self.own >= 0, f"HeadLoss.own cannot be negative; got {self.own}")
        require(0 < self.decay <= 1, f"HeadLoss.decay must be in (0, 1]; got {self.decay}")

    def factors(self, count: int) -> tuple[float, ...]:
        """The shares of the model's own loss and of `count` heads; they sum to 1."""
        parts = [self.own, *(self.decay**i for i in range(count))]
        return tuple(part / sum(parts) for part in parts)
