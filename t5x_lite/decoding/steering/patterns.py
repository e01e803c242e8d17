# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a config's constraint: its own, of its choices, or of a JSON schema."""

import importlib.util
import json
import re
from typing import Any

from t5x_lite import config
from t5x_lite.utils.extras import install_command

MOST_REPEATS = 1000
# Keywords of JSON schemas that texts follow, and those that say nothing about a text. outlines-core
# ignores the others, or writes texts for them that are not JSON (pattern, format).
FOLLOWED = frozenset(
    ["type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems"]
    + ["maxItems", "minLength", "maxLength", "enum", "const", "anyOf", "oneOf", "$ref", "$defs"]
    + ["definitions"]
)
IGNORED = frozenset(["title", "description", "default", "examples", "$schema", "$id", "$comment"])
STATING = frozenset(["type", "properties", "enum", "const", "anyOf", "oneOf", "$ref"])


def constraint_pattern(decode: config.Decode) -> tuple[str | None, str]:
    """Returns the regular expression of a config's constraint, or None, and the field's name."""
    if decode.regex is not None:
        return whole_match(decode.regex), "Decode.regex"
    if decode.choices:
        return "|".join(f"({re.escape(choice)})" for choice in decode.choices), "Decode.choices"
    if decode.json_schema is not None:
        return schema_pattern(decode.json_schema), "Decode.json_schema"
    return None, ""


def whole_match(pattern: str) -> str:
    """Returns an expression that a whole text matches, without the anchors around it.

    Raises:
      ValueError: it is not an expression, or repeats something too often.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"Decode.regex is not a regular expression: {error}") from None
    check_size(pattern, "Decode.regex")
    pattern = pattern.removeprefix("^")
    ends = re.search(r"(\\*)\$$", pattern)
    return pattern[:-1] if ends and len(ends[1]) % 2 == 0 else pattern


def check_size(pattern: str, name: str) -> None:
    """Raises ValueError for an expression whose table would take minutes and gigabytes.

    Args:
      pattern: the expression.
      name: what it is called in messages.
    """
    counts = [
        int(number)
        for each in re.findall(r"\{(\d*),?(\d*)\}", pattern)
        for number in each
        if number
    ]
    largest = max(counts, default=0)
    config.require(
        largest <= MOST_REPEATS,
        f"{name} repeats something {largest} times; at most {MOST_REPEATS} can be followed",
    )


def check_schema(schema: Any, place: str = "#") -> None:
    """Checks that every keyword of a schema is followed.

    Args:
      schema: the schema, or a part of it.
      place: where it stands in the whole.

    Raises:
      ValueError: a keyword would be ignored, or followed by texts that are not JSON.
    """
    if not isinstance(schema, dict) or not {*schema} & STATING:
        raise ValueError(
            f"Decode.json_schema: {place} allows anything; say its type, properties, enum, const, "
            "anyOf, oneOf or $ref"
        )
    unknown = sorted({*schema} - FOLLOWED - IGNORED)
    if unknown:
        raise ValueError(
            f"Decode.json_schema: {place} has {unknown[0]!r}, which cannot be followed; these can: "
            f"{', '.join(sorted(FOLLOWED))}"
        )
    for name in ("properties", "$defs", "definitions"):
        for key, part in schema.get(name, {}).items():
            check_schema(part, f"{place}/{name}/{key}")
    for name in ("anyOf", "oneOf", "prefixItems"):
        for number, part in enumerate(schema.get(name, ())):
            check_schema(part, f"{place}/{name}/{number}")
    if "items" in schema:
        check_schema(schema["items"], f"{place}/items")


def schema_pattern(schema: str) -> str:
    """Returns a regular expression for the JSON texts of a schema.

    Raises:
      ValueError: the text is not a schema, or has what cannot be bounded.
    """
    core = import_outlines()
    try:
        check_schema(json.loads(schema))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"Decode.json_schema is not JSON: {error}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"Decode.json_schema is not a schema: {error}") from None
    try:
        pattern = core.json_schema.build_regex_from_schema(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Decode.json_schema cannot be followed: {error}") from None
    check_size(pattern, "Decode.json_schema")
    return pattern


def import_outlines():
    """Returns the module outlines_core.

    Raises:
      ValueError: it is not installed.
    """
    if importlib.util.find_spec("outlines_core") is None:
        raise ValueError(f"Constraints need outlines-core: {install_command('constraints')}")
    import outlines_core

    return outlines_core
