# SPDX-License-Identifier: Apache-2.0
"""Bodies of Python functions as a grammar in GBNF: what the benchmark of functions writes by.

A part of Python whose every text compiles behind a signature, but for a keyword argument that is
repeated: statements of one line, and `if`, `while` and `for` over LEVELS levels of indentation;
calls, lists, tuples and indices, whose parts have no brackets but those of an empty call. Each of
these costs states: with sets, dicts, slices and conditions there are 37,818 instead of 10,620.
"""

import keyword
import string

LEVELS = 2

EXPRESSIONS = r"""
values ::= expression (", " expression)*
expression ::= "not "? "-"? (primary | constant) (operator expression)?
primary ::= (name | string | group) trailer*
group ::= "(" items? ")" | "[" (items | inner loop)? "]"
trailer ::= "." name | "(" arguments? ")" | index
index ::= "[" inner "]"
items ::= inner (", " inner)*
arguments ::= inner (", " inner)* (", " named)* | named (", " named)* | inner loop
named ::= name "=" inner
loop ::= " for " names " in " inner
inner ::= "not "? "-"? (path | constant | string) (operator inner)?
path ::= name ("." name)* ("(" ")")?
operator ::= " " ("+" | "-" | "*" | "/" | "%" | "==" | "!=" | "<" | ">" | "<=" | ">=") " "
  | " and " | " or " | " in " | " is "
constant ::= number | "None" | "True" | "False"
names ::= name (", " name)*
number ::= ("0" | [1-9] [0-9]*) ("." [0-9]+)?
string ::= "\"" ([^"\\\n\r] | "\\" [nrt\\'"])* "\"" | "'" ([^'\\\n\r] | "\\" [nrt\\'"])* "'"
head ::= "if " expression | "while " expression | "for " names " in " expression
simple ::= "return" (" " values)? | "raise " primary | "pass" | primary | target "= " values
target ::= names " " | name trailer* ("." name | index) " " | name " " [-+*/%]
"""


def name_rules() -> list[str]:
    """Rules of names that are no keywords: one for the rest of a name after each beginning."""
    words, rules = {*keyword.kwlist}, []
    beginnings = sorted({word[:size] for word in words for size in range(len(word))})
    rest = {beginning: f"rest-{number}" for number, beginning in enumerate(beginnings)}
    rest[""] = "name"
    for beginning in beginnings:
        longer = {word for word in words if word.startswith(beginning)} - {beginning}
        followed = {word[len(beginning)] for word in longer}
        allowed = string.ascii_letters + "_" + (string.digits if beginning else "")
        others = "".join(each for each in allowed if each not in followed)
        parts = [f"[{others}] word"]
        for each in sorted(followed):
            # A keyword that begins no other one has to go on.
            parts.append(f'"{each}" ' + rest.get(beginning + each, "[0-9A-Za-z_] word"))
        optional = "" if beginning == "" or beginning in words else "?"
        rules.append(f"{rest[beginning]} ::= ({' | '.join(parts)}){optional}")
    return [*rules, "word ::= [0-9A-Za-z_]*"]


def block_rules(level: int) -> list[str]:
    """Rules of the lines of a level of indentation; the function's own body is 1."""
    simple = f'line-{level} ::= "\\n"{{1,2}} "{4 * level * " "}" statement-{level}'
    parts = ["simple"]
    if level < LEVELS:
        parts.append(f'head ":" line-{level + 1}+')
    return [simple, f"statement-{level} ::= {' | '.join(parts)}"]


def function_grammar() -> str:
    """The grammar of the body of a function, from the end of its docstring."""
    blocks = [rule for level in range(1, LEVELS + 1) for rule in block_rules(level)]
    return "\n".join(["root ::= line-1+", *blocks, *name_rules(), EXPRESSIONS])
