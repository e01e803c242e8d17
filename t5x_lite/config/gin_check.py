# SPDX-License-Identifier: Apache-2.0
"""Refuses .gin text that is more than data, before gin acts on it.

gin would import every module that a file names and call every function that can be reached from an
imported one (`@config.dataclasses.inspect.os.system()`). Here gin's own parser reads the text first
and nothing is bound. Refused are imports other than the two of `HEADER`, includes that were not put
in place before, names that are not a dataclass of `t5x_lite.config`, and macros whose values name
each other in a circle or multiply beyond any config.
"""

import dataclasses
import io
import itertools
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.utils.nearest import near_names

HEADER = "from __gin__ import dynamic_registration\nfrom t5x_lite import config\n"
# gin parses a string again with every piece that follows it: 60,000 pieces took it two minutes.
MOST_PIECES = 1000
# An int has some 10 digits, a float 17; gin took a minute over 80,000.
MOST_DIGITS = 100
# A mixture of hundreds of tasks has some thousand values.
MOST_VALUES = 100_000
# Least similarity of a class that is suggested: a name that means another thing is named alone.
LEAST_SIMILAR = 0.7


class Forbidden(ValueError):
    """A statement that a config must not contain."""


class Macro(NamedTuple):
    """A reference to the macro `name` (%name) in a value."""

    name: str


class Reference(NamedTuple):
    """A reference to a dataclass, `name` with its scopes (@encoder/config.Stack())."""

    name: str


def dataclass_names() -> list[str]:
    """Names of the dataclasses that a config can bind."""
    return [name for name, value in vars(config).items() if dataclasses.is_dataclass(value)]


def check_source(source: str) -> list[Any]:
    """Parses source, and returns the statements of gin's parser.

    Raises:
      Forbidden: gin must not read source; the message has the line, as gin writes it.
      SyntaxError: gin cannot read it.
    """
    from gin import config_parser, utils

    check_pieces(source)
    macros: dict[str, Any] = {}
    parsed = []
    for statement in statements(config_parser.ConfigParser(source, delegate())):
        parsed.append(statement)
        with utils.try_with_location(statement.location):
            match statement:
                case config_parser.ImportStatement():
                    check_import(statement.format())
                case config_parser.IncludeStatement():
                    raise Forbidden("an include stands on a line of its own, its name in quotes")
                case config_parser.BindingStatement(arg_name=""):
                    name = "/".join(filter(None, (statement.scope, statement.selector)))
                    macros[name] = statement
                case _:
                    check_selector(statement.selector)
                    check_field(statement)
    check_size(macros)
    return parsed


def is_value(text: str) -> bool:
    """True if text is one value of gin: a complete literal, a %MACRO or a @config.Class()."""
    from gin import config_parser

    source = f"value = {text}"
    try:
        check_pieces(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        count = len(list(statements(config_parser.ConfigParser(source, delegate()))))
    except Forbidden:
        return True  # meant as a value: `check_source` says what is wrong with it
    except Exception:  # gin passes on whatever the code under it raises
        return False
    return count == 1 and tokenize.COMMENT not in {token.type for token in tokens}


def statements(parser: Any) -> Iterator[Any]:
    """Yields a parser's statements; raises Forbidden, with the line, for an impossible value."""
    try:
        yield from parser
    except (RecursionError, TypeError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        line = parser.current_token.start[0]
        raise Forbidden(f"The value that ends at (line {line}) is impossible: {reason}") from error


def check_import(words: str) -> None:
    """Raises Forbidden unless an import is one of `HEADER`."""
    if words not in HEADER.splitlines():
        raise Forbidden(
            f"a config may only have the imports {HEADER.splitlines()}; found {words!r}. Python of "
            "yours is named by --import=MODULE"
        )


def check_selector(selector: str) -> None:
    """Raises Forbidden unless selector is a dataclass of the config."""
    owner, _, name = selector.rpartition(".")
    if (owner, name in dataclass_names()) != ("config", True):
        # train.steps is config.Train.steps, Files.train lacks the module.
        near = [f"config.{each}" for each in near_names(name, dataclass_names(), LEAST_SIMILAR)]
        hint = f"did you mean {' or '.join(near)}?" if near else "a config can name nothing else"
        raise Forbidden(f"{selector} is not a dataclass of t5x_lite.config: {hint}")


def check_field(statement: Any) -> None:
    """Raises Forbidden unless the statement binds a field; gin would ignore `self`."""
    name = getattr(statement, "arg_name", None)
    owner = getattr(config, statement.selector.removeprefix("config."))
    if name is not None and name not in {field.name for field in dataclasses.fields(owner)}:
        raise Forbidden(f"'{statement.selector}' doesn't have a parameter named '{name}'")


def delegate() -> Any:
    """gin's hook for references and macros; this one resolves neither, and calls nothing."""
    from gin import config_parser

    class Names(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name, evaluate):
            selector = scoped_configurable_name.rpartition("/")[2]
            check_selector(selector)
            if not evaluate:
                raise Forbidden(f"@{scoped_configurable_name} needs its brackets: @{selector}()")
            return Reference(scoped_configurable_name)

        def macro(self, macro_name):
            if "." in macro_name:
                raise Forbidden(f"%{macro_name} is not a macro: bind the value itself")
            return Macro(macro_name)

    return Names()


def check_pieces(source: str) -> None:
    """Raises Forbidden where a string is concatenated from more than MOST_PIECES literals, or where
    a number has more than MOST_DIGITS."""
    kept = (
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.NL, tokenize.COMMENT)
    )
    for kind, run in itertools.groupby(kept, key=lambda token: token.type):
        pieces = list(run)
        digits = len(max(pieces, key=lambda token: len(token.string)).string)
        if kind == tokenize.NUMBER and digits > MOST_DIGITS:
            raise Forbidden(f"a number of {digits:,} digits (line {pieces[0].start[0]})")
        if kind == tokenize.STRING and len(pieces) > MOST_PIECES:
            raise Forbidden(f"a string of {len(pieces):,} pieces (line {pieces[0].start[0]})")


def check_size(macros: dict[str, Any]) -> None:
    """Raises Forbidden for macros that name each other in a circle, or grow beyond MOST_VALUES.

    Args:
      macros: the statements that bind macros, by the macro's name.
    """
    from gin import utils

    sizes: dict[str, int] = {}

    def macro_size(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise Forbidden(f"the macro {name} is bound to itself: {' -> '.join((*above, name))}")
        if name not in sizes:
            sizes[name] = size(macros[name].value, (*above, name)) if name in macros else 1
        return sizes[name]

    def size(value: Any, above: tuple[str, ...]) -> int:
        match value:
            case Macro(name):
                # gin looks in the macro's scope and in those around it.
                parts = name.split("/")
                places = ("/".join(parts[:k]) for k in range(1, len(parts) + 1))
                total = max(macro_size(place, above) for place in places)
            case dict():
                total = sum(size(each, above) for pair in value.items() for each in pair)
            case list() | tuple():
                total = sum(size(each, above) for each in value)
            case _:
                total = 1
        if total > MOST_VALUES:
            raise Forbidden(f"the macro {above[-1]} stands for more than {MOST_VALUES:,} values")
        return total

    for name, statement in macros.items():
        with utils.try_with_location(statement.location):
            macro_size(name, ())
