# SPDX-License-Identifier: Apache-2.0
"""Laws of grammars: languages as those of Lark and of an enumeration of derivations."""

import itertools

import numpy as np
import pytest
from test_constraint_languages import language, random_text, steps_left

from t5x_lite.decoding.steering import grammar, patterns
from t5x_lite.decoding.steering.expressions import Chain, Literal, OneOf, Repeat, RuleReference

lark = pytest.importorskip("lark")


def compile_text(content: str, nesting: int = 3):
    return grammar.compile_grammar(
        patterns.parse_grammar(content, "the grammar"), nesting, "the grammar"
    )


def make_parser(content: str):
    """Lark's parser of all texts that a grammar derives, as a function that says yes or no."""
    parser = lark.Lark(content, parser="earley", lexer="dynamic_complete", ambiguity="resolve")

    def parses(text: str) -> bool:
        try:
            parser.parse(text)
        except lark.exceptions.UnexpectedInput:
            return False
        return True

    return parses


# Each beside an alphabet, whose texts are enumerated up to four characters.
LARK = {
    "choices": ('start: "a" | "ab" -> two\n     | "b"  // three', "ab"),
    "repeats": ('start: "a"? "b"~2 "a"~0..1 | ["a" "a"] "b"+', "ab"),
    "terminals": ('start: WORD "-" WORD\nWORD.2: /[ab]+/', "ab-"),
    "flags": ('start: "a"i /B/i "c".."d"', "aAbBcd"),
    "ignore": ('start: "a" X+\nX: "b" "b"?\n%ignore " "', "ab "),
    "ignore several": ('start: "a" "b"\n%ignore /-+/\n%ignore " "', "ab -"),
    "common": (
        'start: INT _SEP SIGNED_NUMBER\n_SEP: ","\n%import common (INT, SIGNED_NUMBER)',
        "1,.-",
    ),
    "alias": ("start: N+\n%import common.DIGIT -> N", "12"),
    "sums": (
        '?start: sum\n?sum: item | sum "+" item -> add\n?item: "1" | "-" item | "(" sum ")"',
        "1+-()",
    ),
    "right": ('start: "a" start | "b" tail\n!tail: "a" start | "a"', "ab"),
    "both sides": ('start: start "-" start | "a" start | start "b" | "1"', "-ab1"),
    "left in right": ('start: "a" item | "b"\nitem: item "-" | "1" start | "1"', "ab-1"),
    "right in left": ('start: item "a" | "b"\nitem: "-" item | start "1" | "1"', "ab-1"),
}
VALUES = r"""
start: value
?value: object | array | string | SIGNED_NUMBER | "true" | "null"
array: "[" [value ("," value)*] "]"
object: "{" [pair ("," pair)*] "}"
pair: string ":" value
string: ESCAPED_STRING
%import common.ESCAPED_STRING
%import common (SIGNED_NUMBER, WS)
%ignore WS
"""
# GBNF beside the same grammar for Lark.
GBNF = {
    "sets": (
        r'root ::= [^ab\x2d]+ [\]^-] | "\"" .',
        r'start: /[^ab-]+/s /[\]^-]/ | /"./s',
        'abc-]^"\n',
    ),
    "repeats": (
        'root ::= "a"{2} "b"{1,} ("a" | "b"){0,1} "a"?',
        'start: "a"~2 "b"+ ("a" | "b")? "a"?',
        "ab",
    ),
    "rules": (
        'root ::= pair # one\n  ("," pair)*\npair ::=\n  letter "="\n  | letter\nletter ::= [ab]',
        'start: pair ("," pair)*\npair: letter "=" | letter\nletter: "a" | "b"',
        "ab,=",
    ),
    "spaces": ('root ::= "a" ws "b"\nws ::= ([ \\t] ws)?', 'start: "a" /[ \\t]/* "b"', "ab \t"),
    "calls": (
        'root ::= call\ncall ::= name "(" (call ("," call)*)? ")" | name\nname ::= "f"',
        'start: call\ncall: "f" "(" (call ("," call)*)? ")" | "f"',
        "f(),",
    ),
}


def check_language(content: str, reference: str, alphabet: str) -> None:
    """Checks all texts up to four characters: in them no rule can nest more than five times.

    Args:
      content: the grammar.
      reference: the same for Lark.
      alphabet: characters of the texts.
    """
    parses = make_parser(reference)
    texts = (
        "".join(each) for size in range(1, 5) for each in itertools.product(alphabet, repeat=size)
    )
    expected = {text for text in texts if parses(text)}
    assert expected
    assert language(compile_text(content, 6), 4, alphabet) - {""} == expected


@pytest.mark.parametrize("name", LARK)
def test_a_grammar_of_lark_has_its_texts(name):
    content, alphabet = LARK[name]
    check_language(content, content, alphabet)


@pytest.mark.parametrize("name", GBNF)
def test_a_grammar_in_gbnf_has_the_texts_of_its_translation(name):
    check_language(*GBNF[name])


