# SPDX-License-Identifier: Apache-2.0
"""What of an adapted model was copied and what is new, with counts of parameters."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from t5x_lite import config
from t5x_lite.adaptation.adapted import SPREAD
from t5x_lite.adaptation.mapping import EOI, HEAD, PROJECTION, Plan
from t5x_lite.conversion.matching import Leaf

ROWS = {
    "mean": f"new ids: mean of all rows, and {SPREAD:g} of their spread as noise",
    "random": "new ids: drawn as for pretraining",
}
SINGLE = ("embedding", "encoder_embedding", HEAD, EOI, PROJECTION)


class Row(NamedTuple):
    """Weights of one part that come from one place. `names` as Train.parts knows them."""

    part: str
    origin: str
    copied: int
    new: int
    names: tuple[str, ...]


class Report(NamedTuple):
    """Row by row where the model's weights come from, and what of the sources was not read."""

    rows: tuple[Row, ...]
    unread: tuple[tuple[str, int], ...]

    @property
    def copied(self) -> int:
        return sum(row.copied for row in self.rows)

    @property
    def new(self) -> int:
        return sum(row.new for row in self.rows)

    def table(self, trains: Mapping[str, str] | None = None) -> Table:
        """The rows and their sum; `trains` says of a weight's name how it trains."""
        made = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("weights", "come from", "copied", "new", *(["train"] if trains else [])):
            number = heading in ("copied", "new")
            made.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            how = sorted({trains[name] for name in row.names}) if trains else []
            cells = [", ".join(how)] if trains else []
            made.add_row(row.part, row.origin, f"{row.copied:,}", f"{row.new:,}", *cells)
        made.add_row("all", "", f"{self.copied:,}", f"{self.new:,}", style="bold")
        for part, count in self.unread:
            made.add_row("", f"not read: {part}, {count:,}")
        return made

    def text(self, trains: Mapping[str, str] | None = None) -> str:
        """The table as plain text."""
        # Text in a notebook too, where rich would draw instead.
        console = Console(file=io.StringIO(), width=140, force_jupyter=False)
        console.print(self.table(trains))
        lines = console.file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines)


def of(plan: Plan, how: config.Adaptation) -> Report:
    """The report of a plan."""
    rows: dict[tuple[str, str], Row] = {}
    for path in plan.pieces:
        for where, old, new in origins(plan, how, path):
            key = part_of(path), where
            row = rows.get(key, Row(*key, 0, 0, ()))
            names = (*row.names, path.replace("/", "."))
            rows[key] = row._replace(copied=row.copied + old, new=row.new + new, names=names)
    unread: dict[str, int] = {}
    for (source, path), leaf in plan.unread.items():
        part = f"{part_of(path)} of {Path(getattr(how, source)).name}"
        unread[part] = unread.get(part, 0) + size(leaf)
    return Report(tuple(rows.values()), tuple(unread.items()))


def size(leaf: Leaf) -> int:
    return math.prod(leaf.shape)


def part_of(path: str) -> str:
    """The part in words: "decoder cross attention", "encoder mlp", "embedding"."""
    part, *inside = path.split("/")
    if part in SINGLE:
        return part.replace("_", " ")
    if inside[0] == "layers":
        return f"{part} {inside[1].replace('_', ' ')}"
    return f"{part} {inside[0].replace('_', ' ')}"


def origins(plan: Plan, how: config.Adaptation, path: str) -> list[tuple[str, int, int]]:
    """Where the weight comes from, in words, with how many numbers are copied and new."""
    piece, count = plan.pieces[path], size(plan.leaves[path])
    scale = "" if piece.scale == 1 else f", times {piece.scale:g}"
    if piece.how == "new":
        return [(f"new: drawn as for pretraining{scale}", 0, count)]
    where = f"{part_of(piece.path)} of {Path(getattr(how, piece.source)).name}"
    if piece.how == "bias":
        return [(f"{where}, by distance", count, 0)]
    if piece.how == "row":
        return [(f"row {plan.model.eoi} of {where}", count, 0)]
    if piece.how == "copied":
        return [(f"{where}{scale}", count, 0)]
    old = count // plan.model.vocab * plan.side(path).model.vocab
    return [(where, old, 0), (ROWS[how.rows], 0, count - old)]
