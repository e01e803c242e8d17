# SPDX-License-Identifier: Apache-2.0
"""Report on drafting: texts by the drafter and the forward pass of each token, as HTML, PNG or in
the terminal, and a comparison with plain decoding.

A block is the tokens that one forward pass wrote: accepted drafts, in the color of their drafter,
and then one token of the model's own, without color.
"""

import html
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from t5x_lite import config
from t5x_lite.evaluation.prediction import Prediction
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.paths import parse_output_path

# Okabe and Ito's colors, made for color-blind readers, light enough for black text.
COLORS = ("#9ad0f5", "#f7d36b", "#8fdcc0", "#f2b6d2", "#f0a873", "#c7c2ee", "#d9d9d9")
COLUMNS = 100
# Most texts in a picture, and most differences that are printed one by one.
MAX_DRAWN, MAX_DIFFERENCES = 20, 5


class DraftedText(NamedTuple):
    """One text, token by token.

    Attributes:
      input: input of the model.
      pieces: text that each token adds.
      calls: the forward pass that wrote each token.
      drafted_by: the drafter that had proposed each token ("model" if none).
    """

    input: str
    pieces: list[str]
    calls: list[int]
    drafted_by: list[str]

    @property
    def caption(self) -> str:
        """Tokens and forward passes of the text."""
        count = len(set(self.calls))
        each = len(self.calls) / count if count else 0
        return f"{len(self.calls)} tokens in {count} passes, {each:.2f} each"


def draft_text(input: str, prediction: Prediction, vocabulary: TextVocabulary) -> DraftedText:
    """The best text of a prediction, token by token.

    Args:
      input: input of the model.
      prediction: what it wrote.
      vocabulary: of the targets.
    """
    ids = prediction.tokens[0]
    texts = [vocabulary.decode(ids[:length]) for length in range(len(ids) + 1)]
    pieces = [
        after[len(before) :] if after.startswith(before) else vocabulary.decode([token])
        for token, before, after in zip(ids, texts, texts[1:], strict=False)
    ]
    return DraftedText(input, pieces, prediction.calls, prediction.drafted_by)


def drafter_colors(texts: Sequence[DraftedText]) -> dict[str, str]:
    """A color for every drafter with an accepted token."""
    names = sorted({name for text in texts for name in text.drafted_by} - {"model"})
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


def write_picture(path: str, texts: Sequence[DraftedText]) -> None:
    """Writes the texts to path, an .html or .png.

    Raises:
      ValueError: it ends in neither.
    """
    kind = Path(path).suffix
    if kind == ".html":
        parse_output_path(path).write_text(html_page(texts), encoding="utf-8")
    elif kind == ".png":
        with parse_output_path(path).open("wb") as picture:
            write_png(picture, texts)
    else:
        raise ValueError(f"--draw={path}: it must end in .html or .png, or be - for the terminal")


def html_page(texts: Sequence[DraftedText]) -> str:
    """A self-contained HTML page."""
    color = drafter_colors(texts)
    legend = "".join(
        f'<span style="background:{shade}">{html.escape(name)}</span> '
        for name, shade in color.items()
    )
    body = "\n".join(html_paragraph(text, color) for text in texts)
    return (
        '<!doctype html>\n<meta charset="utf-8">\n<title>Accepted blocks</title>\n'
        "<style>body{font:15px/2 monospace;max-width:60em;margin:2em auto}"
        "pre{white-space:pre-wrap}b{font-weight:400;border-left:2px solid #777;padding-left:1px}"
        "span{padding:2px 0}small{color:#555}</style>\n"
        f"<p>Colored: drafted by {legend or 'no drafter'}; plain: the model's own. A line begins "
        f"what one forward pass wrote.</p>\n{body}\n"
    )


def html_paragraph(text: DraftedText, color: dict[str, str]) -> str:
    """One text as HTML."""
    parts, before = [], None
    for piece, call, name in zip(text.pieces, text.calls, text.drafted_by, strict=True):
        shade = f' style="background:{color[name]}"' if name in color else ""
        title_text = html.escape(f"call {call}: {name}")
        span = f'<span title="{title_text}"{shade}>{html.escape(piece)}</span>'
        parts.append(f"<b>{span}</b>" if call != before else span)
        before = call
    title = html.escape(text.input[:200])
    return f"<p><small>{title}<br>{text.caption}</small></p>\n<pre>{''.join(parts)}</pre>"


def terminal_text(texts: Sequence[DraftedText]) -> str:
    """The texts with colors of the terminal; a bar begins what one forward pass wrote."""
    from rich.console import Console
    from rich.text import Text

    color, console = drafter_colors(texts), Console(highlight=False, force_jupyter=False)
    with console.capture() as captured:
        for name, shade in color.items():
            console.print(Text(f" {name} ", style=f"black on {shade}"), end=" ")
        console.print("drafted by; | begins a forward pass" if color else "no draft was accepted")
        for text in texts:
            line, before = Text(), None
            for piece, call, name in zip(text.pieces, text.calls, text.drafted_by, strict=True):
                line.append("|" if call != before else "", style="dim")
                line.append(piece, style=f"black on {color[name]}" if name in color else "")
                before = call
            console.print(Text(f"{text.input[:80]!r}: {text.caption}", style="dim"))
            console.print(line)
    return captured.get()