@pytest.mark.parametrize("content", [VALUES, LARK["sums"][0]], ids=["values", "sums"])
def test_long_texts_are_parsed_by_lark(content):
    automaton, parses = compile_text(content), make_parser(content)
    left, draw = steps_left(automaton), np.random.default_rng(0)
    texts = {random_text(automaton, left, draw) for _ in range(30)}
    assert len(texts) > 10
    for text in texts:
        assert parses(text), text


RULES, LETTERS, LONGEST = "rst", "ab", 2


def draw_expression(draw: np.random.Generator, depth: int):
    """A random expression of letters and rules."""
    kind = draw.choice(["letter", "rule", "chain", "one", "repeat"][: 5 if depth else 2])
    if kind == "letter":
        return Literal(str(draw.choice([*LETTERS, ""])).encode())
    if kind == "rule":
        return RuleReference(str(draw.choice([*RULES])))
    if kind == "repeat":
        least, most = [(0, 1), (0, None), (1, 2)][draw.integers(3)]
        return Repeat(draw_expression(draw, depth - 1), least, most)
    parts = tuple(draw_expression(draw, depth - 1) for _ in range(draw.integers(1, 4)))
    return Chain(parts) if kind == "chain" else OneOf(parts)


def derived_texts(expression, known: dict[str, set[str]]) -> set[str]:
    """Texts of an expression up to LONGEST, from those of the rules."""
    if isinstance(expression, Literal):
        return {expression.text.decode()}
    if isinstance(expression, RuleReference):
        return known[expression.name]
    if isinstance(expression, OneOf):
        return set().union(*(derived_texts(part, known) for part in expression.parts))
    if isinstance(expression, Chain):
        texts = {""}
        for part in expression.parts:
            more = derived_texts(part, known)
            texts = {one + two for one in texts for two in more if len(one + two) <= LONGEST}
        return texts
    once, texts, count, result = derived_texts(expression.part, known), {""}, 0, set()
    while expression.most is None or count <= expression.most:
        if count >= expression.least:
            if texts <= result:
                break
            result |= texts
        texts = {one + two for one in texts for two in once if len(one + two) <= LONGEST}
        count += 1
    return result


@pytest.mark.parametrize("seed", range(4))
def test_random_grammars_have_the_texts_of_their_derivations(seed):
    """Whatever recursion: a text of n characters needs n + 1 nested expansions at most."""
    draw = np.random.default_rng(seed)
    for _ in range(30):
        rules = {rule: draw_expression(draw, 3) for rule in RULES}
        known: dict[str, set[str]] = {rule: set() for rule in RULES}
        while (more := {rule: derived_texts(rules[rule], known) for rule in RULES}) != known:
            known = more
        automaton = grammar.compile_grammar(grammar.Grammar(rules, "r"), LONGEST + 2, "it")
        assert language(automaton, LONGEST, LETTERS) == known["r"], rules


def test_rules_nest_as_often_as_the_config_says():
    content = 'root ::= "(" root ")" | root "a" | "b"'
    for nesting in (1, 2, 3):
        depths = range(nesting)
        expected = {depth * "(" + "b" + depth * ")" for depth in depths}
        assert language(compile_text(content, nesting), 2 * nesting + 1, "()b") == expected
    assert "baaa" in language(compile_text(content, 1), 4, "ab")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"line 1 \(its end\) has no rule 'start'"),
        ('root ::= "a" b', "has no rule 'b', which 'root' refers to"),
        ('item ::= "a"', "has no rule 'root'"),
        ('root ::= "a"\nroot ::= "b"', "line 2 defines root again"),
        ('root ::= ("a"', r"opens \(, which its end does not close"),
        ('root ::= "a" )', r"line 1 has \) where a rule"),
        ('root ::= "a', "has '\"', which begins nothing"),
        ("root ::= [b-a]", "a range ends before it begins"),
        ('root ::= "a"{3,2}', "the most is below the least"),
        ('root ::= "a" <[5]>', "has '<', which begins nothing"),
        ('start: "a', "has '\"', which begins nothing"),
        ('start: x{"a"}\nx{y}: y', "has the template"),
        ('start: "a" "" ', "has an empty text"),
        ("start: /a$/", "cannot be followed in a terminal"),
        ("start: /(?<!a)b/", "cannot be followed"),
        ("start: /(/", "is not a regular expression"),
        ("start: X\n%import common.UNICODE", "of common alone"),
        ("start: X\n%declare X", "has %declare, which cannot be followed"),
        ('start: X\nX: "a" X', "terminal X refers to a rule or to itself"),
        ('start: "a"{,0}{3,2}', "the most is below the least"),
        ("start: 5", "has '5', which begins nothing"),
        (5000 * "(", "line 1"),
        ("start: " + 5000 * "(", "nests its brackets too deeply"),
    ],
)
def test_what_is_no_grammar_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        compile_text(content)


def test_grammars_that_take_too_many_states_are_refused(monkeypatch):
    monkeypatch.setattr(grammar, "MOST_REPEATED", 1000)
    with pytest.raises(ValueError, match="expands to more than 1,000 states"):
        compile_text('root ::= b{50}\nb ::= "(" [a-z]{50} ")"')
