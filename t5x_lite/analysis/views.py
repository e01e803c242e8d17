# SPDX-License-Identifier: Apache-2.0
"""Views of an explained text: each has its numbers and renders itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.analysis import drawing
from t5x_lite.analysis.drawing import Cell, Renderable, percent
from t5x_lite.analysis.reading import TokenPredictions
from t5x_lite.evaluation import draft_report


@dataclass(repr=False)
class Alternatives(Renderable):
    """Probabilities of the tokens written, and of their alternatives.

    Attributes:
      tokens: [t] labels of the tokens written.
      predictions: [t ...] of the model.
      best: `[t][k]` labels of predictions.ids.
    """

    tokens: list[str]
    predictions: TokenPredictions
    best: list[list[str]]
    title = "Per token: its probability, and the most probable ones"

    @property
    def probability(self) -> np.ndarray:
        """[t] probability of each token written."""
        return np.exp(self.predictions.log_probability_of_written)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return ["token", "probability", "rank", *(f"{k + 1}." for k in range(len(self.best[0])))]

    def rows(self) -> list[list[Cell | str]]:
        """A row per token."""
        rows = []
        likely = np.exp(self.predictions.log_probability)
        for place, token in enumerate(self.tokens):
            share, rank = self.probability[place], int(self.predictions.rank[place])
            others = [
                Cell(f"{label} {percent(other)}", other)
                for label, other in zip(self.best[place], likely[place], strict=True)
            ]
            probability = Cell(
                percent(share), share, color=drawing.GREEN if rank == 0 else drawing.RED
            )
            rows.append([token, probability, str(rank + 1), *others])
        return rows

    def summary(self) -> str:
        """Log-probability and perplexity of the text."""
        log_probability = self.predictions.log_probability_of_written
        total, perplexity = log_probability.sum(), np.exp(-log_probability.mean())
        first = (self.predictions.rank == 0).sum()
        return (
            f"{len(log_probability)} tokens, log-probability {total:.3f} nats, perplexity "
            f"{perplexity:.3f}; {first} of them were the model's first choice"
        )

    def html(self) -> str:
        table = drawing.html_table(self.names, self.rows())
        return drawing.heading(self.title) + table + drawing.paragraph(self.summary())

    def terminal(self) -> list[Any]:
        return [self.title, drawing.rich_table(self.names, self.rows()), self.summary()]


@dataclass(repr=False)
class Lens(Renderable):
    """Logit lens: predictions from the state after each layer, by the final norm and the head.

    Attributes:
      tokens: [t] labels of the tokens written.
      predictions: [layers + 1 t ...], the first of the embeddings, the last of the model.
      best: `[layers + 1][t]` label of the most probable token.
    """

    tokens: list[str]
    predictions: TokenPredictions
    best: list[list[str]]
    title = "Logit lens: what each layer would have written next"

    def cells(self, layer: int) -> list[Cell]:
        """A column of the table: the predictions of a layer."""
        cells = []
        for place, label in enumerate(self.best[layer]):
            share = float(np.exp(self.predictions.log_probability[layer, place, 0]))
            right = self.predictions.rank[layer, place] == 0
            hint = f"{percent(share)}; the token written is number " + str(
                int(self.predictions.rank[layer, place]) + 1
            )
            cells.append(Cell(label, share, hint, drawing.GREEN if right else drawing.BLUE))
        return cells

    def table(self, layers: list[int]) -> tuple[list[str], list[list[Cell | str]]]:
        """Column names and rows of the table of some layers."""
        names = ["written", *(f"layer {layer}" if layer else "embedding" for layer in layers)]
        columns = [self.tokens, *(self.cells(layer) for layer in layers)]
        return names, [list(row) for row in zip(*columns, strict=True)]

    def html(self) -> str:
        key = "Green where it is the token that was written; the stronger, the more certain."
        names, rows = self.table(list(range(len(self.best))))
        if len(names) > len(rows):
            # Few tokens: a row per layer, as a page is longer than wide.
            names, *rows = (list(row) for row in zip(names, *rows, strict=True))
        table = drawing.html_table(names, rows)
        return drawing.heading(self.title) + table + drawing.paragraph(key)

    def terminal(self) -> list[Any]:
        layers = drawing.spread_evenly(len(self.best))
        return [self.title, drawing.rich_table(*self.table(layers))]


@dataclass(repr=False)
class DecoderLens(Renderable):
    """Texts that the decoder writes from the encoder's states after each layer.

    Attributes:
      ids: `[layers + 1][...]` ids; the first from the embeddings.
      texts: [layers + 1] their texts.
    """

    ids: list[list[int]]
    texts: list[str]
    title = "DecoderLens: what the decoder writes when it reads each layer of the encoder"

    def rows(self) -> list[list[Cell | str]]:
        """A row per layer."""
        last = self.texts[-1]
        return [
            [str(layer) if layer else "embedding", Cell(text, 0.4 * (text == last))]
            for layer, text in enumerate(self.texts)
        ]

    def html(self) -> str:
        return drawing.heading(self.title) + drawing.html_table(["layer", "text"], self.rows())

    def terminal(self) -> list[Any]:
        return [self.title, drawing.rich_table(["layer", "text"], self.rows())]


@dataclass(repr=False)
class Blocks(Renderable):
    """Tokens by the forward pass that wrote them, and by the drafter that proposed them.

    Attributes:
      tokens: [t] labels of the tokens written.
      drawn: the text with the pass (calls) and the drafter (drafted_by) of each token.
    """

    tokens: list[str]
    drawn: draft_report.DraftedText
    title = "Blocks: what each forward pass wrote"

    @property
    def blocks(self) -> list[list[str]]:
        """The tokens of every forward pass, in order."""
        calls = np.array(self.drawn.calls)
        return [[self.tokens[i] for i in np.flatnonzero(calls == n)] for n in np.unique(calls)]

    def html(self) -> str:
        text = draft_report.html_paragraph(self.drawn, draft_report.drafter_colors([self.drawn]))
        key = "A line begins what one forward pass wrote; draft tokens are colored."
        return drawing.heading(self.title) + text + drawing.paragraph(key)

    def terminal(self) -> list[Any]:
        from rich.text import Text

        return [self.title, Text.from_ansi(draft_report.terminal_text([self.drawn]))]
