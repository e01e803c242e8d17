# SPDX-License-Identifier: Apache-2.0
"""Acceptance statistics: tokens per forward pass, and how often each draft was accepted."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from t5x_lite.decoding.result import Result


@dataclass
class AcceptanceStats:
    """Counts over texts.

    Attributes:
      blocks: blocks[n] is the number of forward passes that added n tokens to a text.
      drafted: number of tokens by the name of their drafter; "model" for those that were not
        drafted.
      model_tokens: number of tokens that the model itself decided; None without a companion that
        switches.
    """

    blocks: Counter[int] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)
    model_tokens: int | None = None

    def add(self, result: Result, names: tuple[str, ...], rows: int) -> None:
        """Adds texts to the counts.

        Args:
          result: the texts.
          names: names[i] is the drafter of node i of a block (`union.draft_sources`).
          rows: how many of the first rows to count.
        """
        if result.token_step is None:
            return
        if result.model_tokens is not None:
            self.model_tokens = (self.model_tokens or 0) + int(result.model_tokens[:rows].sum())
        for text in np.ndindex(rows, result.lengths.shape[1]):
            length = int(result.lengths[text])
            self.blocks.update(step_sizes(result.token_step[text][:length]).tolist())
            nodes = np.bincount(result.token_node[text][:length], minlength=len(names))
            for name, count in zip(names, nodes.tolist(), strict=True):
                self.drafted[name] += count

    @property
    def steps(self) -> int:
        """Number of forward passes, counted for each text by itself."""
        return sum(self.blocks.values())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(size * count for size, count in self.blocks.items())

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted block size (Stern et al., 2018), or block efficiency."""
        return self.tokens / self.steps if self.steps else 0.0

    def acceptance_by_position(self) -> list[float]:
        """Returns the share of forward passes that accepted the first, second, ... draft."""

        def count_larger(size):
            return sum(count for other, count in self.blocks.items() if other > size)

        largest = max(self.blocks, default=0)
        return [count_larger(size) / self.steps for size in range(1, largest)]

    def report(self) -> dict[str, object]:
        """Returns the figures as plain values for JSON; the keys are those of existing records."""
        return {
            "tokens": self.tokens,
            "calls": self.steps,
            "tokens_per_call": round(self.tokens_per_step, 4),
            "held_by_position": [round(share, 4) for share in self.acceptance_by_position()],
            "guessed_by": {name: count for name, count in self.drafted.items() if count},
        } | ({} if self.model_tokens is None else {"model_tokens": self.model_tokens})

    def __str__(self) -> str:
        """Returns two lines for a person."""
        lines = [
            f"{self.tokens:,} tokens in {self.steps:,} forward passes: "
            f"{self.tokens_per_step:.2f} each"
        ]
        # The tokens that a pass over a masked block keeps are all the model's own.
        shares = self.acceptance_by_position()[:8]
        if shares and any(count for name, count in self.drafted.items() if name != "model"):
            percentages = " ".join(f"{share:.0%}" for share in shares)
            lines.append(f"forward passes that accepted draft 1, 2, ...: {percentages}")
        if self.model_tokens is not None:
            share = self.model_tokens / max(self.tokens, 1)
            lines.append(f"tokens that the model decided, not its companion: {share:.0%}")
        return "\n".join(lines)


def step_sizes(steps: np.ndarray) -> np.ndarray:
    """Counts the tokens of each forward pass, in order, from the one of every token, steps [t]."""
    return np.unique(steps, return_counts=True)[1]