class PlacedPiece(NamedTuple):
    """A piece of text on a line.

    Attributes:
      line: number of the line.
      column: position in the line, in characters.
      text: characters to draw.
      token: number of its token.
    """

    line: int
    column: int
    text: str
    token: int


def lay_out(pieces: Sequence[str]) -> list[PlacedPiece]:
    """Breaks pieces into lines of COLUMNS characters."""
    placed, line, column = [], 0, 0
    for number, piece in enumerate(pieces):
        for part in piece.splitlines(keepends=True) or [""]:
            shown = part.rstrip("\n").replace("\t", "    ")
            if column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            placed.append(PlacedPiece(line, column, shown, number))
            column += len(shown)
            if part.endswith("\n"):
                line, column = line + 1, 0
    return placed


def write_png(picture: IO[bytes], texts: Sequence[DraftedText]) -> None:
    """Writes the texts to a stream as an image, in a monospaced font."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    color, rows, top = drafter_colors(texts), [lay_out(text.pieces) for text in texts], []
    lines = 0
    for placed in rows:
        top.append(lines)
        lines += 3 + max((piece.line for piece in placed), default=0)
    figure = Figure(figsize=(0.09 * COLUMNS + 0.6, 0.24 * lines + 0.8))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(lines + 2, -1))
    axes.axis("off")
    font: dict[str, Any] = {
        "family": "monospace",
        "fontsize": 9.0,
        "va": "center",
        "parse_math": False,
    }
    for text, placed, first in zip(texts, rows, top, strict=True):
        axes.text(0, first, f"{text.input[:60]!r}: {text.caption}", color="#555", **font)
        before = None
        for piece in placed:
            call, name = text.calls[piece.token], text.drafted_by[piece.token]
            y = first + 1 + piece.line
            if name in color and piece.text:
                box = (piece.column, y - 0.45), len(piece.text), 0.9
                axes.add_patch(Rectangle(*box, color=color[name], linewidth=0))
            if call != before:
                axes.plot([piece.column] * 2, [y - 0.45, y + 0.45], color="#555", linewidth=1)
            before = call
            for place, character in enumerate(piece.text):
                axes.text(piece.column + place, y, character, **font)
    handles = [Patch(color=shade, label=name) for name, shade in color.items()]
    if handles:
        axes.legend(handles=handles, loc="lower right", ncols=len(handles), frameon=False)
    figure.savefig(picture, dpi=110, format="png")


class DraftReport:
    """Report on the drafting of a stream of predictions; printed and drawn by `close`.

    Attributes:
      verify: true to compare every text with that of plain decoding.
      path: picture to write, "-" for the terminal, or None.
    """

    def __init__(self, verify: bool, draw: str | None):
        """Begins a report.

        Raises:
          ValueError: `draw` is not a picture that can be written.
        """
        if draw not in (None, "-") and Path(draw).suffix not in (".html", ".png"):
            raise ValueError(f"--draw={draw}: it must end in .html or .png, or be -")
        self.verify, self.path = verify, draw
        self.pictures: list[Any] = []
        self.compared = self.different = 0

    def __call__(
        self,
        predictor: Any,
        texts: Sequence[str],
        rows: Sequence[int],
        decode: config.Decode,
        predictions: Sequence[Prediction],
    ) -> None:
        """Adds predictions to the report.

        Args:
          predictor: the model.
          texts: its inputs.
          rows: numbers of the inputs.
          decode: config of decoding.
          predictions: one for each input.
        """
        room = MAX_DRAWN - len(self.pictures) if self.path else 0
        for text, prediction in list(zip(texts, predictions, strict=True))[:room]:
            self.pictures.append(draft_text(text, prediction, predictor.targets))
        if self.verify:
            self.compare(predictor, texts, rows, decode, predictions)

    def compare(self, predictor, texts, rows, decode, predictions) -> None:
        """Compares predictions with plain decoding, and prints the first differences.

        Args:
          predictor: the model.
          texts: its inputs.
          rows: numbers of the inputs.
          decode: config of decoding.
          predictions: one for each input.
        """
        from t5x_lite.evaluation import drafting

        ids = predictor.encode_inputs(texts)
        differences = drafting.differences_from_plain(predictor, ids, decode, rows, predictions)
        for row, each in zip(rows, differences, strict=True):
            self.compared += 1
            self.different += each is not None
            if each is not None and self.different <= MAX_DIFFERENCES:
                gap = "one text ends there" if math.isnan(each.gap) else f"{each.gap:.2g} nats"
                print(
                    f"text {row + 1} differs from plain decoding at token {each.place + 1}: id "
                    f"{each.drafted} for {each.plain} (plain's is more probable by: {gap})",
                    file=sys.stderr,
                )

    def close(self, predictor: Any) -> None:
        """Prints tokens per forward pass and the result of the comparison, and draws the texts."""
        if predictor.tally.steps:
            print(predictor.tally, file=sys.stderr)
        if self.verify:
            same = self.compared - self.different
            print(f"identical to plain decoding: {same:,} of {self.compared:,}", file=sys.stderr)
        if self.path and self.pictures:
            self.draw(self.path)

    def draw(self, path: str) -> None:
        """Draws the texts to a picture, or to the terminal if path is "-"."""
        if path == "-":
            print(terminal_text(self.pictures), file=sys.stderr)
        else:
            write_picture(path, self.pictures)
            print(f"drawn: {path}", file=sys.stderr)
