# SPDX-License-Identifier: Apache-2.0
"""Grammars in GBNF (llama.cpp), read into rules, and what this syntax shares with others."""

import re
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, NoReturn

from t5x_lite.decoding.steering.expressions import (
    Chain,
    Characters,
    Expression,
    Ranges,
    Repeat,
    RuleReference,
    either,
    optional,
    text,
)
from t5x_lite.decoding.steering.grammar import Grammar, list_references
from t5x_lite.decoding.steering.regex_syntax import repeat_part

CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "b": "\b", "0": "\0"}
CHARACTER = r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|[^\\]"


class Token(NamedTuple):
    """A token of a grammar.

    Attributes:
      kind: name of the group of the pattern that it matches.
      text: the token.
      line: number of its line.
    """

    kind: str
    text: str
    line: int


class GrammarReader:
    """Reader of what both syntaxes share: alternatives, sequences, brackets, repeats.

    Attributes:
      pattern: what a token is, a named group for each kind.
      start: name of the rule that a whole text follows.
      atoms: readers of the parts that a syntax has, by the kind of their token.
      name: what the grammar is called in messages.
      tokens: the tokens, and one of kind "end".
      place: number of the next one.
      rules: the rules so far.
    """

    pattern: ClassVar[re.Pattern[str]]
    start: ClassVar[str]
    atoms: ClassVar[dict[str, Callable]] = {}

    def __init__(self, content: str, name: str):
        self.name, self.place = name, 0
        self.tokens = [*self.split_tokens(content)]
        self.rules: dict[str, Expression] = {}

    def split_tokens(self, content: str) -> Iterator[Token]:
        """Yields the tokens of a text, without spaces and comments."""
        line = 1
        for match in self.pattern.finditer(content):
            token = Token(str(match.lastgroup), match[0].strip(), line)
            if token.kind == "other":
                self.refuse(token, f"has {token.text!r}, which begins nothing")
            if token.kind not in ("space", "comment"):
                yield token
            line += match[0].count("\n")
        yield Token("end", "its end", line)

    def refuse(self, token: Token, reason: str) -> NoReturn:
        """Raises ValueError for a token."""
        raise ValueError(f"{self.name} line {token.line} {reason}")

    def next_token(self) -> Token:
        """Returns the next token, and goes on after it."""
        self.place += 1
        return self.tokens[self.place - 1]

    def take_kind(self, kind: str) -> Token | None:
        """Returns the next token and goes on after it if it is of a kind; None if it is not."""
        return self.next_token() if self.tokens[self.place].kind == kind else None

    def add_rule(self, token: Token, rule: str, expression: Expression) -> None:
        """Adds a rule.

        Args:
          token: where it is defined.
          rule: its name.
          expression: what its texts match.
        """
        if rule in self.rules:
            self.refuse(token, f"defines {rule} again")
        self.rules[rule] = expression

    def alternatives(self) -> Expression:
        """Reads alternatives."""
        parts = [self.sequence()]
        while self.take_kind("alternative"):
            parts.append(self.sequence())
        return either(parts)

    def sequence(self) -> Expression:
        """Reads what stands one after the other."""
        parts = []
        while (part := self.atom()) is not None:
            while token := self.take_kind("repeat"):
                part = self.repeat(part, token)
            parts.append(part)
        while self.take_kind("alias"):
            pass
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def repeat(self, part: Expression, token: Token) -> Repeat:
        """Returns a part as often as a token says: ?, *, +, {n,m}, ~ n..m."""
        counts = re.sub(r"~\s*(\d+)(?:\s*\.\.\s*(\d+))?", r"{\1,\2}", token.text)
        counts = counts.replace(",}", "}") if token.text[0] == "~" else counts
        repeated = repeat_part(part, counts.replace(" ", ""), self.name)
        if repeated.most is not None and repeated.most < repeated.least:
            self.refuse(token, f"repeats {token.text}: the most is below the least")
        return repeated

    def atom(self) -> Expression | None:
        """Reads one part; None if none begins here."""
        token = self.tokens[self.place]
        if token.kind == "open":
            self.next_token()
            inner, closing = self.alternatives(), self.next_token()
            if closing.text != {"(": ")", "[": "]"}[token.text]:
                self.refuse(token, f"opens {token.text}, which {closing.text} does not close")
            return optional(inner) if token.text == "[" else inner
        read = self.atoms.get(token.kind)
        return None if read is None else read(self, self.next_token())

    def finish(self, start: str) -> Grammar:
        """Returns the grammar, whose texts follow a rule.

        Raises:
          ValueError: a rule that is named is not there.
        """
        token = self.tokens[-1]
        if self.start not in self.rules:
            self.refuse(token, f"(its end) has no rule {self.start!r}, which a whole text follows")
        for rule, expression in self.rules.items():
            for name in list_references(expression):
                if name not in self.rules:
                    self.refuse(token, f"(its end) has no rule {name!r}, which {rule!r} refers to")
        return Grammar(self.rules, start)


