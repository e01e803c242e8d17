# SPDX-License-Identifier: Apache-2.0
"""Where a model looks: how attention is shared, and what positions add to it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.analysis import drawing
from t5x_lite.analysis.drawing import Cell, View, percent

# Maps of longer texts are drawn without the names of their tokens.
MOST_NAMED = 60
# Distances that a terminal has room for.
SHOWN = (-64, -16, -4, -2, -1, 0, 1, 2, 4, 16, 64)


@dataclass(repr=False)
class Map(View):
    """Who looks at whom: shares [t s] of the attention of each query among the keys."""

    title: str
    queries: list[str]
    keys: list[str]
    shares: np.ndarray

    def rows(self) -> list[list[Cell | str]]:
        found = []
        for query, row in zip(self.queries, self.shares, strict=True):
            hint = lambda key, share, query=query: f"{query} → {key}: {percent(share)}"
            cells = [Cell("  ", s, hint(k, s)) for k, s in zip(self.keys, row, strict=True)]
            found.append([query, *cells])
        return found

    def html(self) -> str:
        named = max(len(self.queries), len(self.keys)) <= MOST_NAMED
        made = drawing.table(["", *self.keys], self.rows()) if named else self.drawn()
        return drawing.heading(self.title) + made

    def drawn(self) -> str:
        def draw(figure):
            axes = figure.add_subplot()
            axes.imshow(self.shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set(xlabel="key", ylabel="query")

        return drawing.picture(draw, 8, 6)

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
class Attention(View):
    """How attention is shared in every layer and head.

    encoder [layers n s s], decoder [layers n t t], cross [layers n t s]; None for what the model
    does not have. inputs [s] and tokens [t] are labels of what the encoder and the decoder read.
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
        """Which there are, what tells most first."""
        order = ("cross", "encoder", "decoder")
        return [kind for kind in order if getattr(self, kind) is not None]

    def map(self, kind: str, layer: int | None = None, head: int | None = None) -> Map:
        """One head (counted from 0) of a layer (from 1; without it the last), or their mean.

        Raises:
          ValueError: the model has no such attention, layer or head.
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
        """An image of every head: layers downwards, heads to the right."""
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

        return drawing.picture(draw, min(1.2 * heads, 12) + 1, min(1.2 * layers, 20) + 0.5)

    def html(self) -> str:
        parts = []
        for kind in self.kinds:
            parts += [self.map(kind).html(), self.all_heads(kind)]
        note = "Every head: the darker, the larger the square root of its share."
        return "".join(parts) + drawing.paragraph(note)

    def terminal(self) -> list[Any]:
        return [part for kind in self.kinds for part in self.map(kind).terminal()]


@dataclass(repr=False)
class Positions(View):
    """T5's relative position bias: bias[stack] [tables n distances] is what each head adds to the
    scores of a key `distances` places after the query; one table, or one for each layer."""

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

        picture = drawing.picture(draw, 6 * len(self.bias), 4)
        return drawing.heading(self.title) + picture

    def terminal(self) -> list[Any]:
        columns = [place for place in SHOWN if place in self.distances]
        where = [int(np.flatnonzero(self.distances == place)[0]) for place in columns]
        found = [self.title]
        for stack, tables in self.bias.items():
            # Of layers with tables of their own the first is shown.
            rows = [[f"head {n}", *map(shown, row[where])] for n, row in enumerate(tables[0])]
            names = [stack, *(f"{place:+d}" if place else "0" for place in columns)]
            found.append(drawing.rich_table(names, rows))
        return found


def shown(bias: float) -> str:
    return "" if np.isnan(bias) else f"{bias:.1f}"
