# SPDX-License-Identifier: Apache-2.0
"""Expressions of JSON strings and of constants."""

import json
import math
import re
from typing import Any

from t5x_lite.decoding.steering.expressions import (
    AllOf,
    Expression,
    Repeat,
    chain,
    either,
    text,
)
from t5x_lite.decoding.steering.machine import intersect_expressions
from t5x_lite.decoding.steering.regex_syntax import JSON_CHARACTER, parse_json_pattern, regex
from t5x_lite.decoding.steering.schema_algebra import (
    STATED_BY,
    SchemaError,
    shared_types,
    stated_types,
    value_types,
)

OF_STRINGS = ("pattern", "minLength", "maxLength")
# The years of four digits that Python has, and the days that every month has.
DATE = r"[1-9][0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{CLOCK})"
BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
LABEL = "[a-z0-9]{1,24}(?:-[a-z0-9]{1,12}){0,2}"  # two hyphens in a row are for encoded names
HOST = rf"{LABEL}(?:\.{LABEL}){{0,4}}"
EMAIL = rf"[A-Za-z0-9_+-]{{1,32}}(?:\.[A-Za-z0-9_+-]{{1,32}}){{0,3}}@{HOST}"
QUERY = r"(?:\?[A-Za-z0-9._~%=&-]*)?"
URI = rf"https?://{HOST}(?:/[A-Za-z0-9._~%-]*){{0,8}}{QUERY}"
REFERENCE = rf"(?:https?://{HOST})?(?:/|[A-Za-z0-9._~-])*{QUERY}(?:#[A-Za-z0-9._~/-]*)?"
COUNT = "[0-9]{1,4}"
# Of each format a part, which every checker takes for it: of "regex" one without brackets.
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": f"P(?:{COUNT}[YMWD]|(?:{COUNT}D)?T{COUNT}[HMS])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{BYTE}(?:\.{BYTE}){{3}}",
    "ipv6": "[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}",
    **dict.fromkeys(("hostname", "idn-hostname"), HOST),
    **dict.fromkeys(("email", "idn-email"), EMAIL),
    **dict.fromkeys(("uri", "iri"), URI),
    **dict.fromkeys(("uri-reference", "iri-reference"), REFERENCE),
    "json-pointer": "(?:/[A-Za-z0-9_.-]*){0,8}",
    "regex": r"\^?(?:(?:[A-Za-z0-9_/.-]|\[[A-Za-z0-9_]+\])[*+?]?)*\$?",
}


def one_of(parts: list[Expression | None]) -> Expression | None:
    """Returns the alternatives of several expressions; None if there are none."""
    possible = [part for part in parts if part is not None]
    return either(possible) if possible else None


def constants_expression(schema: dict[str, Any], place: str) -> Expression | None:
    """Returns an expression for the values of const or enum that the other keywords allow."""
    beside = [name for name in schema if name in STATED_BY and name not in OF_STRINGS]
    if beside:
        raise SchemaError(f"{place} has {beside[0]!r} beside const or enum: leave it out")
    values = schema.get("enum", [schema.get("const")])
    values = [value for value in values if "const" not in schema or value == schema["const"]]
    types = stated_types(schema, place)
    fitting = [value for value in values if "type" not in schema or fits_types(value, types)]
    return one_of([json_text(value) for value in fitting if fits_string(value, schema, place)])


def fits_string(value: Any, schema: dict[str, Any], place: str) -> bool:
    """True if a constant is no string, or one that the keywords of strings allow.

    Args:
      value: the constant.
      schema: a part of the schema.
      place: where it stands.
    """
    if not isinstance(value, str):
        return True
    try:
        matches = re.search(schema.get("pattern", ""), value) is not None
    except re.error as error:
        raise SchemaError(f"{place}/pattern is not a regular expression: {error}") from None
    return matches and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)


def fits_types(value: Any, types: list[str]) -> bool:
    """True if a constant is of one of several types."""
    whole = not isinstance(value, float) or "number" in types or value.is_integer()
    return whole and bool(shared_types(types, value_types({}, [value])))


def json_text(value: Any) -> Expression:
    """Returns the expression of the JSON text of a value."""
    return text(json.dumps(value, ensure_ascii=False))


def string_expression(schema: dict[str, Any], place: str) -> Expression | None:
    """Returns an expression for the strings of a schema; None if there are none."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None and least > most:
        return None
    rules: list[Expression] = []
    if "pattern" in schema:
        rules.append(parse_json_pattern(schema["pattern"], f"Decode.json_schema: {place}/pattern"))
    if schema.get("format") in FORMATS:
        rules.append(regex(FORMATS[schema["format"]]))
    if not rules or least or most is not None:
        rules.append(Repeat(JSON_CHARACTER, least, most))
    if len(rules) == 1:
        return chain('"', rules[0], '"')
    content = AllOf(tuple(rules))
    return chain('"', content, '"') if intersect_expressions(content).final.any() else None


def matches_any(pattern: str, names: dict[str, Any]) -> bool:
    """True if an expression matches in one of several names, or is none."""
    try:
        return any(re.search(pattern, name) for name in names)
    except re.error:
        return True
