# SPDX-License-Identifier: Apache-2.0
"""Old names in .gin text replaced by the new ones of `aliases`, line for line.

gin never sees an old name. Lines keep their numbers, so that errors name the right one.
"""

import io
import tokenize
from collections.abc import Callable
from tokenize import TokenInfo
from typing import NamedTuple

from t5x_lite.config import aliases
from t5x_lite.config.aliases import Renamed

IGNORED = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


class Name(NamedTuple):
    """Target of a binding.

    Attributes:
      scope: "a/b" of a/b/config.Train.steps, "" without one.
      owner: the class by its new name, "" for a macro.
      name: the field or macro by its new name.
    """

    scope: str
    owner: str
    name: str

    def __str__(self) -> str:
        return f"config.{self.owner}.{self.name}" if self.owner else self.name


class Renamer:
    """One pass over the statements of a .gin text, which collects the edits.

    Attributes:
      edits: token to its new text.
      renamed: the old names by the token each was read from.
      bound: what is bound, how that is written there, and in which line.
      macros: the values (tokens) of each macro.
      wanted: macros that are values of a field with renamed values, and that field.
    """

    def __init__(self):
        self.edits: dict[TokenInfo, str] = {}
        self.renamed: dict[TokenInfo, Renamed] = {}
        self.bound: list[tuple[Name, str, int]] = []
        self.macros: dict[str, list[list[TokenInfo]]] = {}
        self.wanted: list[tuple[str, tuple[str, str]]] = []
        self.block = ("", "")

    def edit(self, token: TokenInfo, new: str, old: str, shown: str) -> None:
        """Replaces a token.

        Args:
          token: of the source.
          new: its new text.
          old: the old name, for the report.
          shown: the new name, for the report.
        """
        self.edits[token] = new
        self.renamed[token] = Renamed(old, shown)

    def statement(self, tokens: list[TokenInfo]) -> None:
        """Reads one statement: a binding, the head of a block, a line in a block, or an import."""
        if tokens[0].start[1] == 0:
            self.block = ("", "")
        signs = [token.string for token in tokens]
        self.classes(tokens)
        if signs[-1] == ":":
            scope, owner = divided(tokens[:-1])
            if len(owner) == 3:
                self.block = (scope, owner[2].string)
        elif "=" in signs:
            at = signs.index("=")
            self.binding(tokens[:at], tokens[at + 1 :])

    def classes(self, tokens: list[TokenInfo]) -> None:
        """Renames classes (config.Part) and references to macros (%INITIAL_CHECKPOINT)."""
        for place, token in enumerate(tokens):
            before = [each.string for each in tokens[max(place - 2, 0) : place]]
            if before == ["config", "."] and token.string in aliases.CLASSES:
                new = aliases.CLASSES[token.string]
                self.edit(token, new, f"config.{token.string}", f"config.{new}")
            if token.string == "%":
                last = referenced(tokens[place:])
                if last and last.string in aliases.MACROS:
                    new = aliases.MACROS[last.string]
                    self.edit(last, new, last.string, new)

    def binding(self, left: list[TokenInfo], right: list[TokenInfo]) -> None:
        """Renames the field or macro that is bound, and its value where that has an old name."""
        scope, selector = divided(left)
        signs = [token.string for token in selector]
        if len(signs) == 1 and not self.block[1]:
            new = aliases.MACROS.get(signs[0], signs[0])
            self.bind(Name(scope, "", new), selector[0], signs[0])
            self.macros.setdefault(new, []).append(right)
            return
        if len(signs) == 1:
            scope, written = self.block
        elif len(signs) == 5 and signs[0] == "config":
            written = signs[2]
        else:
            return
        owner = aliases.CLASSES.get(written, written)
        known = aliases.FIELDS.get((owner, signs[-1]), signs[-1])
        field = aliases.FIELDS.get((written, signs[-1]), known)
        self.bind(Name(scope, owner, field), selector[-1], f"config.{written}.{signs[-1]}")
        if (owner, field) in aliases.VALUES:
            self.value((owner, field), right)

    def bind(self, name: Name, token: TokenInfo, written: str) -> None:
        """Records a binding, and renames its last word if it is old.

        Args:
          name: target of the binding, by its new name.
          token: last word of the name in the source.
          written: the name as it is in the source.
        """
        if token.string != name.name:
            self.edit(token, name.name, written, str(name))
        self.bound.append((name, written, token.start[0]))

    def value(self, field: tuple[str, str], right: list[TokenInfo]) -> None:
        """Renames the value of a field, or remembers the macro that stands for it."""
        if right and right[0].string == "%" and (last := referenced(right)) is right[-1]:
            self.wanted.append((aliases.MACROS.get(last.string, last.string), field))
        elif len(right) == 1 and right[0].type == tokenize.STRING:
            old = right[0].string.strip("\"'")
            if new := aliases.VALUES[field].get(old):
                dotted = f"config.{field[0]}.{field[1]} = "
                self.edit(right[0], repr(new), f"{dotted}{old!r}", f"{dotted}{new!r}")

    def finish(self) -> None:
        """Renames the values of the macros that stand for renamed values."""
        done = set()
        while self.wanted:
            if (each := self.wanted.pop()) not in done:
                done.add(each)
                for right in self.macros.get(each[0], ()):
                    self.value(each[1], right)


