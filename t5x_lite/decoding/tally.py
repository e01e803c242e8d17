# SPDX-License-Identifier: Apache-2.0
"""What drafting was worth: tokens per call, and how often the first, second, ... guess held."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from t5x_lite.decoding.generation import Result


@dataclass
class Tally:
    """Counts over texts. blocks[n] is how many calls wrote n tokens of a text; guessed counts
    tokens by who had guessed them ("model": nobody)."""

    blocks: Counter[int] = field(default_factory=Counter)
    guessed: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result, names: tuple[str, ...], rows: int) -> None:
        """Counts the first `rows` texts of a result; names[i] is who guesses node i of a block."""
        for row in range(rows if result.call is not None else 0):
            length = int(result.lengths[row, 0])
            self.blocks.update(sizes(result.call[row, 0, :length]).tolist())
            nodes = np.bincount(result.node[row, 0, :length], minlength=len(names))
            for name, count in zip(names, nodes.tolist(), strict=True):
                self.guessed[name] += count

    @property
    def calls(self) -> int:
        """Forward passes, counted for each text by itself."""
        return sum(self.blocks.values())

    @property
    def tokens(self) -> int:
        return sum(size * count for size, count in self.blocks.items())

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / self.calls if self.calls else 0.0

    def held(self) -> list[float]:
        """In which share of all calls the first, second, ... guess was written."""
        most = max(self.blocks, default=0)
        beyond = lambda size: sum(count for other, count in self.blocks.items() if other > size)
        return [beyond(size) / self.calls for size in range(1, most)]

    def report(self) -> dict[str, object]:
        """The figures as plain values, for JSON."""
        return {
            "tokens": self.tokens,
            "calls": self.calls,
            "tokens_per_call": round(self.tokens_per_call, 4),
            "held_by_position": [round(share, 4) for share in self.held()],
            "guessed_by": {name: count for name, count in self.guessed.items() if count},
        }

    def __str__(self) -> str:
        """Two lines for a person."""
        lines = [f"{self.tokens:,} tokens in {self.calls:,} calls: {self.tokens_per_call:.2f} each"]
        if held := self.held()[:8]:
            shares = " ".join(f"{share:.0%}" for share in held)
            lines.append(f"calls in which guess 1, 2, ... held: {shares}")
        return "\n".join(lines)


def sizes(call: np.ndarray) -> np.ndarray:
    """How many tokens each call wrote, in order; call [t] numbers the call of every token."""
    return np.unique(call, return_counts=True)[1]
