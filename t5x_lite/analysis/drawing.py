# SPDX-License-Identifier: Apache-2.0
"""What views are drawn with: tables and shades, for a notebook as HTML and for a terminal."""

import base64
import html
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SHADES = " ░▒▓█"
# Of text that goes elsewhere than to a terminal.
WIDTH = 120
# Of a table that a terminal can show, columns beyond these are left out, evenly.
MOST_COLUMNS = 8
# Names of columns up to this long are not cut.
WHOLE = 11
BLUE, RED, GREEN = (33, 102, 172), (178, 24, 43), (26, 152, 80)


class Cell(NamedTuple):
    """A text; share, in 0..1, is how strongly its ground is coloured."""

    text: str
    share: float = 0.0
    hint: str = ""
    color: tuple[int, int, int] = BLUE


class View:
    """Something that draws itself: in a notebook by `_repr_html_`, in a terminal by print.

    A kind of view says what it shows by `html` and `terminal`.
    """

    def html(self) -> str:
        raise NotImplementedError

    def terminal(self) -> list[Any]:
        """Tables and texts of rich, one below the other."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto;font-family:sans-serif">{self.html()}</div>'

    def __rich_console__(self, console, options):
        yield from self.terminal()

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


def printed(view: View) -> str:
    """view as text, with colours where the output is a terminal that has them."""
    from rich.console import Console

    colored = sys.stdout.isatty()
    held = io.StringIO()
    width = None if colored else WIDTH
    # In a notebook rich would draw the view there and then, beside what `_repr_html_` draws.
    console = Console(file=held, force_terminal=colored, force_jupyter=False, width=width)
    console.print(view)
    return held.getvalue().rstrip("\n")


def heading(text: str) -> str:
    return f'<h4 style="margin:0.8em 0 0.3em">{html.escape(text)}</h4>'


def paragraph(text: str) -> str:
    return f'<p style="margin:0.3em 0">{html.escape(text)}</p>'


def table(names: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """An HTML table; what is in it is text and never markup."""
    # Notebooks have a style of their own for tables: striped rows, text to the right.
    cell = "border:1px solid rgba(128,128,128,0.25);padding:2px 6px;text-align:left"
    row_style = '<tr style="background:none">'
    head = "".join(f'<th style="{cell}">{html.escape(name)}</th>' for name in names)
    body = "".join(
        row_style + "".join(html_cell(each, cell) for each in row) + "</tr>" for row in rows
    )
    style = "border-collapse:collapse;font-size:13px;white-space:pre"
    return f'<table style="{style}">{row_style}{head}</tr>{body}</table>'


def html_cell(cell: Cell | str, style: str) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    if cell.share > 0:
        red, green, blue = cell.color
        # Over 0.75 of the ground dark text is no longer read on it.
        style += f";background:rgba({red},{green},{blue},{0.75 * min(cell.share, 1):.3f})"
    hint = f' title="{html.escape(cell.hint)}"' if cell.hint else ""
    return f'<td style="{style}"{hint}>{html.escape(cell.text)}</td>'


def rich_table(names: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> Any:
    """The same table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        least = min(len(name), WHOLE)
        made.add_column(Text(name), overflow="ellipsis", no_wrap=True, min_width=least)
    for row in rows:
        made.add_row(*(rich_cell(cell) for cell in row))
    return made


def rich_cell(cell: Cell | str) -> Any:
    from rich.text import Text

    cell = Cell(cell) if isinstance(cell, str) else cell
    if cell.share <= 0:
        return Text(cell.text)
    red, green, blue = (round(255 - (255 - part) * min(cell.share, 1)) for part in cell.color)
    ink = "white" if cell.share > 0.6 else "black"
    return Text(cell.text, style=f"{ink} on rgb({red},{green},{blue})")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def shades(row: np.ndarray) -> str:
    """One character for each share of a row, the darker the larger."""
    steps = np.minimum((np.sqrt(np.clip(row, 0, 1)) * len(SHADES)).astype(int), len(SHADES) - 1)
    return "".join(SHADES[step] for step in steps)


def spread(count: int, most: int = MOST_COLUMNS) -> list[int]:
    """At most `most` of range(count), evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def picture(draw: Callable[[Any], None], width: float, height: float) -> str:
    """An HTML image, held in the text itself, of what draw(figure) puts on a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=96)
    code = base64.b64encode(held.getvalue()).decode()
    return f'<img alt="" style="max-width:100%" src="data:image/png;base64,{code}">'
