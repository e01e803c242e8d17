# SPDX-License-Identifier: Apache-2.0
"""Attention maps of layers and heads, and relative position biases."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.analysis import drawing
from t5x_lite.analysis.drawing import Cell, Renderable, percent

# Maps of longer texts are drawn without token labels.
MOST_NAMED = 60
# Distances shown in a terminal.
SHOWN = (-64, -16, -4, -2, -1, 0, 1, 2, 4, 16, 64)


@dataclass(repr=False)
class Map(Renderable):
    """Attention of each query to the keys.

    Attributes:
      title: heading of the map.
      queries: [t] labels.
      keys: [s] labels.
      shares: [t s] attention probabilities.
    """

    title: str
    queries: list[str]
    keys: list[str]
    shares: np.ndarray

    def rows(self) -> list[list[Cell | str]]:
        """Rows of the table: a query with a cell per key."""
        rows = []
        for query, row in zip(self.queries, self.shares, strict=True):
            cells = [
                Cell("  ", share, f"{query} → {key}: {percent(share)}")
                for key, share in zip(self.keys, row, strict=True)
            ]
            rows.append([query, *cells])
        return rows

    def html(self) -> str:
        named = max(len(self.queries), len(self.keys)) <= MOST_NAMED
        table = drawing.html_table(["", *self.keys], self.rows()) if named else self.image()
        return drawing.heading(self.title) + table

    def image(self) -> str:
        """The map as an image, without labels."""

        def draw(figure):
            axes = figure.add_subplot()
            axes.imshow(self.shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set(xlabel="key", ylabel="query")

        return drawing.figure_html(draw, 8, 6)

    def terminal(self) -> list[Any]:
        rows = []
        for query, row in zip(self.queries, self.shares, strict=True):
            best = np.argsort(-row, kind="stable")[:3]
            most = ", ".join(f"{self.keys[key]} {percent(row[key])}" for key in best if row[key])
            rows.append([query, drawing.shades(row), most])
        names = ["query", f"all {len(self.keys)} keys", "most at"]
        return [self.title, drawing.rich_table(names, rows)]


KINDS = {
    "encoder": "The encoder's attention to its own tokens",
    "decoder": "The decoder's attention to its own past",
    "cross": "The decoder's attention to the inputs",
}


@dataclass(repr=False)
class AttentionMaps(Renderable):
    """Attention probabilities of every layer and head; None for attention that the model lacks.

    Attributes:
      inputs: [s] labels of the encoder's inputs.
      tokens: [t] labels of the decoder's inputs.
      decoder: [layers n t t] self-attention of the decoder.
      cross: [layers n t s] attention of the decoder to the inputs.
      encoder: [layers n s s] self-attention of the encoder.

    In a merged decoder a row of `decoder` and the row of `cross` beside it sum to 1 together.
    """

    inputs: list[str]
    tokens: list[str]
    decoder: np.ndarray
    cross: np.ndarray | None
    encoder: np.ndarray | None
    title = "Attention"

    @property
    def kinds(self) -> list[str]:
        """Kinds of attention of the model, the most informative first."""
        order = ("cross", "encoder", "decoder")
        return [kind for kind in order if getattr(self, kind) is not None]

    def map(self, kind: str, layer: int | None = None, head: int | None = None) -> Map:
        """Attention of one head, or the mean of a layer's heads.

        Args:
          kind: "encoder", "decoder" or "cross".
          layer: number from 1; None for the last.
          head: number from 0; None for the mean.

        Raises:
          ValueError: the model lacks such an attention, layer or head.
        """
        if kind not in KINDS:
            raise ValueError(f"Attention is of the kinds {', '.join(KINDS)}; got {kind!r}")
        shares = getattr(self, kind)
        if shares is None:
            raise ValueError(f"A decoder alone has no {kind} attention; it has {self.kinds}")
        layers, heads = shares.shape[:2]
        layer = layers if layer is None else layer
        if not 1 <= layer <= layers:
            raise ValueError(f"Layers are counted from 1 to {layers}; got layer={layer}")
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"Heads are counted from 0 to {heads - 1}; got head={head}")
        chosen = shares[layer - 1].mean(axis=0) if head is None else shares[layer - 1, head]
        what = "mean of its heads" if head is None else f"head {head}"
        title = f"{KINDS[kind]}: layer {layer} of {layers}, {what}"
        queries = self.inputs if kind == "encoder" else self.tokens
        keys = self.tokens if kind == "decoder" else self.inputs
        return Map(title, queries, keys, chosen)

    def all_heads(self, kind: str) -> str:
        """An image of every head: layers downward, heads to the right."""
        shares = getattr(self, kind)
        layers, heads, t, s = shares.shape
        wide = np.full((layers, heads, t + 1, s + 1), np.nan, np.float32)
        wide[:, :, :t, :s] = np.sqrt(shares)
        wide = np.transpose(wide, (0, 2, 1, 3)).reshape(layers * (t + 1), heads * (s + 1))

        def draw(figure):
            axes = figure.add_subplot()
            axes.imshow(wide, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_yticks((np.arange(layers) + 0.5) * (t + 1), np.arange(1, layers + 1))
            axes.set_xticks((np.arange(heads) + 0.5) * (s + 1), np.arange(heads))
            axes.set(xlabel="head", ylabel="layer", facecolor="white")

        return drawing.figure_html(draw, min(1.2 * heads, 12) + 1, min(1.2 * layers, 20) + 0.5)

    def html(self) -> str:
        parts = []
        for kind in self.kinds:
            parts += [self.map(kind).html(), self.all_heads(kind)]
        note = "Every head: the darker, the larger the square root of its share."
        return "".join(parts) + drawing.paragraph(note)

    def terminal(self) -> list[Any]:
        return [part for kind in self.kinds for part in self.map(kind).terminal()]


@dataclass(repr=False)
class Positions(Renderable):
    """Relative position bias of T5 (Raffel et al., 2020), with one table, or one per layer.

    Attributes:
      distances: [distances] key position minus query position.
      bias: [tables n distances] by stack: the term added to the scores of each head.
    """

    distances: np.ndarray
    bias: dict[str, np.ndarray]
    title = "Position bias: what a head adds to a score, by how far the key is from the query"

    def html(self) -> str:
        def draw(figure):
            axes = figure.subplots(1, len(self.bias), squeeze=False)[0]
            for one, (stack, bias) in zip(axes, self.bias.items(), strict=True):
                for table in bias:
                    one.plot(self.distances, table.T, linewidth=1)
                one.set(title=stack, xlabel="key minus query", ylabel="bias")
                # Near distances have a bucket each, far ones share them.
                one.set_xscale("symlog", linthresh=8)

        picture = drawing.figure_html(draw, 6 * len(self.bias), 4)
        return drawing.heading(self.title) + picture

    def terminal(self) -> list[Any]:
        columns = [place for place in SHOWN if place in self.distances]
        where = [int(np.flatnonzero(self.distances == place)[0]) for place in columns]
        parts = [self.title]
        for stack, tables in self.bias.items():
            # Of layers with tables of their own the first is shown.
            rows = [[f"head {n}", *map(format_bias, row[where])] for n, row in enumerate(tables[0])]
            names = [stack, *(f"{place:+d}" if place else "0" for place in columns)]
            parts.append(drawing.rich_table(names, rows))
        return parts


def format_bias(bias: float) -> str:
    """Formats a bias; empty for NaN."""
    return "" if np.isnan(bias) else f"{bias:.1f}"
