# SPDX-License-Identifier: Apache-2.0
"""JSON schemas as grammars.

Every text is JSON that the schema allows, but not every such JSON is a text: at most one space
stands around punctuation, properties come in the schema's order, additional ones only where none is
named, and what nests without end nests a few times.
"""

import json
from typing import Any

from t5x_lite.decoding.steering.expressions import (
    Expression,
    OneOf,
    Repeat,
    RuleReference,
    chain,
    either,
    optional,
    text,
)
from t5x_lite.decoding.steering.grammar import Grammar
from t5x_lite.decoding.steering.json_numbers import number_expression, parse_finite
from t5x_lite.decoding.steering.json_parts import (
    COLON,
    COMMA,
    CONTAINER,
    SPACE,
    STRING,
    any_container,
    any_value,
    join_items,
    join_members,
    join_some,
)
from t5x_lite.decoding.steering.json_strings import (
    constants_expression,
    json_text,
    matches_any,
    one_of,
    string_expression,
)
from t5x_lite.decoding.steering.regex_syntax import parse_json_pattern
from t5x_lite.decoding.steering.schema_algebra import (
    STATED_BY,
    SchemaError,
    disjoint,
    merge_schemas,
    stated_types,
    with_checked_keywords,
)

# Keywords that restrict values and are not followed; unknown ones restrict nothing (JSON Schema
# 2020-12, section 6.5).
REFUSED = (
    *("not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas"),
    *("contains", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
)
# Keywords that say something of the values: a $ref beside others of them is a rule of its own.
STATING = {*STATED_BY, *REFUSED, "$ref", "type", "const", "enum", "allOf", "anyOf", "oneOf"}
# Names of rules, none of which a $ref has.
START, NOTHING = "%schema", OneOf(())
LONGEST_CHAIN = 10  # of $refs each of which names the next
MOST_PARTS = 20_000  # of a schema whose $refs are replaced by what they name


def parse_schema(content: str) -> Grammar:
    """Returns a grammar of the JSON texts of a schema, with a rule for each $ref.

    Args:
      content: the schema, as JSON.

    Raises:
      ValueError: it is not a schema, or has what cannot be followed.
    """
    try:
        schema = json.loads(content, parse_float=parse_finite, parse_constant=parse_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Decode.json_schema is not JSON: {error}") from None
    try:
        reader = SchemaReader(schema)
        expression = reader.value(schema, "#")
    except SchemaError as error:
        raise ValueError(f"Decode.json_schema: {error}") from None
    except RecursionError:
        raise ValueError("Decode.json_schema nests too deeply") from None
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"Decode.json_schema is not a JSON schema: {error!r}") from None
    if expression is None:
        raise ValueError("Decode.json_schema allows nothing")
    rules = reader.rules | {START: expression, CONTAINER: any_container()}
    return Grammar(rules, START)


class SchemaReader:
    """Reader of one schema.

    Attributes:
      root: the whole schema, in which references are looked up.
      rules: expression of what each $ref names.
      parts: number of values read so far.
    """

    def __init__(self, root: Any):
        self.root, self.parts = root, 0
        self.rules: dict[str, Expression] = {}

    def value(self, schema: Any, place: str) -> Expression | None:
        """Returns an expression for the values of a schema; None if there are none.

        Args:
          schema: a part of the schema.
          place: where it stands.
        """
        self.parts += 1
        if self.parts > MOST_PARTS:
            raise SchemaError(f"its $refs make it longer than {MOST_PARTS:,} parts")
        schema = self.merged(schema, place)
        if schema is None:
            return None
        if "$ref" in schema:
            return self.reference(schema, place)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self.any_of(schema, name, place)
        if "const" in schema or "enum" in schema:
            return constants_expression(schema, place)
        types = stated_types(schema, place)
        if not types:
            return None if "type" in schema else any_value()
        return one_of([self.typed(kind, schema, place) for kind in types])

    def merged(self, schema: Any, place: str) -> dict[str, Any] | None:
        """Returns a schema with its allOf merged into it; None if it allows nothing."""
        if isinstance(schema, bool):
            return {} if schema else None
        if not isinstance(schema, dict):
            raise SchemaError(f"{place} is not a schema: {schema!r:.40}")
        for name in REFUSED:
            if name in schema:
                raise SchemaError(f"{place} has {name!r}, which cannot be followed")
        schema = with_checked_keywords(schema, place)
        parts = schema.get("allOf", ())
        schema = {name: value for name, value in schema.items() if name != "allOf"}
        for number, part in enumerate(parts):
            part = self.resolved(self.merged(part, f"{place}/allOf/{number}"), place)
            if part is None:
                return None
            schema = merge_schemas(schema, part, place)
        return schema

    def resolved(self, schema: dict[str, Any] | None, place: str) -> dict[str, Any] | None:
        """Returns a schema with what its $ref names merged into it; None if it allows nothing."""
        for _ in range(LONGEST_CHAIN):
            if schema is None or "$ref" not in schema:
                return schema
            named = self.merged(self.look_up(schema["$ref"], place), schema["$ref"])
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            schema = None if named is None else merge_schemas(named, rest, place)
        raise SchemaError(f"{place} refers to itself")

    def reference(self, schema: dict[str, Any], place: str) -> Expression | None:
        """Returns an expression for the values of what a $ref names; None if there are none."""
        stated = {key: value for key, value in schema.items() if key in STATING}
        rule = schema["$ref"] if len(stated) == 1 else json.dumps(stated, sort_keys=True)
        if rule not in self.rules:
            self.rules[rule] = RuleReference(rule)  # until it is read, which may lead here again
            resolved = self.resolved(schema, place)
            expression = None if resolved is None else self.value(resolved, schema["$ref"])
            self.rules[rule] = NOTHING if expression is None else expression
        return None if self.rules[rule] == NOTHING else RuleReference(rule)

    def look_up(self, name: str, place: str) -> Any:
        """Returns the part of the schema that a reference names."""
        target = self.root
        if name != "#" and not name.startswith("#/"):
            raise SchemaError(f"{place} refers to {name}, which is not in the schema (#/...)")
        for part in name.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(f"{place} refers to {name}, which is not there") from None
        return target

    def any_of(self, schema: dict[str, Any], name: str, place: str) -> Expression | None:
        """Returns an expression for the values of one of several schemas.

        Args:
          schema: a part of the schema.
          name: anyOf or oneOf.
          place: where it stands.
        """
        rest = {key: value for key, value in schema.items() if key != name}
        branches, parts = [], []
        alone = not STATING.intersection(rest)
        for number, part in enumerate(schema[name]):
            within = f"{place}/{name}/{number}"
            resolved = self.resolved(self.merged(part, within), place)
            if resolved is not None:
                branches.append(merge_schemas(rest, resolved, place))
                parts.append(self.value(part if alone else branches[-1], within))
        if name == "oneOf" and not all(
            disjoint(one, other)
            for number, one in enumerate(branches)
            for other in branches[:number]
        ):
            raise SchemaError(
                f"{place} has a oneOf whose schemas may share values, which cannot be followed: "
                "give each another type or const, or say anyOf"
            )
        return one_of(parts)

    def typed(self, kind: str, schema: dict[str, Any], place: str) -> Expression | None:
        """Returns an expression for the values of one type.

        Args:
          kind: the type.
          schema: a part of the schema.
          place: where it stands.
        """
        if kind == "object":
            return self.object_expression(schema, place)
        if kind == "array":
            return self.array_expression(schema, place)
        if kind == "string":
            return string_expression(schema, place)
        if kind in ("number", "integer"):
            if schema.get("multipleOf", 1) != 1:
                raise SchemaError(f"{place} has 'multipleOf', which cannot be followed")
            return number_expression(schema, kind == "integer" or "multipleOf" in schema)
        return either(map(text, ("true", "false") if kind == "boolean" else ("null",)))

    def array_expression(self, schema: dict[str, Any], place: str) -> Expression | None:
        """Returns an expression for the arrays of a schema."""
        first, rest = schema.get("prefixItems", []), schema.get("items", {})
        if isinstance(rest, list):  # draft 2019-09 and before
            first, rest = rest, schema.get("additionalItems", {})
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if schema.get("uniqueItems") and (most is None or most > 1):
            return self.unique_items(rest, least, most, place)
        parts: list[Expression] = []
        for number, part in enumerate(first[:most]):
            expression = self.value(part, f"{place}/prefixItems/{number}")
            if expression is None:
                most = number
                break
            parts.append(expression)
        extra = self.value(rest, f"{place}/items") if most is None or most > len(parts) else None
        if extra is None:
            most = len(parts)
        if most is not None and least > most:
            return None
        return chain("[", SPACE, join_items(parts, extra, least, most), SPACE, "]")

    def unique_items(self, items: Any, least: int, most: int | None, place: str) -> Expression:
        """Returns an expression for arrays of different constants, in the schema's order.

        Args:
          items: schema of the items.
          least: fewest items.
          most: most items.
          place: where the array stands.
        """
        items = self.resolved(self.merged(items, place), place)
        values = (items or {}).get("enum", ())
        if not values or least > 1 or (most is not None and most < len(values)):
            raise SchemaError(
                f"{place} has 'uniqueItems', which can be followed for an enum of items alone, "
                "without minItems above 1 or maxItems"
            )
        some = join_some([json_text(value) for value in values])
        return chain("[", SPACE, some if least else optional(some), SPACE, "]")

    def object_expression(self, schema: dict[str, Any], place: str) -> Expression | None:
        """Returns an expression for the objects of a schema."""
        properties, required = dict(schema.get("properties", {})), schema.get("required", [])
        required = required if isinstance(required, list) else []  # a boolean in draft 3
        patterns = schema.get("patternProperties", {})
        for name in required:
            properties.setdefault(name, schema.get("additionalProperties", {}))
        if not properties:
            return self.map_expression(schema, patterns, place)
        if any(matches_any(pattern, properties) for pattern in patterns):
            raise SchemaError(f"{place} has 'patternProperties' that match its 'properties'")
        if "propertyNames" in schema:
            raise SchemaError(f"{place} has 'propertyNames' beside 'properties'")
        members: list[tuple[Expression, bool]] = []
        for name, part in properties.items():
            value = self.value(part, f"{place}/properties/{name}")
            if value is not None:
                members.append((chain(json_text(name), COLON, value), name in required))
            elif name in required:
                return None
        least = schema.get("minProperties", 0)
        if least > max(len(required), 1) or schema.get("maxProperties", len(members)) < len(
            members
        ):
            raise SchemaError(f"{place} has 'minProperties' or 'maxProperties' beside 'properties'")
        joined = join_members(members, least > 0)
        return None if joined is None else chain("{", SPACE, joined, SPACE, "}")

    def map_expression(
        self, schema: dict[str, Any], patterns: dict[str, Any], place: str
    ) -> Expression | None:
        """Returns an expression for objects of any names.

        Args:
          schema: the schema.
          patterns: its patternProperties.
          place: where it stands.
        """
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        key, part = STRING, schema.get("additionalProperties", {})
        if least > 1:
            raise SchemaError(f"{place} has 'minProperties' of {least} without 'properties'")
        if len(patterns) == 1:
            ((name, part),) = patterns.items()
            key = chain(
                '"', parse_json_pattern(name, f"Decode.json_schema: {place}/patternProperties"), '"'
            )
        elif patterns:
            part = False
        elif "propertyNames" in schema:
            names = {"type": "string", **schema["propertyNames"]}
            key = self.value(names, f"{place}/propertyNames")
        value = self.value(part, f"{place}/additionalProperties")
        if key is None or value is None or most == 0:
            return None if least else chain("{", SPACE, "}")
        members = Repeat(chain(key, COLON, value), least, most, COMMA)
        return chain("{", SPACE, members, SPACE, "}")