class GbnfReader(GrammarReader):
    """Reader of GBNF; a whole text follows `root`."""

    pattern = re.compile(
        r"""(?P<comment>\#[^\n]*)|(?P<space>\s+)
        |(?P<rule>[A-Za-z0-9_-]+\s*::=)|(?P<name>[A-Za-z0-9_-]+)
        |(?P<string>"(?:\\.|[^"\\\n])*")|(?P<set>\[\^?(?:\\.|[^\]\\])*\])|(?P<any>\.)
        |(?P<repeat>[*+?]|\{\s*\d*\s*(?:,\s*\d*\s*)?\})|(?P<alternative>\|)
        |(?P<open>\()|(?P<close>\))|(?P<other>.)""",
        re.VERBOSE | re.DOTALL,
    )
    start = "root"

    def grammar(self) -> Grammar:
        """Reads the whole grammar."""
        while not self.take_kind("end"):
            head = self.next_token()
            if head.kind != "rule":
                self.refuse(head, f"has {head.text} where a rule (NAME ::= ...) should begin")
            self.add_rule(head, head.text[:-3].rstrip(), self.alternatives())
        return self.finish(self.start)

    def read_string(self, token: Token) -> Expression:
        """Returns the expression of a text in quotes."""
        return text("".join(read_characters(token.text[1:-1])))

    def read_set(self, token: Token) -> Expression:
        """Returns the expression of one character of a set."""
        negated = token.text[1] == "^"
        parts = re.findall(CHARACTER, token.text[2 if negated else 1 : -1], re.DOTALL)
        ranges = []
        while parts:
            first, *parts = parts
            low = high = ord(read_character(first))
            if first != "-" and len(parts) > 1 and parts[0] == "-":
                high, parts = ord(read_character(parts[1])), parts[2:]
            if high < low:
                self.refuse(token, f"has {token.text}, in which a range ends before it begins")
            ranges.append((low, high))
        return Characters(join_ranges(ranges, negated))

    atoms = {
        "name": lambda self, token: RuleReference(token.text),
        "string": read_string,
        "set": read_set,
        "any": lambda self, token: Characters(((0, 0x10FFFF),)),
    }


def read_characters(content: str) -> Iterator[str]:
    """Yields the characters of a text with escapes."""
    return map(read_character, re.findall(CHARACTER, content, re.DOTALL))


def read_character(written: str) -> str:
    """Returns the character that one character or escape stands for."""
    if written[0] != "\\" or len(written) == 1:
        return written
    if len(written) > 2:
        return chr(int(written[2:], 16))
    return CONTROLS.get(written[1], written[1])


def join_ranges(ranges: list[tuple[int, int]], negated: bool) -> Ranges:
    """Returns ranges of code points in order and apart, or what lies between them.

    Args:
      ranges: first and last code point of each.
      negated: take what lies between them.
    """
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    if not negated:
        return tuple(joined)
    edges = [-1, *(each for pair in joined for each in pair), 0x110000]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((before + 1, after - 1) for before, after in gaps if before + 1 < after)
