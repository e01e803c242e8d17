# SPDX-License-Identifier: Apache-2.0
"""Names in windows of Python code, found by Python's own tokenizer.

A name is an identifier that is no keyword; what stands inside an f-string is text, as before
Python 3.12. A window may begin and end anywhere in a file.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.tokenizers.token_bytes import TokenBytes
from t5x_lite.utils.not_none import not_none

# Messages of the tokenizer about text that goes on where the window ends.
GOES_ON = re.compile(r"EOF|triple-quoted|was never closed")
BLOCK = "if 1:\n"
# Tokens of no Python code, of which some versions make operators and others errors.
STRANGE = ("$", "?", "!", "`", "'", '"', "\\")


class Occurrence(NamedTuple):
    """Tokens of a window that spell a name.

    Attributes:
      begin: number of the first token.
      end: number after the last token.
      spaced: the first token begins with a space, which is no part of the name.
    """

    begin: int
    end: int
    spaced: bool


class NameSpan(NamedTuple):
    """A part of a text, from begin to before end."""

    begin: int
    end: int


class TokenText:
    """Text of windows of tokens.

    Attributes:
      spelled: bytes of the ids of the vocabulary.
      space: the id of a single space; None without one.
    """

    def __init__(self, spelled: TokenBytes):
        self.spelled = spelled
        self.space = next((k for k, text in spelled.by_id.items() if text == b" "), None)

    def find_names(self, ids: np.ndarray) -> dict[str, list[Occurrence]] | None:
        """Occurrences of each name in a window, in the order of the text.

        A name is left out if one of its occurrences shares a token with other text.

        Args:
          ids: tokens of the window [t].

        Returns:
          None for a window that is no Python code.
        """
        pieces = [self.spelled.by_id.get(int(token), b"") for token in ids]
        edges = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        raw = b"".join(pieces)
        # Many tokenizers begin a text with a space that is not written.
        skipped = int(
            raw[:1] == b" " and self.spelled.first.get(int(ids[0])) == pieces[0].removeprefix(b" ")
        )
        spans = lex_bytes(raw[skipped:])
        if spans is None:
            return None
        names: dict[str, list[Occurrence]] = {}
        broken = set()
        for begin, end in spans:
            name = raw[skipped:][begin:end].decode()
            place = find_tokens(edges, raw, NameSpan(begin + skipped, end + skipped))
            if place is None:
                broken.add(name)
            else:
                names.setdefault(name, []).append(place)
        return {name: places for name, places in names.items() if name not in broken}


def find_tokens(edges: np.ndarray, raw: bytes, span: NameSpan) -> Occurrence | None:
    """The tokens of a span of bytes; None if they hold more than it and a space before it.

    Args:
      edges: first byte of each token, and the end of the last.
      raw: bytes of the window.
      span: the bytes of a name.
    """
    # Tokens without bytes have the edge of the one after them.
    begin = int(np.searchsorted(edges, span.begin, side="right")) - 1
    end = int(np.searchsorted(edges, span.end, side="left"))
    spaced = edges[begin] == span.begin - 1 and raw[edges[begin] : span.begin] == b" "
    if edges[end] != span.end or not (spaced or edges[begin] == span.begin):
        return None
    return Occurrence(begin, end, bool(spaced))


def lex_bytes(raw: bytes) -> list[NameSpan] | None:
    """Spans of the names in a text, in bytes; None if it is no Python code."""
    # A window may cut a character: its bytes are no letters.
    text = raw.decode("utf-8", "surrogateescape")
    widths = np.array([1 if "\udc80" <= c <= "\udcff" else len(c.encode()) for c in text], int)
    text = re.sub("[\udc80-\udcff\0]", " ", text)
    spans = lex_names(text)
    if spans is None:
        # The window may begin in the middle of a string or of a statement.
        first = text.find("\n") + 1
        rest = lex_names(text[first:]) if first else None
        if not rest:
            return None
        spans = [NameSpan(begin + first, end + first) for begin, end in rest]
    places = np.concatenate([[0], np.cumsum(widths)])
    return [NameSpan(int(places[begin]), int(places[end])) for begin, end in spans]


def lex_names(text: str) -> list[NameSpan] | None:
    """Spans of the names in a text, in characters; None if it is no Python code."""
    before = "".join(open_blocks(text))
    lines = io.StringIO(before + text)
    starts = line_starts(before + text)
    spans, depth = [], 0
    try:
        for token in tokenize.generate_tokens(lines.readline):
            kind = tokenize.tok_name[token.type]
            depth += kind.endswith("STRING_START") - kind.endswith("STRING_END")
            if kind in ("ERRORTOKEN", "OP") and not depth and token.string in STRANGE:
                return None
            if kind == "NAME" and not depth and not keyword.iskeyword(token.string):
                begin = starts[token.start[0] - 1] + token.start[1]
                if (before + text)[begin : begin + len(token.string)] != token.string:
                    return None
                spans.append(NameSpan(begin - len(before), begin - len(before) + len(token.string)))
    except tokenize.TokenError as error:
        if not GOES_ON.search(str(error.args[0])):
            return None
    except (SyntaxError, ValueError):
        return None
    return [span for span in spans if span.begin >= 0]


def line_starts(text: str) -> list[int]:
    """First character of each line of a text."""
    return [0, *(match.end() for match in re.finditer("\n", text))]


def open_blocks(text: str) -> list[str]:
    """Lines that open the blocks in which a text begins: one for each indentation that is smaller
    than that of its first line."""
    indents = [len(m[1]) for m in re.finditer(r"^([ \t]*)[^\s#]", text, re.MULTILINE)]
    if not indents:
        return []
    smaller = sorted({indent for indent in indents if indent < indents[0]} | {0})
    tab = "\t" if re.match(r"\s*\t", text) else " "
    return [f"{tab * indent}{BLOCK}" for indent in smaller if indent < indents[0]]


class HiddenNames(NamedTuple):
    """Inputs and targets of a window whose names are hidden.

    Attributes:
      inputs: its tokens, with a sentinel in place of each occurrence of a hidden name.
      targets: each of these sentinels with the tokens of its name.
      mask: tokens of the window that are hidden [t].
      labels: number of the hidden name that a token belongs to [t]; meaningless outside the mask.
    """

    inputs: list[int]
    targets: list[int]
    mask: np.ndarray
    labels: np.ndarray


class Room(NamedTuple):
    """Most tokens of inputs and of targets, beside their ends and mode."""

    inputs: int
    targets: int


def hide_names(
    ids: np.ndarray,
    names: dict[str, list[Occurrence]],
    order: Sequence[str],
    sentinels: np.ndarray,
    room: Room,
    space: int | None,
) -> HiddenNames:
    """Hides names, all occurrences of one behind the same sentinel (CodeT5: Wang et al., 2021).

    Sentinels are numbered in the order of the text. Where a name stands with and without a space
    in its first token, the space becomes a token of its own. A name for which there is no room or
    sentinel stays.

    Args:
      ids: tokens of the window [t].
      names: occurrences of each name, in the order of the text.
      order: names to hide, in the order in which they take room.
      sentinels: ids [k].
      room: most tokens.
      space: the id of a single space; None without one.
    """
    inputs, targets, hidden = len(ids), 0, set()
    for name in order:
        places = names[name]
        first = pick_reference(places)
        spaces = sum(place.spaced and not first.spaced for place in places)
        grown = sum(1 - (place.end - place.begin) for place in places) + spaces
        added = 1 + first.end - first.begin
        fits = inputs + grown <= room.inputs and targets + added <= room.targets
        if fits and len(hidden) < len(sentinels) and not (spaces and space is None):
            inputs, targets = inputs + grown, targets + added
            hidden.add(name)
    kept = [name for name in names if name in hidden]
    return replace_names(ids, {name: names[name] for name in kept}, sentinels, space)


def pick_reference(places: Sequence[Occurrence]) -> Occurrence:
    """The occurrence whose tokens are the target: the first without a space, if there is one."""
    return next((place for place in places if not place.spaced), places[0])


def replace_names(
    ids: np.ndarray,
    names: dict[str, list[Occurrence]],
    sentinels: np.ndarray,
    space: int | None,
) -> HiddenNames:
    """Replaces names by sentinels, in this order.

    Args:
      ids: tokens of the window [t].
      names: occurrences of each name.
      sentinels: ids [k].
      space: the id of a single space; None without one.
    """
    mask, labels = np.zeros(len(ids), bool), np.zeros(len(ids), np.int64)
    targets: list[int] = []
    replaced = {}
    for number, places in enumerate(names.values()):
        first = pick_reference(places)
        targets += [int(sentinels[number]), *ids[first.begin : first.end].tolist()]
        for place in places:
            mask[place.begin : place.end], labels[place.begin : place.end] = True, number
            lead = [not_none(space)] if place.spaced and not first.spaced else []
            replaced[place.begin] = [*lead, int(sentinels[number])]
    inputs: list[int] = []
    for number, token in enumerate(ids.tolist()):
        inputs += replaced.get(number, [] if mask[number] else [token])
    return HiddenNames(inputs, targets, mask, labels)
