# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a text that was read: each view has its numbers and draws itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.analysis import drawing
from t5x_lite.analysis.drawing import Cell, View, percent
from t5x_lite.analysis.reading import Guesses
from t5x_lite.evaluation import blocks


@dataclass(repr=False)
class Alternatives(View):
    """Each token that was written, how probable the model found it, and what else it thought of.

    tokens [t] as labels, guesses [t ...]; best [t][k] are the labels of guesses.ids.
    """

    tokens: list[str]
    guesses: Guesses
    best: list[list[str]]
    title = "Per token: its probability, and the most probable ones"

    @property
    def probability(self) -> np.ndarray:
        """Of each token that was written, [t]."""
        return np.exp(self.guesses.log_probability_of_written)

    @property
    def names(self) -> list[str]:
        return ["token", "probability", "rank", *(f"{k + 1}." for k in range(len(self.best[0])))]

    def rows(self) -> list[list[Cell | str]]:
        found = []
        likely = np.exp(self.guesses.log_probability)
        for place, token in enumerate(self.tokens):
            share, rank = self.probability[place], int(self.guesses.rank[place])
            others = [
                Cell(f"{label} {percent(other)}", other)
                for label, other in zip(self.best[place], likely[place], strict=True)
            ]
            own = Cell(percent(share), share, color=drawing.GREEN if rank == 0 else drawing.RED)
            found.append([token, own, str(rank + 1), *others])
        return found

    def summary(self) -> str:
        own = self.guesses.log_probability_of_written
        return (
            f"{len(own)} tokens, log-probability {own.sum():.3f} nats, perplexity "
            f"{np.exp(-own.mean()):.3f}; {(self.guesses.rank == 0).sum()} of them were the model's "
            "first choice"
        )

    def html(self) -> str:
        table = drawing.table(self.names, self.rows())
        return drawing.heading(self.title) + table + drawing.paragraph(self.summary())

    def terminal(self) -> list[Any]:
        return [self.title, drawing.rich_table(self.names, self.rows()), self.summary()]


@dataclass(repr=False)
class Lens(View):
    """What the model would say next if it ended at each layer: the final norm and the head read the
    state after it (the logit lens).

    tokens [t] are those that were written; guesses [layers + 1 t ...], the first of the embeddings,
    the last the model's own; best [layers + 1][t] the label of each first guess.
    """

    tokens: list[str]
    guesses: Guesses
    best: list[list[str]]
    title = "Logit lens: what each layer would have written next"

    def cells(self, layer: int) -> list[Cell]:
        found = []
        for place, label in enumerate(self.best[layer]):
            share = float(np.exp(self.guesses.log_probability[layer, place, 0]))
            right = self.guesses.rank[layer, place] == 0
            hint = f"{percent(share)}; the token written is number " + str(
                int(self.guesses.rank[layer, place]) + 1
            )
            found.append(Cell(label, share, hint, drawing.GREEN if right else drawing.BLUE))
        return found

    def table(self, layers: list[int]) -> tuple[list[str], list[list[Cell | str]]]:
        names = ["written", *(f"layer {layer}" if layer else "embedding" for layer in layers)]
        columns = [self.tokens, *(self.cells(layer) for layer in layers)]
        return names, [list(row) for row in zip(*columns, strict=True)]

    def html(self) -> str:
        key = "Green where it is the token that was written; the stronger, the more certain."
        names, rows = self.table(list(range(len(self.best))))
        if len(names) > len(rows):
            # A page is longer than wide: of few tokens, layers go downwards.
            names, *rows = (list(row) for row in zip(names, *rows, strict=True))
        table = drawing.table(names, rows)
        return drawing.heading(self.title) + table + drawing.paragraph(key)

    def terminal(self) -> list[Any]:
        layers = drawing.spread(len(self.best))
        return [self.title, drawing.rich_table(*self.table(layers))]


@dataclass(repr=False)
class DecoderLens(View):
    """What the decoder writes when it reads the encoder's states after each layer, the first of the
    embeddings: ids [layers + 1][...] and their texts."""

    ids: list[list[int]]
    texts: list[str]
    title = "DecoderLens: what the decoder writes when it reads each layer of the encoder"

    def rows(self) -> list[list[Cell | str]]:
        last = self.texts[-1]
        return [
            [str(layer) if layer else "embedding", Cell(text, 0.4 * (text == last))]
            for layer, text in enumerate(self.texts)
        ]

    def html(self) -> str:
        return drawing.heading(self.title) + drawing.table(["layer", "text"], self.rows())

    def terminal(self) -> list[Any]:
        return [self.title, drawing.rich_table(["layer", "text"], self.rows())]


@dataclass(repr=False)
class Blocks(View):
    """Which tokens each forward pass of the model wrote, and who had guessed them: tokens [t] as
    labels; drawn.calls and drawn.guessed [t] say it of each."""

    tokens: list[str]
    drawn: blocks.Drawn
    title = "Blocks: what each forward pass wrote"

    @property
    def blocks(self) -> list[list[str]]:
        """The tokens of every call, in order."""
        calls = np.array(self.drawn.calls)
        return [[self.tokens[i] for i in np.flatnonzero(calls == n)] for n in np.unique(calls)]

    def html(self) -> str:
        made = blocks.paragraph(self.drawn, blocks.colours([self.drawn]))
        key = "A line begins what one forward pass wrote; coloured is what had been guessed."
        return drawing.heading(self.title) + made + drawing.paragraph(key)

    def terminal(self) -> list[Any]:
        from rich.text import Text

        return [self.title, Text.from_ansi(blocks.terminal([self.drawn]))]
