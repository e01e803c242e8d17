# SPDX-License-Identifier: Apache-2.0
"""Grammars as for the parser Lark, read into rules.

Their texts are those of its Earley parser with the lexer "dynamic_complete": a terminal is any
text that it matches, not the longest alone.
"""

import re

from t5x_lite.decoding.steering.expressions import (
    Chain,
    Characters,
    Expression,
    Repeat,
    RuleReference,
    either,
    text,
)
from t5x_lite.decoding.steering.grammar import Grammar, list_references
from t5x_lite.decoding.steering.grammar_syntax import (
    CHARACTER,
    GrammarReader,
    Token,
    read_character,
    read_characters,
)
from t5x_lite.decoding.steering.regex_syntax import read_pattern, regex

IGNORED = "%ignore"  # rule of what may stand before each terminal of a Lark grammar
# Terminals of Lark's `common`, without look-behind.
INTEGER, DECIMAL, EXPONENT = "[0-9]+", r"(?:[0-9]+\.[0-9]*|\.[0-9]+)", "[eE][+-]?[0-9]+"
FLOAT = f"(?:{INTEGER}{EXPONENT}|{DECIMAL}(?:{EXPONENT})?)"
COMMON = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": INTEGER,
    "SIGNED_INT": f"[+-]?{INTEGER}",
    "DECIMAL": DECIMAL,
    "FLOAT": FLOAT,
    "SIGNED_FLOAT": f"[+-]?{FLOAT}",
    "NUMBER": f"(?:{FLOAT}|{INTEGER})",
    "SIGNED_NUMBER": f"[+-]?(?:{FLOAT}|{INTEGER})",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[a-zA-Z]",
    "WORD": "[a-zA-Z]+",
    "CNAME": "[_a-zA-Z][_a-zA-Z0-9]*",
    "WS_INLINE": "[ \t]+",
    "WS": "[ \t\f\r\n]+",
    "CR": "\r",
    "LF": "\n",
    "NEWLINE": "(?:\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"//[^\n]*",
    "C_COMMENT": r"/\*[^*]*\*+(?:[^/*][^*]*\*+)*/",
    "SQL_COMMENT": r"--[^\n]*",
}


