# SPDX-License-Identifier: Apache-2.0
"""JSON schemas as sets of values: their types, what two of them share, and whether they do."""

from typing import Any

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# Keywords that allow values of one type, and so state it.
STATED_BY = {
    **dict.fromkeys(
        ("properties", "required", "additionalProperties", "patternProperties"), "object"
    ),
    **dict.fromkeys(("minProperties", "maxProperties", "propertyNames"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
    "multipleOf": "number",
}


COUNTS = [f"{end}{of}" for end in ("min", "max") for of in ("Length", "Items", "Properties")]
LISTS = ("enum", "anyOf", "oneOf", "allOf", "required", "prefixItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class SchemaError(ValueError):
    """A schema that is none, or cannot be followed."""


def stated_types(schema: dict[str, Any], place: str) -> list[str]:
    """Returns the types that a schema states, by itself or by its keywords; [] for any."""
    stated = schema.get("type")
    if stated is None:
        return [*dict.fromkeys(STATED_BY[name] for name in schema if name in STATED_BY)]
    types = [stated] if isinstance(stated, str) else [*dict.fromkeys(stated)]
    for kind in types:
        if kind not in TYPES:
            raise SchemaError(f"{place} has the type {kind!r}, which is none of {', '.join(TYPES)}")
    return [kind for kind in types if kind != "integer" or "number" not in types]


def with_checked_keywords(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns a schema whose counts are int, also where 3.0 is written.

    Raises:
      SchemaError: a count is negative or no integer, a bound is not a number, or what lists values
        or schemas is not a list.
    """
    counts = {}
    for name, value in schema.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in COUNTS:
            if not number or value < 0 or value != int(value):
                raise SchemaError(f"{place} has {name} {value!r:.40}: it is an integer from 0 on")
            counts[name] = int(value)
        if name in LISTS and not isinstance(value, list):
            raise SchemaError(f"{place} has {name} {value!r:.40}: it is a list")
        # A boolean exclusiveMinimum is of draft 4.
        if name in BOUNDS and not number and not (name in BOUNDS[2:] and isinstance(value, bool)):
            raise SchemaError(f"{place} has {name} {value!r:.40}: it is a number")
    return schema | counts


def merge_schemas(first: dict[str, Any], second: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns a schema of the values that two schemas allow.

    Args:
      first: a schema.
      second: another one.
      place: where they stand.
    """
    both = {**first, **second}
    for name in {*first} & {*second}:
        one, other = first[name], second[name]
        if name == "required":
            both[name] = [*dict.fromkeys([*one, *other])]
        elif name == "properties":
            both[name] = {**one, **other}
            shared = [key for key in one if key in other and one[key] != other[key]]
            both[name] |= {key: {"allOf": [one[key], other[key]]} for key in shared}
        elif name == "type":
            both[name] = shared_types(one, other)
        elif name in ("minimum", "minLength", "minItems", "minProperties"):
            both[name] = max(one, other)
        elif name in ("maximum", "maxLength", "maxItems", "maxProperties"):
            both[name] = min(one, other)
        elif name == "enum":
            both[name] = [value for value in one if value in other]
        elif one != other and (name in STATED_BY or name in ("const", "anyOf", "oneOf", "$ref")):
            raise SchemaError(f"{place} has several {name!r} at once, which cannot be followed")
    for one, other in ((first, second), (second, first)):
        if one.get("additionalProperties", True) is False:
            known = one.get("properties", {})
            hidden = [key for key in other.get("properties", {}) if key not in known]
            both["properties"] = {
                key: False if key in hidden else part
                for key, part in both.get("properties", {}).items()
            }
        elif isinstance(one.get("additionalProperties"), dict) and "properties" in other:
            raise SchemaError(f"{place} has 'additionalProperties' beside other 'properties'")
    return both


def shared_types(first: Any, second: Any) -> list[str]:
    """Returns the types that two values of `type` share."""
    one, other = ({kinds} if isinstance(kinds, str) else {*kinds} for kinds in (first, second))
    one, other = (kinds | ({"integer"} if "number" in kinds else set()) for kinds in (one, other))
    return [kind for kind in TYPES if kind in one & other]


def disjoint(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """True if two schemas are known to share no value: by type, constants, or a property's."""
    values = [
        [schema["const"]] if "const" in schema else schema.get("enum") for schema in (first, second)
    ]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    kinds = [
        value_types(schema, listed) for schema, listed in zip((first, second), values, strict=True)
    ]
    if kinds[0] and kinds[1] and not shared_types(*kinds):
        return True
    parts = [schema.get("properties", {}) for schema in (first, second)]
    needed = {*first.get("required", ())} & {*second.get("required", ())}
    return any(
        isinstance(part, dict)
        and isinstance(parts[1].get(name), dict)
        and disjoint(part, parts[1][name])
        for name, part in parts[0].items()
        if name in needed
    )


def value_types(schema: dict[str, Any], listed: list[Any] | None) -> list[str]:
    """Returns the types of a schema's values; [] if they are unknown."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    if listed is not None:
        return [names.get(type(value), "number") for value in listed]
    return stated_types(schema, "") if "$ref" not in schema else []
