# SPDX-License-Identifier: Apache-2.0
"""Expressions of JSON arrays and objects from those of their parts, and of any JSON value."""

import functools

from t5x_lite.decoding.steering.expressions import (
    Chain,
    Expression,
    OneOf,
    Repeat,
    RuleReference,
    chain,
    optional,
    text,
)
from t5x_lite.decoding.steering.json_numbers import number_expression
from t5x_lite.decoding.steering.regex_syntax import JSON_CHARACTER

CONTAINER = "%container"  # rule of objects and arrays of any values
SPACE = optional(text(" "))
COMMA, COLON = chain(SPACE, ",", SPACE), chain(SPACE, ":", SPACE)
STRING = chain('"', Repeat(JSON_CHARACTER), '"')


def join_items(
    parts: list[Expression], extra: Expression | None, least: int, most: int | None
) -> Expression:
    """Returns an expression for the items of an array.

    Args:
      parts: the first items.
      extra: each item after them; None if there are none.
      least: fewest items.
      most: most items.
    """
    if not parts:
        return text("") if extra is None else Repeat(extra, least, most, COMMA)
    count, joined = len(parts), text("")
    if extra is not None:
        beyond = None if most is None else most - count
        joined = Repeat(chain(COMMA, extra), max(least - count, 0), beyond)
    for number in reversed(range(count)):
        before = COMMA if number else text("")
        joined = chain(before, parts[number], joined)
        joined = joined if number < least else optional(joined)
    return joined


def join_members(members: list[tuple[Expression, bool]], nonempty: bool) -> Expression | None:
    """Returns an expression for members of an object, in order; None if there are none.

    Args:
      members: each, and true if it must be there.
      nonempty: one of them must be.
    """
    first = next((number for number, (_, must) in enumerate(members) if must), None)
    if first is None:
        some = join_some([member for member, _ in members]) if members else None
        return some if nonempty else optional(some or text(""))
    before = [optional(chain(member, COMMA)) for member, _ in members[:first]]
    after = [
        chain(COMMA, member) if must else optional(chain(COMMA, member))
        for member, must in members[first + 1 :]
    ]
    return Chain((*before, members[first][0], *after))


def join_some(parts: list[Expression]) -> Expression:
    """Returns an expression for one or more of several parts, in order, with commas between.

    The second half is written twice, so that n parts grow to n^1.6, and not to n^2.
    """
    if len(parts) == 1:
        return parts[0]
    half = (len(parts) + 1) // 2
    first, second = join_some(parts[:half]), join_some(parts[half:])
    return OneOf((chain(first, optional(chain(COMMA, second))), second))


@functools.cache
def any_value() -> Expression:
    """Returns an expression for any JSON value, which refers to the rule CONTAINER."""
    scalars = [STRING, number_expression({}, False), *map(text, ("true", "false", "null"))]
    return OneOf((*(each for each in scalars if each is not None), RuleReference(CONTAINER)))


@functools.cache
def any_container() -> Expression:
    """Returns the expression of the rule CONTAINER: objects and arrays of any values."""
    members = Repeat(chain(STRING, COLON, any_value()), between=COMMA)
    objects = chain("{", SPACE, members, SPACE, "}")
    return OneOf((objects, chain("[", SPACE, Repeat(any_value(), between=COMMA), SPACE, "]")))