def divided(tokens: list[TokenInfo]) -> tuple[str, list[TokenInfo]]:
    """The scope before the last slash, and the tokens after it."""
    signs = [token.string for token in tokens]
    after = len(signs) - signs[::-1].index("/") if "/" in signs else 0
    return "".join(signs[: max(after - 1, 0)]), tokens[after:]


def referenced(tokens: list[TokenInfo]) -> TokenInfo | None:
    """The last name of the reference %a/b/NAME that tokens begin with."""
    if len(tokens) < 2 or tokens[1].type != tokenize.NAME:
        return None
    last = 1
    while len(tokens) > last + 2 and tokens[last + 1].string == "/":
        last += 2
    return tokens[last]


def statements(source: str) -> list[list[TokenInfo]]:
    """The tokens of every statement; none where source cannot be divided into tokens."""
    result: list[list[TokenInfo]] = [[]]
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                result.append([])
            elif token.type not in IGNORED:
                result[-1].append(token)
    except (tokenize.TokenError, SyntaxError):
        return []  # gin's parser says what is wrong
    return [tokens for tokens in result if tokens]


def rename(source: str, origin: Callable[[int], str]) -> str:
    """.gin text with all old names replaced; the old names are reported on stderr.

    Args:
      source: the text of a whole config, includes put in place.
      origin: where a line (from 1) comes from: "FILE:LINE", "--gin.BINDING" or "line N".

    Raises:
      ValueError: the same file, or the command line, binds a field by its old and its new name.
    """
    renamer = Renamer()
    for tokens in statements(source):
        renamer.statement(tokens)
    renamer.finish()
    check_once(renamer.bound, origin)
    lines = source.split("\n")
    for token in sorted(renamer.edits, key=lambda token: token.start, reverse=True):
        (row, first), (_, after) = token.start, token.end
        line = lines[row - 1]
        lines[row - 1] = line[:first] + renamer.edits[token] + line[after:]
    aliases.notify(
        name._replace(place=editable(origin(token.start[0])))
        for token, name in sorted(renamer.renamed.items(), key=lambda each: each[0].start)
    )
    return "\n".join(lines)


def editable(place: str) -> str:
    """Place of a file to edit; "" for a saved config or the command line."""
    return "" if place.startswith(("line ", "--gin.")) else place


def check_once(bound: list[tuple[Name, str, int]], origin: Callable[[int], str]) -> None:
    """Raises ValueError where one file binds a field by two names.

    The other name in another file, or on the command line, is an override as any other.
    """
    first_bound: dict[tuple[str, Name], tuple[str, int]] = {}
    for name, written, row in bound:
        place = origin(row)
        file = "--gin" if place.startswith("--gin.") else place.rpartition(":")[0]
        other, first = first_bound.setdefault((file, name), (written, row))
        if other != written:
            old = other if written == str(name) else written
            raise ValueError(f"{aliases.both(old, str(name))} (line {first}, line {row})")
