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
    """A frozen dataclass checked when it is made: the types of its fields, then `check`."""

    def __post_init__(self):
        name = type(self).__name__
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            try:
                object.__setattr__(self, field.name, typed(value, hint))
            except WrongType:
                wanted = f"{name}.{field.name} must be {described(hint)}"
                raise ValueError(f"{wanted}; got {value!r}") from None
        self.check()

    def check(self) -> None:
        """Raises ValueError where a value is out of range or two fields contradict each other."""


def typed(value: Any, hint: Any) -> Any:
    """value as hint asks: a whole number serves as a float, a list as a tuple.

    Raises:
      WrongType: it is something else.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return first_fitting(value, inside)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, inside[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {typed(key, inside[0]): typed(item, inside[1]) for key, item in value.items()}
    if origin is Literal and value in inside:
        return value
    if origin is None and hint is float and type(value) is int:
        return float(value)
    if origin is None and isinstance(value, hint) and type(value) is not bool:
        return value
    if hint is bool and type(value) is bool:
        return value
    raise WrongType


def first_fitting(value: Any, hints: tuple) -> Any:
    for hint in hints:
        try:
            return typed(value, hint)
        except WrongType:
            continue
    raise WrongType


def described(hint: Any) -> str:
    """hint in words: "a whole number", "one of 'jsonl', 'tsv' or None"."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(option) for option in inside)
    if origin is tuple:
        return f"a list, each {described(inside[0])}"
    if origin is dict:
        return f"a dict from {described(inside[0])} to {described(inside[1])}"
    if hint is types.NoneType:
        return "None"
    return words.get(hint, f"a config.{hint.__name__}")
