# SPDX-License-Identifier: Apache-2.0
"""Texts drawn by who guessed each of their tokens, and by which call wrote it: HTML, PNG, terminal.

A block is what one call wrote: guesses that held, in the colour of their drafter, and then a token
of the model's own, which has none.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.evaluation.predict import Prediction

# Okabe and Ito's colours, which the colour-blind tell apart, light enough for black text.
COLOURS = ("#9ad0f5", "#f7d36b", "#8fdcc0", "#f2b6d2", "#f0a873", "#c7c2ee", "#d9d9d9")
COLUMNS = 100


class Drawn(NamedTuple):
    """One text: its input, and of every token the words it adds, its call and who guessed it."""

    input: str
    pieces: list[str]
    calls: list[int]
    guessed: list[str]

    @property
    def caption(self) -> str:
        count = len(set(self.calls))
        each = len(self.calls) / count if count else 0
        return f"{len(self.calls)} tokens in {count} calls, {each:.2f} each"


def drawn(input: str, prediction: Prediction, vocabulary: Vocabulary) -> Drawn:
    """The best text of a prediction, token by token."""
    ids = prediction.tokens[0]
    texts = [vocabulary.decode(ids[:length]) for length in range(len(ids) + 1)]
    pieces = [
        after[len(before) :] if after.startswith(before) else vocabulary.decode([token])
        for token, before, after in zip(ids, texts, texts[1:], strict=False)
    ]
    return Drawn(input, pieces, prediction.calls, prediction.guessed)


def colours(texts: Sequence[Drawn]) -> dict[str, str]:
    """A colour for every drafter that guessed something."""
    names = sorted({name for text in texts for name in text.guessed} - {"model"})
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def draw(path: str, texts: Sequence[Drawn]) -> None:
    """Writes the texts to path, an .html or .png.

    Raises:
      ValueError: it ends in neither.
    """
    kind = Path(path).suffix
    if kind == ".html":
        Path(path).write_text(page(texts), encoding="utf-8")
    elif kind == ".png":
        picture(path, texts)
    else:
        raise ValueError(f"--draw={path}: it must end in .html or .png, or be - for the terminal")


def page(texts: Sequence[Drawn]) -> str:
    """A page that needs nothing but itself."""
    colour = colours(texts)
    legend = "".join(
        f'<span style="background:{shade}">{html.escape(name)}</span> '
        for name, shade in colour.items()
    )
    body = "\n".join(paragraph(text, colour) for text in texts)
    return (
        '<!doctype html>\n<meta charset="utf-8">\n<title>Accepted blocks</title>\n'
        "<style>body{font:15px/2 monospace;max-width:60em;margin:2em auto}"
        "pre{white-space:pre-wrap}b{font-weight:400;border-left:2px solid #777;padding-left:1px}"
        "span{padding:2px 0}small{color:#555}</style>\n"
        f"<p>Coloured: guessed by {legend or 'nobody'}; plain: the model's own. A line begins what "
        f"one forward pass wrote.</p>\n{body}\n"
    )


def paragraph(text: Drawn, colour: dict[str, str]) -> str:
    """One text as HTML."""
    parts, before = [], None
    for piece, call, name in zip(text.pieces, text.calls, text.guessed, strict=True):
        shade = f' style="background:{colour[name]}"' if name in colour else ""
        said = html.escape(f"call {call}: {name}")
        span = f'<span title="{said}"{shade}>{html.escape(piece)}</span>'
        parts.append(f"<b>{span}</b>" if call != before else span)
        before = call
    title = html.escape(text.input[:200])
    return f"<p><small>{title}<br>{text.caption}</small></p>\n<pre>{''.join(parts)}</pre>"


def terminal(texts: Sequence[Drawn]) -> str:
    """The texts with colours of the terminal; a bar begins what one forward pass wrote."""
    from rich.console import Console
    from rich.text import Text

    colour, console = colours(texts), Console(highlight=False, force_jupyter=False)
    with console.capture() as captured:
        for name, shade in colour.items():
            console.print(Text(f" {name} ", style=f"black on {shade}"), end=" ")
        console.print("guessed by; | begins a call" if colour else "no guess held")
        for text in texts:
            line, before = Text(), None
            for piece, call, name in zip(text.pieces, text.calls, text.guessed, strict=True):
                line.append("|" if call != before else "", style="dim")
                line.append(piece, style=f"black on {colour[name]}" if name in colour else "")
                before = call
            console.print(Text(f"{text.input[:80]!r}: {text.caption}", style="dim"))
            console.print(line)
    return captured.get()


class Placed(NamedTuple):
    """A piece of a line: where it stands, in characters, and its token's number."""

    line: int
    column: int
    text: str
    token: int


def laid_out(pieces: Sequence[str]) -> list[Placed]:
    """Pieces broken into lines of COLUMNS characters."""
    found, line, column = [], 0, 0
    for number, piece in enumerate(pieces):
        for part in piece.splitlines(keepends=True) or [""]:
            shown = part.rstrip("\n").replace("\t", "    ")
            if column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            found.append(Placed(line, column, shown, number))
            column += len(shown)
            if part.endswith("\n"):
                line, column = line + 1, 0
    return found


def picture(path: str, texts: Sequence[Drawn]) -> None:
    """The texts as an image, in a monospaced font."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    colour, rows, top = colours(texts), [laid_out(text.pieces) for text in texts], []
    lines = 0
    for placed in rows:
        top.append(lines)
        lines += 3 + max((piece.line for piece in placed), default=0)
    figure = Figure(figsize=(0.09 * COLUMNS + 0.6, 0.24 * lines + 0.8))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(lines + 2, -1))
    axes.axis("off")
    font = {"family": "monospace", "fontsize": 9.0, "va": "center", "parse_math": False}
    for text, placed, first in zip(texts, rows, top, strict=True):
        axes.text(0, first, f"{text.input[:60]!r}: {text.caption}", color="#555", **font)
        before = None
        for piece in placed:
            call, name = text.calls[piece.token], text.guessed[piece.token]
            y = first + 1 + piece.line
            if name in colour and piece.text:
                box = (piece.column, y - 0.45), len(piece.text), 0.9
                axes.add_patch(Rectangle(*box, color=colour[name], linewidth=0))
            if call != before:
                axes.plot([piece.column] * 2, [y - 0.45, y + 0.45], color="#555", linewidth=1)
            before = call
            for place, character in enumerate(piece.text):
                axes.text(piece.column + place, y, character, **font)
    handles = [Patch(color=shade, label=name) for name, shade in colour.items()]
    if handles:
        axes.legend(handles=handles, loc="lower right", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