class LarkReader(GrammarReader):
    """Reader of Lark's syntax; a whole text follows `start`.

    Attributes:
      in_rule: parts that are read are of a rule, in which %ignore holds, and not of a terminal.
    """

    pattern = re.compile(
        r"""(?P<comment>(?://|\#)[^\n]*)|(?P<space>\s+)
        |(?P<rule>[?!]*(?P<head>[_A-Za-z]\w*)(?:\.-?\d+)?\s*:)
        |(?P<alias>->\s*\w+)
        |(?P<import>%import\s+[\w.]+[ \t]*(?:\([^)]*\)|->\s*\w+)?)
        |(?P<ignore>%ignore\b)|(?P<directive>%\w*)
        |(?P<template>[_A-Za-z]\w*\{\s*[^}\d\s,][^}]*\}\s*:?)|(?P<name>[_A-Za-z]\w*)
        |(?P<range>"(?:\\.|[^"\\\n])"\s*\.\.\s*"(?:\\.|[^"\\\n])")
        |(?P<string>"(?:\\.|[^"\\\n])*"i?)
        |(?P<expression>/(?!/)(?:\\/|\\\\|[^/])*?/[imslux]*)
        |(?P<repeat>[*+?]|~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*\d*\s*(?:,\s*\d*\s*)?\})
        |(?P<alternative>\|)|(?P<open>[(\[])|(?P<close>[)\]])|(?P<other>.)""",
        re.VERBOSE | re.DOTALL,
    )
    start = "start"
    in_rule = False

    def grammar(self) -> Grammar:
        """Reads the whole grammar."""
        ignored: list[Expression] = []
        while not self.take_kind("end"):
            head = self.next_token()
            if head.kind == "import":
                self.read_import(head)
            elif head.kind == "ignore":
                self.in_rule = False
                ignored.append(self.alternatives())
            elif head.kind == "rule":
                rule = re.sub(r"^[?!]*|(\.-?\d+)?\s*:$", "", head.text)
                self.in_rule = rule != rule.upper()
                self.add_rule(head, rule, self.alternatives())
            else:
                self.refuse(head, f"has {head.text}, which cannot be followed here")
        self.rules[IGNORED] = Repeat(either(ignored)) if ignored else text("")
        self.rules["%start"] = Chain((RuleReference(self.start), RuleReference(IGNORED)))
        grammar = self.finish("%start")
        self.check_terminals(grammar)
        return grammar

    def check_terminals(self, grammar: Grammar) -> None:
        """Raises ValueError for terminals that refer to rules or to themselves."""
        terminals = {rule for rule in grammar.rules if rule == rule.upper()} - {IGNORED, "%start"}
        known: set[str] = set()
        while left := terminals - known:
            ready = {rule for rule in left if known >= {*list_references(self.rules[rule])}}
            if not ready:
                raise ValueError(
                    f"{self.name}: terminal {min(left)} refers to a rule or to itself: write it in "
                    "lower case, as a rule"
                )
            known |= ready

    def read_import(self, token: Token) -> None:
        """Adds terminals of Lark's `common`."""
        match = re.fullmatch(
            r"%import\s+common(?:\.(\w+)\s*(?:->\s*(\w+))?|\s*\(([^)]*)\))", token.text
        )
        names = re.split(r"[\s,]+", match[3].strip()) if match and match[3] else []
        for name in names or [match[1] if match else ""]:
            if name not in COMMON:
                self.refuse(token, f"has {token.text}: of {', '.join(COMMON)} of common alone")
            alias = match[2] if match and match[2] else name
            self.add_rule(token, alias, regex(COMMON[name]))

    def terminal(self, expression: Expression) -> Expression:
        """Returns a terminal, in a rule with what is ignored before it."""
        return Chain((RuleReference(IGNORED), expression)) if self.in_rule else expression

    def read_name(self, token: Token) -> Expression:
        """Returns the expression of a rule or terminal."""
        named = RuleReference(token.text)
        return self.terminal(named) if token.text == token.text.upper() else named

    def read_string(self, token: Token) -> Expression:
        """Returns the expression of a text in quotes."""
        content, _, flag = token.text[1:].rpartition('"')
        written = "".join(read_characters(content))
        if not written:
            self.refuse(token, "has an empty text, which is no terminal")
        return self.terminal(regex(f"(?i){re.escape(written)}") if flag else text(written))

    def read_range(self, token: Token) -> Expression:
        """Returns the expression of one character of a range."""
        first, last = re.findall(rf'"({CHARACTER})"', token.text, re.DOTALL)
        low, high = ord(read_character(first)), ord(read_character(last))
        if high < low:
            self.refuse(token, f"has {token.text}, which ends before it begins")
        return self.terminal(Characters(((low, high),)))

    def read_expression(self, token: Token) -> Expression:
        """Returns a regular expression."""
        pattern, _, flags = token.text[1:].rpartition("/")
        flags = flags.replace("u", "")
        pattern = pattern.replace("\\/", "/")
        name = f"{self.name} line {token.line}: {token.text}"
        written = f"(?{flags}){pattern}" if flags else pattern
        expression, begins, ends, _ = read_pattern(written, name, in_json=False)
        if begins or ends:
            self.refuse(token, f"has {token.text}: ^ and $ cannot be followed in a terminal")
        return self.terminal(expression)

    atoms = {
        "name": read_name,
        "string": read_string,
        "range": read_range,
        "expression": read_expression,
        "template": lambda self, token: self.refuse(
            token, f"has the template {token.text}, which cannot be followed: write the rule out"
        ),
    }
