# SPDX-License-Identifier: Apache-2.0
"""Report of an adapted model: its copied and its new weights, with counts of parameters."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from t5x_lite import config
from t5x_lite.adaptation.adapted_weights import SPREAD
from t5x_lite.adaptation.mapping import EOI, HEAD, AdaptationPlan
from t5x_lite.checkpoints.matching import Leaf

ROWS = {
    "mean": f"new ids: mean of all rows, and {SPREAD:g} of their spread as noise",
    "random": "new ids: drawn as for pretraining",
}
SINGLE = ("embedding", "encoder_embedding", HEAD, EOI)


class ReportRow(NamedTuple):
    """Weights of one part of the model with the same origin.

    Attributes:
      part: the part in words, such as "decoder cross attention".
      origin: the origin in words.
      copied: number of parameters copied.
      new: number of new parameters.
      names: names of the weights as Train.param_groups matches them.
    """

    part: str
    origin: str
    copied: int
    new: int
    names: tuple[str, ...]


class Report(NamedTuple):
    """Origins of the model's weights, and the parts of the sources that are unused.

    Attributes:
      rows: a row per part and origin.
      unread: unused parts of the sources, with their number of parameters.
    """

    rows: tuple[ReportRow, ...]
    unread: tuple[tuple[str, int], ...]

    @property
    def copied(self) -> int:
        """Number of parameters copied."""
        return sum(row.copied for row in self.rows)

    @property
    def new(self) -> int:
        """Number of new parameters."""
        return sum(row.new for row in self.rows)

    def table(self, trains: Mapping[str, str] | None = None) -> Table:
        """The rows and their sum; `trains` describes the training of a weight, by its name."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("weights", "come from", "copied", "new", *(["train"] if trains else [])):
            number = heading in ("copied", "new")
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            training = sorted({trains[name] for name in row.names}) if trains else []
            cells = [", ".join(training)] if trains else []
            table.add_row(row.part, row.origin, f"{row.copied:,}", f"{row.new:,}", *cells)
        table.add_row("all", "", f"{self.copied:,}", f"{self.new:,}", style="bold")
        for part, count in self.unread:
            table.add_row("", f"not read: {part}, {count:,}")
        return table

    def text(self, trains: Mapping[str, str] | None = None) -> str:
        """The table as plain text."""
        # Text in a notebook too, where rich would draw instead.
        file = io.StringIO()
        Console(file=file, width=140, force_jupyter=False).print(self.table(trains))
        lines = file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines)


def make_report(plan: AdaptationPlan, adaptation: config.Adaptation) -> Report:
    """Makes the report of a plan."""
    rows: dict[tuple[str, str], ReportRow] = {}
    for path in plan.origins:
        for where, old, new in describe_origin(plan, adaptation, path):
            key = part_name(path), where
            row = rows.get(key, ReportRow(*key, 0, 0, ()))
            names = (*row.names, path.replace("/", "."))
            rows[key] = row._replace(copied=row.copied + old, new=row.new + new, names=names)
    unread: dict[str, int] = {}
    for (source, path), leaf in plan.unread.items():
        part = f"{part_name(path)} of {Path(getattr(adaptation, source)).name}"
        unread[part] = unread.get(part, 0) + leaf_size(leaf)
    return Report(tuple(rows.values()), tuple(unread.items()))


def leaf_size(leaf: Leaf) -> int:
    """Number of parameters of a weight."""
    return math.prod(leaf.shape)


def part_name(path: str) -> str:
    """The part in words: "decoder cross attention", "encoder mlp", "embedding"."""
    part, *inside = path.split("/")
    if part in SINGLE:
        return part.replace("_", " ")
    if inside[0] == "layers":
        return f"{part} {inside[1].replace('_', ' ')}"
    return f"{part} {inside[0].replace('_', ' ')}"


def describe_origin(
    plan: AdaptationPlan, adaptation: config.Adaptation, path: str
) -> list[tuple[str, int, int]]:
    """Describes the origin of a weight.

    Args:
      plan: the plan.
      adaptation: config of the adaptation.
      path: path of the model's weight.

    Returns:
      Triples of the origin in words and the numbers of copied and of new parameters.
    """
    origin, count = plan.origins[path], leaf_size(plan.leaves[path])
    scale = "" if origin.scale == 1 else f", times {origin.scale:g}"
    if origin.kind == "new":
        return [(f"new: drawn as for pretraining{scale}", 0, count)]
    where = f"{part_name(origin.path)} of {Path(getattr(adaptation, origin.source)).name}"
    if origin.kind == "bias":
        return [(f"{where}, by distance", count, 0)]
    if origin.kind == "row":
        return [(f"row {plan.model.eoi} of {where}", count, 0)]
    if origin.kind == "copied":
        return [(f"{where}{scale}", count, 0)]
    old = count // plan.model.vocab * plan.side(path).model.vocab
    return [(where, old, 0), (ROWS[adaptation.rows], 0, count - old)]
