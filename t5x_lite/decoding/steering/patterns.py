# SPDX-License-Identifier: Apache-2.0
"""The constraint of a config: an expression that every new text matches, words that it contains."""

import functools
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.decoding.steering.byte_automaton import (
    ByteAutomaton,
    find_texts,
    intersect,
    valid_text,
)
from t5x_lite.decoding.steering.expressions import (
    MOST_STATES,
    Expression,
    compile_expression,
    either,
    text,
)
from t5x_lite.decoding.steering.json_schema import parse_schema
from t5x_lite.decoding.steering.regex_syntax import parse_regex


class Constraint(NamedTuple):
    """Language of the new texts: values of the fields of Decode that state it.

    Attributes:
      regex: see Decode.
      json_schema: see Decode.
      choices: see Decode.
      force_words: see Decode.
    """

    regex: str | None = None
    json_schema: str | None = None
    choices: tuple[str, ...] = ()
    force_words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The fields that state it, for messages."""
        stated = [name for name in self._fields if getattr(self, name) not in (None, ())]
        return " with ".join(f"Decode.{name}" for name in stated)

    def expression(self) -> Expression | None:
        """Returns the expression that a whole text matches; None for any text.

        Raises:
          ValueError: an expression or schema is none, or cannot be followed.
        """
        if self.regex is not None:
            return parse_regex(self.regex, "Decode.regex")
        if self.json_schema is not None:
            return parse_schema(self.json_schema)
        return either(map(text, self.choices)) if self.choices else None

    def compile(self) -> ByteAutomaton:
        """Returns its automaton.

        Raises:
          ValueError: an expression or schema is none, cannot be followed, or is too large.
        """
        expression = self.expression()
        whole = valid_text() if expression is None else compile_expression(expression, self.name)
        words = [find_texts([word.encode()]) for word in self.force_words]
        both = functools.partial(intersect, most=MOST_STATES, name=self.name)
        return functools.reduce(both, words, whole)


def make_constraint(decode: config.Decode) -> Constraint | None:
    """Returns the constraint of a config; None if it names none."""
    constraint = Constraint(*(getattr(decode, name) for name in Constraint._fields))
    return constraint if constraint.name else None
