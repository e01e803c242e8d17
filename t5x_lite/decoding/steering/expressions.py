# SPDX-License-Identifier: Apache-2.0
"""Regular expressions as values."""

from collections.abc import Iterable
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # first and last code point of each, in order


@dataclass(frozen=True)
class Literal:
    """One text."""

    text: bytes


@dataclass(frozen=True)
class Characters:
    """One character of some ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Chain:
    """Several expressions, one after the other."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class OneOf:
    """One of several expressions; of none, no text at all."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Repeat:
    """An expression several times, with another one between.

    Attributes:
      part: what is repeated.
      least: fewest times.
      most: most times; None for any number.
      between: what stands between two of them.
    """

    part: "Expression"
    least: int = 0
    most: int | None = None
    between: "Expression" = Literal(b"")


@dataclass(frozen=True)
class AllOf:
    """The texts that each of several expressions has; none of them refers to a rule."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class RuleReference:
    """A rule of a grammar, by its name."""

    name: str


Expression = Literal | Characters | Chain | OneOf | Repeat | AllOf | RuleReference


def chain(*parts: Expression | str) -> Chain:
    """Returns expressions, or texts, one after the other."""
    return Chain(tuple(text(part) if isinstance(part, str) else part for part in parts))


def text(content: str) -> Literal:
    """Returns the expression of one text."""
    return Literal(content.encode())


def either(parts: Iterable[Expression]) -> Expression:
    """Returns an expression for one of several; simple ones count once."""
    # The hash of a large expression takes as long as all of it.
    simple = Literal, Characters, RuleReference
    keys = {part if isinstance(part, simple) else id(part): part for part in parts}
    distinct = tuple(keys.values())
    return distinct[0] if len(distinct) == 1 else OneOf(distinct)


def optional(part: Expression) -> Repeat:
    """Returns an expression for a part that may be missing."""
    return Repeat(part, 0, 1)
