# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of Python's `re`, read into values.

A set of characters is what `re` itself makes of it. What is not regular (look-around,
backreferences, possessive repeats) is refused, as are anchors that do not stand at the two ends.
"""

import functools
import json
import re
import warnings
from dataclasses import dataclass, field

from t5x_lite.decoding.steering.expressions import (
    Chain,
    Characters,
    Expression,
    Literal,
    Ranges,
    Repeat,
    either,
    text,
)

TOKEN = re.compile(
    r"""(?P<escape>\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|0[0-7]{0,2}|[0-7]{3}|.))
    |(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
    |(?P<open>\((?:\?(?:P<\w+>|[is]*:|[is]+\)|.))?)
    |(?P<close>\))
    |(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})[?+]?)
    |(?P<alternative>\|)
    |(?P<anchor>[\^$])
    |(?P<any>\.)
    |(?P<literal>.)""",
    re.DOTALL | re.VERBOSE,
)
CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
# Characters of a JSON string that need no escape, and escapes of one letter.
JSON_RANGES: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0x80, 0x10FFFF))
JSON_ESCAPED = '"\\\b\f\n\r\t'
JSON_CHARACTER = either(
    [Characters(JSON_RANGES), *(text(json.dumps(each)[1:-1]) for each in JSON_ESCAPED)]
)


@dataclass
class OpenGroup:
    """A group of an expression that is being read.

    Attributes:
      flags: "i", "s" or both, which hold in it.
      alternatives: alternatives before the one that is being read.
      parts: parts of that one.
    """

    flags: str = ""
    alternatives: list[Expression] = field(default_factory=list)
    parts: list[Expression] = field(default_factory=list)

    def expression(self) -> Expression:
        """Returns the group as it stands."""
        return either([*self.alternatives, Chain(tuple(self.parts))])


def parse_regex(pattern: str, name: str) -> Expression:
    """Returns the expression of the texts that fully match a regular expression of Python's `re`.

    Args:
      pattern: the expression; ^ at its beginning and $ at its end say nothing.
      name: what it is called in messages.

    Raises:
      ValueError: it is not an expression, or not regular.
    """
    return read_pattern(pattern, name, in_json=False)[0]


@functools.lru_cache(maxsize=64)
def regex(pattern: str) -> Expression:
    """Returns the expression of a pattern in this code."""
    return parse_regex(pattern, repr(pattern))


def parse_json_pattern(pattern: str, name: str) -> Expression:
    """Returns an expression for the content of JSON strings that a pattern matches somewhere.

    Args:
      pattern: `pattern` of a JSON schema.
      name: what it is called in messages.

    Raises:
      ValueError: it is not an expression, or not regular.
    """
    content, begins, ends, several = read_pattern(pattern, name, in_json=True)
    if several and (begins or ends):
        raise ValueError(f"{name} has alternatives beside ^ or $: put them into a group")
    anything = Repeat(JSON_CHARACTER)
    return Chain((*(() if begins else (anything,)), content, *(() if ends else (anything,))))


def read_pattern(pattern: str, name: str, in_json: bool) -> tuple[Expression, bool, bool, bool]:
    """Reads a regular expression.

    Args:
      pattern: the expression.
      name: what it is called in messages.
      in_json: its characters are written as in a JSON string.

    Returns:
      The expression without anchors, and true for one at its beginning, one at its end, and for
      several alternatives.
    """
    check_syntax(pattern, name)
    groups, begins, ends = [OpenGroup()], False, False
    for match in TOKEN.finditer(pattern):
        kind, token = str(match.lastgroup), match[0]
        if kind == "anchor" and token == "^" and match.start() == 0:
            begins = True
        elif kind == "anchor" and token == "$" and match.end() == len(pattern):
            ends = True
        elif kind in ("open", "close"):
            open_or_close(groups, token, name)
        elif kind == "alternative":
            groups[-1].alternatives.append(Chain(tuple(groups[-1].parts)))
            groups[-1].parts = []
        elif kind == "repeat":
            groups[-1].parts[-1] = repeat_part(groups[-1].parts[-1], token, name)
        else:
            check_regular(kind, token, name)
            groups[-1].parts.append(read_character(kind, token, groups[-1].flags, in_json))
    return groups[0].expression(), begins, ends, bool(groups[0].alternatives)


def check_syntax(pattern: str, name: str) -> None:
    """Raises ValueError for what Python does not compile, or will read otherwise one day."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            re.compile(pattern)
    except RecursionError:
        raise ValueError(f"{name} nests its groups too deeply") from None
    except (re.error, OverflowError, FutureWarning) as error:
        raise ValueError(f"{name} is not a regular expression: {error}") from None


