# SPDX-License-Identifier: Apache-2.0
"""Tables, shades and figures of views: HTML for notebooks, rich for terminals."""

import base64
import html
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.tokenizers.vocabulary import TextVocabulary

SHADES = " ░▒▓█"
# Columns of text that is not printed to a terminal.
WIDTH = 120
# The most columns of a table in a terminal; others are left out, evenly.
MOST_COLUMNS = 8
# Column names up to this length are not truncated.
WHOLE = 11
BLUE, RED, GREEN = (33, 102, 172), (178, 24, 43), (26, 152, 80)


# Mark of a space, which would be invisible at the edge of a token (as in SentencePiece).
SPACE = "▁"
MARKS = {"\n": "⏎", "\t": "⇥"}


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      text: its text.
      share: strength of its background color, in 0..1.
      hint: tooltip in HTML.
      color: RGB of the background.
    """

    text: str
    share: float = 0.0
    hint: str = ""
    color: tuple[int, int, int] = BLUE


class Renderable:
    """Base class of views: rendered in a notebook by `_repr_html_`, in a terminal by print.

    Subclasses implement `html` and `terminal`.
    """

    def html(self) -> str:
        """The view as HTML."""
        raise NotImplementedError

    def terminal(self) -> list[Any]:
        """Tables and texts of rich, one below the other."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto;font-family:sans-serif">{self.html()}</div>'

    def __rich_console__(self, console, options):
        yield from self.terminal()

    def __str__(self) -> str:
        return render_text(self)

    __repr__ = __str__


def render_text(view: Renderable) -> str:
    """Renders a view as text, in color if the output is a terminal."""
    from rich.console import Console

    colored = sys.stdout.isatty()
    buffer = io.StringIO()
    width = None if colored else WIDTH
    # Without force_jupyter=False rich would display the view a second time in a notebook.
    console = Console(file=buffer, force_terminal=colored, force_jupyter=False, width=width)
    console.print(view)
    return buffer.getvalue().rstrip("\n")


def heading(text: str) -> str:
    """A heading in HTML."""
    return f'<h4 style="margin:0.8em 0 0.3em">{html.escape(text)}</h4>'


def paragraph(text: str) -> str:
    """A paragraph in HTML."""
    return f'<p style="margin:0.3em 0">{html.escape(text)}</p>'


def html_table(names: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table in HTML; its content is escaped."""
    # Overrides the style of notebooks: striped rows, text aligned right.
    cell = "border:1px solid rgba(128,128,128,0.25);padding:2px 6px;text-align:left"
    row_style = '<tr style="background:none">'
    head = "".join(f'<th style="{cell}">{html.escape(name)}</th>' for name in names)
    body = "".join(
        row_style + "".join(html_cell(each, cell) for each in row) + "</tr>" for row in rows
    )
    style = "border-collapse:collapse;font-size:13px;white-space:pre"
    return f'<table style="{style}">{row_style}{head}</tr>{body}</table>'


def html_cell(cell: Cell | str, style: str) -> str:
    """A cell in HTML."""
    cell = Cell(cell) if isinstance(cell, str) else cell
    if cell.share > 0:
        red, green, blue = cell.color
        # Dark text is unreadable on a background above 0.75.
        style += f";background:rgba({red},{green},{blue},{0.75 * min(cell.share, 1):.3f})"
    hint = f' title="{html.escape(cell.hint)}"' if cell.hint else ""
    return f'<td style="{style}"{hint}>{html.escape(cell.text)}</td>'


def rich_table(names: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> Any:
    """A table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        least = min(len(name), WHOLE)
        table.add_column(Text(name), overflow="ellipsis", no_wrap=True, min_width=least)
    for row in rows:
        table.add_row(*(rich_cell(cell) for cell in row))
    return table


def rich_cell(cell: Cell | str) -> Any:
    """A cell for a terminal."""
    from rich.text import Text

    cell = Cell(cell) if isinstance(cell, str) else cell
    if cell.share <= 0:
        return Text(cell.text)
    red, green, blue = (round(255 - (255 - part) * min(cell.share, 1)) for part in cell.color)
    ink = "white" if cell.share > 0.6 else "black"
    return Text(cell.text, style=f"{ink} on rgb({red},{green},{blue})")


def percent(share: float) -> str:
    """Formats a share in percent."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def shades(row: np.ndarray) -> str:
    """One character for each share of a row, the darker the larger."""
    steps = np.minimum((np.sqrt(np.clip(row, 0, 1)) * len(SHADES)).astype(int), len(SHADES) - 1)
    return "".join(SHADES[step] for step in steps)


def spread_evenly(count: int, most: int = MOST_COLUMNS) -> list[int]:
    """At most `most` of range(count), evenly spaced, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def figure_html(draw: Callable[[Any], None], width: float, height: float) -> str:
    """Draws a matplotlib figure as an inline HTML image.

    Args:
      draw: function that draws on the figure.
      width: in inches.
      height: in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=96)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" style="max-width:100%" src="data:image/png;base64,{code}">'


def token_label(vocabulary: TextVocabulary, token: int, start: int | None = None) -> str:
    """The text that a token adds to a preceding text, with visible spaces and line ends.

    Args:
      vocabulary: vocabulary of the token.
      token: its id.
      start: the model's start token, which is labeled <start>; None without one.

    Returns:
      The text, or <end>, <pad>, <start> or <id> for ids without text.
    """
    if token in vocabulary.stops:
        return "<end>"
    if token == start:
        return "<start>"
    if token == vocabulary.pad:
        return "<pad>"
    # A token may lose its space at the beginning of a text, so it is decoded after itself.
    alone, twice = vocabulary.decode([token]), vocabulary.decode([token, token])
    text = twice[len(alone) :] if alone and twice.startswith(alone) else alone
    separator = getattr(vocabulary, "separator", "")
    text = text.removeprefix(separator) if separator else text
    if not text.strip("\ufffd"):
        return f"<{token}>"
    for character, mark in MARKS.items():
        text = text.replace(character, mark)
    return text.replace(" ", SPACE)


def token_labels(
    vocabulary: TextVocabulary, ids: Sequence[int], start: int | None = None
) -> list[str]:
    """Labels of tokens.

    Args:
      vocabulary: vocabulary of the tokens.
      ids: the tokens.
      start: the model's start token; None without one.
    """
    return [token_label(vocabulary, int(token), start) for token in ids]
