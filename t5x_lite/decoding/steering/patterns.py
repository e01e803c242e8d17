# SPDX-License-Identifier: Apache-2.0
"""The constraint of a config: what every new text follows, words that it contains or avoids."""

import functools
import re
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.decoding.steering.byte_automaton import (
    ByteAutomaton,
    avoid_texts,
    find_texts,
    intersect,
    valid_text,
)
from t5x_lite.decoding.steering.expressions import Expression, either, text
from t5x_lite.decoding.steering.grammar import Grammar, compile_grammar
from t5x_lite.decoding.steering.grammar_syntax import GbnfReader
from t5x_lite.decoding.steering.json_schema import parse_schema
from t5x_lite.decoding.steering.lark_syntax import LarkReader
from t5x_lite.decoding.steering.machine import MOST_STATES, compile_expression
from t5x_lite.decoding.steering.regex_syntax import parse_regex


class Constraint(NamedTuple):
    """Language of the new texts: values of the fields of Decode that state it.

    Attributes:
      regex: see Decode.
      json_schema: see Decode.
      grammar: see Decode.
      choices: see Decode.
      force_words: see Decode.
      bad_words: see Decode.
      nesting: see Decode.
    """

    regex: str | None = None
    json_schema: str | None = None
    grammar: str | None = None
    choices: tuple[str, ...] = ()
    force_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    nesting: int = config.Decode.nesting

    @property
    def stated(self) -> list[str]:
        """Names of the fields that state it."""
        names = [name for name in self._fields if name != "nesting"]
        return [name for name in names if getattr(self, name) not in (None, ())]

    @property
    def name(self) -> str:
        """The fields that state it, for messages."""
        return " with ".join(f"Decode.{name}" for name in self.stated)

    @property
    def is_open(self) -> bool:
        """True if a text may end anywhere, and tokens that write nothing may follow."""
        return self.stated == ["bad_words"]

    def compile(self) -> ByteAutomaton:
        """Returns its automaton.

        Raises:
          ValueError: an expression, schema or grammar is none, cannot be followed, or is too large.
        """
        if self.is_open:
            return avoid_texts([word.encode() for word in self.bad_words])
        parts = [find_texts([word.encode()]) for word in self.force_words]
        if self.bad_words:
            parts.append(avoid_texts([word.encode() for word in self.bad_words]))
        both = functools.partial(intersect, most=MOST_STATES, name=self.name)
        return functools.reduce(both, parts, self.whole_texts())

    def whole_texts(self) -> ByteAutomaton:
        """Returns the automaton of the texts that follow its expression, or of all texts.

        Raises:
          ValueError: an expression, schema or grammar is none, cannot be followed, or is too large.
        """
        stated = self.parse()
        if stated is None:
            return valid_text()
        if isinstance(stated, Grammar):
            return compile_grammar(stated, self.nesting, self.name)
        return compile_expression(stated, self.name)

    def parse(self) -> Grammar | Expression | None:
        """Returns its expression, or its grammar; None if it allows all texts.

        Raises:
          ValueError: an expression, schema or grammar is none, or has what cannot be followed.
        """
        if self.json_schema is not None:
            return parse_schema(self.json_schema)
        if self.grammar is not None:
            return parse_grammar(self.grammar, "Decode.grammar")
        if self.regex is not None:
            return parse_regex(self.regex, "Decode.regex")
        return either(map(text, self.choices)) if self.choices else None


def parse_grammar(content: str, name: str) -> Grammar:
    """Returns the grammar of a text in GBNF or Lark's syntax, which `::=` tells apart.

    Args:
      content: the text.
      name: what it is called in messages.

    Raises:
      ValueError: it is no grammar, or has what cannot be followed.
    """
    reader = GbnfReader if re.search(r"^\s*[\w-]+\s*::=", content, re.MULTILINE) else LarkReader
    try:
        return reader(content, name).grammar()
    except RecursionError:
        raise ValueError(f"{name} nests its brackets too deeply") from None


def make_constraint(decode: config.Decode) -> Constraint | None:
    """Returns the constraint of a config; None if it names none."""
    constraint = Constraint(*(getattr(decode, name) for name in Constraint._fields))
    return constraint if constraint.name else None
