# SPDX-License-Identifier: Apache-2.0
"""Laws of the languages of constraints: expressions as in re, schemas as in jsonschema."""

import itertools
import json
import math
import re
import string

import jsonschema
import numpy as np
import pytest

from t5x_lite.decoding.steering import (
    byte_automaton,
    grammar,
    json_schema,
    json_strings,
    machine,
    regex_syntax,
)


def language(automaton: byte_automaton.ByteAutomaton, longest: int, alphabet: str) -> set[str]:
    """All texts of an automaton that are no longer than `longest`, of the characters of an
    alphabet."""
    texts, front = set(), [("", automaton.start)]
    for _ in range(longest + 1):
        texts |= {text for text, state in front if automaton.final[state]}
        front = [
            (text + character, int(automaton.following[state, ord(character)]))
            for text, state in front
            for character in alphabet
            if automaton.following[state, ord(character)] >= 0
        ]
    return texts


def accepts(automaton: byte_automaton.ByteAutomaton, text: str) -> bool:
    state = automaton.start
    for byte in text.encode():
        state = int(automaton.following[state, byte])
        if state < 0:
            return False
    return bool(automaton.final[state])


EXPRESSIONS = [
    "(ab|c)*b?",
    "^a{2,3}$",
    "a{,2}b{1,}?",
    "[]a^-]+",
    "[^a-b]c",
    r"[a\-c]{2}",
    "(?:a|)b",
    "(?P<n>a)+|bc",
    "(?i)aB|c",
    "(?i:a)B",
    ".a",
    "(?s).a",
    r"\.\x61\142|\^",
    "{a}",
    "a{b",
    "()",
    "((a|b){2}c){1,2}",
    "(a?){3}",
    "(a*)*",
    "(a|b)*a(a|b){2}",
]


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_an_expression_has_the_texts_of_re(pattern):
    alphabet = "abcABC.-^{}]\n"
    automaton = machine.compile_expression(
        regex_syntax.parse_regex(pattern, "the pattern"), "the pattern"
    )
    texts = map(
        "".join,
        itertools.chain.from_iterable(
            itertools.product(alphabet, repeat=length) for length in range(4)
        ),
    )
    expected = {text for text in texts if re.fullmatch(pattern, text)}
    assert language(automaton, 3, alphabet) == expected


@pytest.mark.parametrize(
    "pattern",
    [r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"[^\w\s]", "[à-ÿ]", "(?i)k", "(?i)[^ſ]", "."],
)
def test_a_set_has_the_characters_of_re(pattern):
    automaton = machine.compile_expression(regex_syntax.parse_regex(pattern, "the set"), "the set")
    draw = np.random.default_rng(0).integers(0, 0x110000, 3000)
    every = [*range(0x3000), 0x212A, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF, *draw.tolist()]
    for code in every:
        if not 0xD800 <= code <= 0xDFFF:
            expected = re.fullmatch(pattern, chr(code)) is not None
            assert accepts(automaton, chr(code)) == expected, hex(code)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", "is not a regular expression"),
        ("a{2,1}", "is not a regular expression"),
        ("(?R)", "is not a regular expression"),
        ("[[:alpha:]]", "is not a regular expression: Possible nested set"),
        ("[a&&b]", "is not a regular expression: Possible set intersection"),
        (r"(a)\1", r"a backreference"),
        ("(?P<n>a)(?P=n)", "cannot be followed"),
        ("(?=a)b", "cannot be followed"),
        ("(?<!a)b", "cannot be followed"),
        ("(?x) a", "cannot be followed"),
        ("(?m)a", "cannot be followed"),
        ("a^b", "inside: a whole text matches it"),
        (r"a\b", "inside: a whole text matches it"),
        (r"\Aa\Z", "inside: a whole text matches it"),
        (r"\N{DIGIT ONE}", "cannot be followed"),
    ],
)
def test_what_is_no_regular_expression_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        regex_syntax.parse_regex(pattern, "the pattern")


