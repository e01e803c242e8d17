# SPDX-License-Identifier: Apache-2.0
"""Expressions of JSON numbers between two bounds."""

import math
from typing import Any

from t5x_lite.decoding.steering.expressions import Expression
from t5x_lite.decoding.steering.regex_syntax import regex

INTEGER = r"-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
# Not zero, so that a number with it lies strictly between two integers.
FRACTION = r"\.[0-9]{0,15}[1-9]"


def parse_finite(text: str) -> float:
    """The number of a JSON text; raises ValueError for NaN and what is beyond float64."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number that JSON texts can have")
    return value


def number_expression(schema: dict[str, Any], integer: bool) -> Expression | None:
    """Returns an expression for the numbers of a schema; None if there are none.

    Between bounds there are no exponents, and fractions only between two integers that are allowed.

    Args:
      schema: its minimum, maximum, exclusiveMinimum and exclusiveMaximum are read.
      integer: integers alone.
    """
    low, high = find_bound(schema, "inimum"), find_bound(schema, "aximum")
    if low is None and high is None:
        return regex(INTEGER if integer else NUMBER)
    parts = integer_parts(low and low[0], high and high[0])
    if not integer:
        parts += fraction_parts(low and low[1], high and high[1])
    return regex("|".join(parts)) if parts else None


def find_bound(schema: dict[str, Any], name: str) -> tuple[int, int] | None:
    """Returns the outermost integer inside a bound, and the integer that fractions stay within.

    Args:
      schema: the schema.
      name: "inimum" or "aximum".
    """
    bounds = []
    for key, exclusive in ((f"m{name}", False), (f"exclusiveM{name}", True)):
        value = schema.get(key)
        if value is None or isinstance(value, bool):  # a boolean is of draft 4, see below
            continue
        exclusive |= schema.get(f"exclusiveM{name}") is True
        inner = math.ceil(value) if name == "inimum" else math.floor(value)
        step = 1 if name == "inimum" else -1
        bounds.append((inner + step if exclusive and inner == value else inner, inner))
    return (max(bounds) if name == "inimum" else min(bounds)) if bounds else None


def integer_parts(low: int | None, high: int | None) -> list[str]:
    """Returns alternatives for the integers of a range, each end of which may be missing."""
    parts = []
    if high is None or high >= 0:
        first = max(low or 0, 0) if low is not None else 0
        if high is None or first <= high:
            parts.append(magnitude_pattern(first, high))
    if low is None or low < 0:
        first = max(-high, 1) if high is not None else 1
        last = None if low is None else -low
        if last is None or first <= last:
            parts.append("-" + magnitude_pattern(first, last))
    return parts


def fraction_parts(low: int | None, high: int | None) -> list[str]:
    """Returns alternatives for the fractions between two integers, each of which may be missing."""
    parts = []
    if high is None or high > 0:
        first = max(low, 0) if low is not None else 0
        if high is None or first <= high - 1:
            parts.append(magnitude_pattern(first, None if high is None else high - 1) + FRACTION)
    if low is None or low < 0:
        first = max(-high, 0) if high is not None else 0
        last = None if low is None else -low - 1
        if last is None or first <= last:
            parts.append("-" + magnitude_pattern(first, last) + FRACTION)
    return parts


def magnitude_pattern(low: int, high: int | None) -> str:
    """Returns an expression for the integers from low >= 0 to high, or without end."""
    digits = len(str(low))
    if high is None:
        parts = [*equal_lengths(str(low), "9" * digits), f"[1-9][0-9]{{{digits},}}"]
        return f"(?:{'|'.join(parts)})"
    parts = []
    for length in range(digits, len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        parts += equal_lengths(str(first), str(min(high, 10**length - 1)))
    return f"(?:{'|'.join(parts)})"


def equal_lengths(low: str, high: str) -> list[str]:
    """Returns alternatives for the numbers between two of equally many digits."""
    rest = len(low) - 1
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + each for each in equal_lengths(low[1:], high[1:])]
    first, last, parts = int(low[0]), int(high[0]), []
    if low[1:].strip("0"):
        parts += [low[0] + each for each in equal_lengths(low[1:], "9" * rest)]
        first += 1
    upper = []
    if high[1:].strip("9"):
        upper = [high[0] + each for each in equal_lengths("0" * rest, high[1:])]
        last -= 1
    middle = [f"[{first}-{last}][0-9]{{{rest}}}"] if first <= last else []
    return parts + middle + upper