def check_regular(kind: str, token: str, name: str) -> None:
    """Raises ValueError for tokens that stand for no character.

    Args:
      kind: group of TOKEN.
      token: the token.
      name: what the expression is called in messages.
    """
    key = token[1:2]
    if kind == "anchor" or (kind == "escape" and key in ("A", "Z", "z", "b", "B")):
        raise ValueError(
            f"{name} has {token} inside: a whole text matches it, and only ^ at its beginning and "
            "$ at its end can be followed"
        )
    if kind == "escape" and (key == "N" or (len(token) == 2 and key in "123456789")):
        what = "a name" if key == "N" else "a backreference"
        raise ValueError(f"{name} has {token}, {what}, which cannot be followed")


def open_or_close(groups: list[OpenGroup], token: str, name: str) -> None:
    """Opens or closes a group.

    Args:
      groups: groups that are open.
      token: the parenthesis, with what follows (?.
      name: what the expression is called in messages.

    Raises:
      ValueError: the group is not regular.
    """
    if token == ")":
        closed = groups.pop()
        groups[-1].parts.append(closed.expression())
        return
    flags = re.fullmatch(r"\(\?([is]*)([:)])", token)
    if flags and flags[2] == ")":
        groups[-1].flags += flags[1]
    elif flags or token == "(" or token.startswith("(?P<"):
        groups.append(OpenGroup(groups[-1].flags + (flags[1] if flags else "")))
    else:
        raise ValueError(
            f"{name} has {token}, which is not regular or changes how it is read: it cannot be "
            "followed"
        )


def repeat_part(part: Expression, token: str, name: str) -> Repeat:
    """Returns a part as often as a token says.

    Args:
      part: the part.
      token: *, +, ? or {n,m}; a lazy one allows the same texts.
      name: what the expression is called in messages.

    Raises:
      ValueError: the repeat is possessive.
    """
    if len(token) > 1 and token.endswith("+"):
        raise ValueError(f"{name} has the possessive {token}, which cannot be followed")
    simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if token[0] in simple:
        return Repeat(part, *simple[token[0]])
    least, comma, most = token.rstrip("?").strip("{}").partition(",")
    low = int(least or 0)
    return Repeat(part, low, (int(most) if most else None) if comma else low)


def read_character(kind: str, token: str, flags: str, in_json: bool) -> Expression:
    """Returns the expression of one character.

    Args:
      kind: group of TOKEN.
      token: the token.
      flags: flags that hold.
      in_json: it is written as in a JSON string.
    """
    single = kind == "literal" or (kind == "escape" and token[1] not in "dDwWsS")
    if single and "i" not in flags:
        character = token if kind == "literal" else escaped_character(token)
        ranges: Ranges = ((ord(character), ord(character)),)
    else:
        ranges = character_ranges(re.escape(token) if kind == "literal" else token, flags)
    if in_json:
        return json_characters(ranges)
    if single and ranges[0][0] == ranges[-1][1]:
        return Literal(chr(ranges[0][0]).encode())
    return Characters(ranges)


def escaped_character(token: str) -> str:
    """Returns the character that an escape stands for."""
    if token[1] in "xuU" and len(token) > 2:
        return chr(int(token[2:], 16))
    if token[1] in "01234567":
        return chr(int(token[1:], 8))
    return CONTROLS.get(token[1], token[1])


@functools.lru_cache(maxsize=1)
def all_characters() -> str:
    """Returns every code point in order; surrogates, which no text has, as U+0000."""
    return "".join(chr(0 if 0xD800 <= code <= 0xDFFF else code) for code in range(0x110000))


@functools.lru_cache(maxsize=256)
def character_ranges(pattern: str, flags: str) -> Ranges:
    """Returns the code points that an expression for one character matches.

    Args:
      pattern: the expression.
      flags: "i", "s" or both.
    """
    options = (re.IGNORECASE if "i" in flags else 0) | (re.DOTALL if "s" in flags else 0)
    runs = re.finditer(f"(?:{pattern})+", all_characters(), options)
    return tuple((run.start(), run.end() - 1) for run in runs)


def json_characters(ranges: Ranges) -> Expression:
    """Returns an expression for the characters of some ranges in a JSON string."""
    plain = tuple(
        (max(first, low), min(last, high))
        for first, last in ranges
        for low, high in JSON_RANGES
        if max(first, low) <= min(last, high)
    )
    escapes = [
        text(json.dumps(each)[1:-1])
        for each in JSON_ESCAPED
        if any(first <= ord(each) <= last for first, last in ranges)
    ]
    return either([*([Characters(plain)] if plain else []), *escapes])