SCHEMAS = {
    "any": {},
    "object": {"type": "object"},
    "arrays": {"type": "array", "items": {"type": "object"}, "maxItems": 2},
    "names": {
        "type": "object",
        "properties": {
            'a"b\\': {"type": "string", "maxLength": 3},
            "é": {"type": "integer", "minimum": -15, "maximum": 1234},
        },
        "required": ["é"],
    },
    "types": {"type": ["string", "number", "integer"]},
    "number": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7},
    "positive": {"type": "number", "exclusiveMinimum": 0},
    "draft 4": {
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "$schema": "http://json-schema.org/draft-04/schema#",
    },
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value"],
            }
        },
        "$ref": "#/$defs/node",
    },
    "constants": {"enum": [1, "a", None, {"x": [1, 2]}, 1.5, True]},
    "typed constants": {"type": "integer", "enum": ["a", 1, 2.5, 2.0, True]},
    "matching constants": {"enum": ["ab", "b", 1, "abc"], "pattern": "^a", "maxLength": 2},
    "chosen types": {
        "$defs": {
            "tree": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]},
            "pair": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
        "properties": {
            "tree": {"$ref": "#/$defs/tree"},
            "pair": {"$ref": "#/$defs/pair", "minItems": 1, "description": "one or two"},
        },
        "required": ["tree", "pair"],
    },
    "types that exclude each other": {
        "properties": {
            "to": {"type": "array", "anyOf": [{"type": "object"}, {"type": "string"}]},
            "kind": {"allOf": [{"type": "null"}, {"type": "string", "enum": ["a", None]}]},
            "count": {"type": "integer"},
        },
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "items": {"type": "null"},
        "minItems": 1,
        "maxItems": 4,
    },
    "old tuple": {
        "type": "array",
        "items": [{"type": "integer"}, {"type": "string"}],
        "additionalItems": False,
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "unique": {
        "type": "array",
        "items": {"enum": ["a", "b", "c"]},
        "uniqueItems": True,
        "minItems": 1,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    "closed all of": {
        "allOf": [
            {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
            {"properties": {"a": {"minimum": 3}, "b": {"type": "null"}}},
        ]
    },
    "one of": {
        "oneOf": [
            {"type": "string"},
            {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]},
        ]
    },
    "pattern": {"type": "string", "pattern": r"^[a-z]+-\d{2}$"},
    "pattern with lengths": {
        "type": "string",
        "pattern": "[a-z]+-",
        "minLength": 9,
        "maxLength": 12,
    },
    "pattern with a format": {
        "type": "object",
        "properties": {
            "date": {"pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", "format": "date"},
            "host": {"format": "idn-hostname", "minLength": 4, "maxLength": 8},
            "expression": {"format": "regex", "pattern": "^[a-z*+^$]+$"},
        },
        "required": ["date", "host", "expression"],
    },
    "escaped pattern": {"type": "string", "pattern": '["\\\\\n]x'},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "named map": {"type": "object", "propertyNames": {"pattern": "^x"}, "maxProperties": 2},
    "pattern map": {
        "type": "object",
        "patternProperties": {"^x-": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "optional": {"type": "object", "properties": {name: {"type": "null"} for name in "abcde"}},
    "one property": {"properties": {"a": {}, "b": {"type": "boolean"}}, "minProperties": 1},
    "required first": {
        "properties": {name: {"type": "null"} for name in "abc"},
        "required": ["b", "d"],
    },
    "formats": {
        "type": "object",
        "properties": {name: {"type": "string", "format": name} for name in json_strings.FORMATS},
        "required": [*json_strings.FORMATS],
    },
}


def compile_schema(schema: object) -> byte_automaton.ByteAutomaton:
    return grammar.compile_grammar(json_schema.parse_schema(json.dumps(schema)), 3, "the schema")


def steps_left(automaton: byte_automaton.ByteAutomaton) -> np.ndarray:
    """Fewest bytes [s] from each state to the end of a text."""
    left, after = np.where(automaton.final, 0, 10**6), automaton.following
    while True:
        fewer = np.where(after >= 0, left[np.maximum(after, 0)], 10**6).min(axis=1) + 1
        if (fewer >= left).all():
            return left
        left = np.minimum(left, fewer)


def random_text(
    automaton: byte_automaton.ByteAutomaton, left: np.ndarray, draw: np.random.Generator
) -> str:
    """A text of an automaton, by a walk that after some bytes takes the shortest way out.

    Args:
      automaton: the automaton.
      left: fewest bytes from each state to the end.
      draw: random generator.
    """
    state, written, most = automaton.start, bytearray(), draw.choice([0, 20, 100])
    while not automaton.final[state] or (len(written) < most and draw.random() < 0.8):
        row = automaton.following[state]
        possible = np.flatnonzero(row >= 0)
        if len(written) >= most:
            possible = possible[left[row[possible]] < left[state]]
        if not len(possible):
            break
        # Of states first: most bytes are those of letters.
        after = draw.choice(np.unique(row[possible]))
        byte = draw.choice(possible[row[possible] == after])
        written.append(byte)
        state = int(row[byte])
    return written.decode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_a_schema_is_valid(name):
    schema, draw = SCHEMAS[name], np.random.default_rng(1)
    automaton = compile_schema(schema)
    kind = jsonschema.validators.validator_for(schema)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    left = steps_left(automaton)
    texts = {random_text(automaton, left, draw) for _ in range(30)}
    for text in texts:
        validator.validate(json.loads(text))


@pytest.mark.parametrize(
    "low, high", [(0, 0), (-5, 7), (98, 1203), (-1203, -98), (-7, None), (None, 15), (10, 1000)]
)
def test_integers_between_bounds_are_all_there(low, high):
    bounds = {"minimum": low, "maximum": high}
    schema = {"type": "integer"} | {
        name: value for name, value in bounds.items() if value is not None
    }
    automaton = compile_schema(schema)
    texts = language(automaton, 5, string.digits + "-")
    inside = range(-9999 if low is None else low, 99999 + 1 if high is None else high + 1)
    assert texts == {str(number) for number in inside}


def test_all_rules_of_a_string_hold():
    schema = {"type": "string", "pattern": "^a+b*$", "minLength": 2, "maxLength": 3}
    texts = language(compile_schema(schema), 7, 'ab"')
    assert texts == {'"aa"', '"ab"', '"aaa"', '"aab"', '"abb"'}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "may share values"),
        ({"$ref": "#/$defs/x"}, "which is not there"),
        ({"$ref": "other.json"}, "which is not in the schema"),
        ({"$ref": "#"}, "refers to itself"),
        ({"type": "string", "pattern": "(?=a)"}, "^Decode.json_schema: #/pattern has"),
        ({"type": "string", "pattern": "^a|b"}, "alternatives beside"),
        ({"properties": {"a": 3}}, "#/properties/a is not a schema"),
        ({"properties": 3}, "is not a JSON schema"),
        ({"type": "string", "maxLength": 1.5}, "# has maxLength 1.5: it is an integer from 0 on"),
        ({"anyOf": [{"minItems": -1}]}, "#/anyOf/0 has minItems -1: it is an integer from 0 on"),
        ({"allOf": [{"minProperties": "3"}]}, "#/allOf/0 has minProperties '3'"),
        ({"minimum": "5"}, "# has minimum '5': it is a number"),
        ({"maximum": True}, "# has maximum True: it is a number"),
        ({"const": math.inf}, "Infinity is not a number that JSON texts can have"),
        ({"minimum": math.nan}, "NaN is not a number that JSON texts can have"),
        ({"enum": "ab"}, "# has enum 'ab': it is a list"),
        ({"type": "object", "required": "a"}, "# has required 'a': it is a list"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "allows nothing"),
        ({"type": "string", "pattern": "^[a-z]+$", "format": "ipv4"}, "allows nothing"),
        ({"properties": {"a": False}, "required": ["a"]}, "allows nothing"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows nothing"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        json_schema.parse_schema(json.dumps(schema))


def test_counts_may_be_written_as_floats():
    schemas = [
        {"type": "string", "minLength": kind(1), "maxLength": kind(2)} for kind in (int, float)
    ]
    one, other = (language(compile_schema(each), 5, 'ab"') for each in schemas)
    assert one == other and '"a"' in one and '"aaa"' not in one
    with pytest.raises(ValueError, match="1e400 is not a number that JSON texts can have"):
        json_schema.parse_schema('{"const": 1e400}')


def test_texts_are_found_wherever_they_stand():
    words = [b"ab", b"bab", b"ca"]
    automaton = byte_automaton.find_texts(words)
    for text in itertools.product(b"abc", repeat=6):
        state = automaton.start
        for place, byte in enumerate(text):
            state = int(automaton.following[state, byte])
            prefix = bytes(text[: place + 1])
            assert automaton.final[state] == any(word in prefix for word in words)


def test_both_automata_accept_what_their_intersection_accepts():
    one = machine.compile_expression(regex_syntax.parse_regex("[abc]*", "one"), "one")
    both = byte_automaton.intersect(one, byte_automaton.find_texts([b"ab"]), 100, "both")
    both = byte_automaton.intersect(both, byte_automaton.find_texts([b"ca"]), 100, "both")
    texts = map("".join, itertools.product("abc", repeat=5))
    assert language(both, 5, "abc") >= {text for text in texts if "ab" in text and "ca" in text}
    assert all("ab" in text and "ca" in text for text in language(both, 5, "abc"))
    with pytest.raises(ValueError, match="more than 3 states"):
        byte_automaton.intersect(one, byte_automaton.find_texts([b"abcabc"]), 3, "both")
