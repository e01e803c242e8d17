# SPDX-License-Identifier: Apache-2.0
"""Dataclasses whose fields hold what their annotations say."""

import dataclasses
import types
import typing
from typing import Any, Literal


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


class WrongType(TypeError):
    """A value that is not of the annotated type."""


class Checked:
    """Base of frozen dataclasses that check the types of their fields, then call `check`."""

    def __post_init__(self):
        name = type(self).__name__
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            try:
                object.__setattr__(self, field.name, coerce(value, hint))
            except WrongType:
                wanted = f"{name}.{field.name} must be {type_in_words(hint)}"
                raise ValueError(f"{wanted}; got {value!r}") from None
        self.check()

    def check(self) -> None:
        """Raises ValueError where a value is out of range or two fields contradict each other."""


def coerce(value: Any, hint: Any) -> Any:
    """Returns value as the type of an annotation: an integer serves as a float, a list as a tuple.

    Raises:
      WrongType: the value is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return coerce_any(value, args)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(item, args[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {coerce(key, args[0]): coerce(item, args[1]) for key, item in value.items()}
    if origin is Literal and value in args:
        return value
    if origin is None and hint is float and type(value) is int:
        return float(value)
    if origin is None and isinstance(value, hint) and type(value) is not bool:
        return value
    if hint is bool and type(value) is bool:
        return value
    raise WrongType


def coerce_any(value: Any, hints: tuple) -> Any:
    """Returns value as the first of several types that it fits; raises WrongType if none."""
    for hint in hints:
        try:
            return coerce(value, hint)
        except WrongType:
            continue
    raise WrongType


def type_in_words(hint: Any) -> str:
    """An annotation in words: "an integer", "one of 'jsonl', 'tsv' or None"."""
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(option) for option in args)
    if origin is tuple:
        return f"a list, each {type_in_words(args[0])}"
    if origin is dict:
        return f"a dict from {type_in_words(args[0])} to {type_in_words(args[1])}"
    if hint is types.NoneType:
        return "None"
    return words.get(hint, f"a config.{hint.__name__}")
