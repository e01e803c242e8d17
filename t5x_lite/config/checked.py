# SPDX-License-Identifier: Apache-2.0
"""Dataclasses whose fields hold what their annotations say: types, and ranges of numbers."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

from t5x_lite.utils.hub_names import check_source
from t5x_lite.utils.paths import check_local, check_path, expand_output_path
from t5x_lite.utils.text_lines import check_unicode

# Numbers end up in int32 and float32 arrays: a larger one would wrap around or be infinite there,
# and a nearer to 0 would be 0.
LARGEST_INT = 2**31 - 1
# The smallest of the upper limits that are there for arithmetic alone.
FAR = 2**12
# Ids of a vocabulary, tokens or rows of a batch: sums of a few of them are int32 still.
MOST_TOKENS = 2**24
# T5 has 100; adding ten million to a SentencePiece model took minutes.
MOST_SENTINELS = 10**5
# Begins the remedy of a message: a value that would do.
WRITE = ": write "
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def require(condition: object, message: str) -> None:
    """Raises ValueError(message) unless condition is true."""
    if not condition:
        raise ValueError(message)


class WrongType(TypeError):
    """A value that is not of the annotated type."""


class OutOfRange(ValueError):
    """A number outside its range: `value`, the `limits` in words, and its `place` in a field."""

    def __init__(self, value: float, limits: str, place: str = ""):
        super().__init__(f"must be {limits}; got {value}")
        self.value, self.limits, self.place = value, limits, place


class Range(NamedTuple):
    """The numbers that a field can have; no float is infinite or NaN.

    Attributes:
      least: the smallest.
      most: the largest.
      open: ends that are outside themselves: "", "least", "most" or "both".
      also: numbers outside of the interval that have a meaning of their own.
    """

    least: float = -math.inf
    most: float = math.inf
    open: Literal["", "least", "most", "both"] = ""
    also: tuple[float, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if value in self.also:
            return True
        above = value > self.least if self.open in ("least", "both") else value >= self.least
        below = value < self.most if self.open in ("most", "both") else value <= self.most
        return above and below

    def __str__(self) -> str:
        others = "".join(f"{value:g}, or " for value in self.also)
        if self.most in (math.inf, LARGEST_INT):
            positive = self.least == 0 and self.open == "least"
            return others + ("positive" if positive else f"at least {self.least:g}")
        left = "(" if self.open in ("least", "both") else "["
        right = ")" if self.open in ("most", "both") else "]"
        return f"{others}in {left}{number_text(self.least)}, {number_text(self.most)}{right}"


def number_text(value: float) -> str:
    """A number in digits: 0.5, 4,294,967,295."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


# Sizes of which arrays and lists are made are far from the largest int: products of them are not.
Few = Annotated[int, Range(1, FAR)]
Width = Annotated[int, Range(1, 2**20)]
Length = Annotated[int, Range(1, MOST_TOKENS)]
LengthOrZero = Annotated[int, Range(0, MOST_TOKENS)]
Count = Annotated[int, Range(1, LARGEST_INT)]
CountOrZero = Annotated[int, Range(0, LARGEST_INT)]
Positive = Annotated[float, Range(0, open="least")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, open="most")]
ShareAboveZero = Annotated[float, Range(0, 1, open="least")]
ShareBetween = Annotated[float, Range(0, 1, open="both")]
Finite = Annotated[float, Range()]
# A path keeps its ~ in the text of a config, which another machine may read; MODEL_DIR may change.
LocalPath = Annotated[str, check_local]
# It may be the address of something in a bucket.
AnyPath = Annotated[str, check_path]
OutputPath = Annotated[str, expand_output_path]
# A checkpoint: a path, or a model of the hub by name.
SourcePath = Annotated[str, check_source]
# Bits of a random key.
Seed = Annotated[int, Range(0, 2**32 - 1)]


class Checked:
    """Base of frozen dataclasses that check the types of their fields, then call `check`."""

    def __post_init__(self):
        for field, hint in field_types(type(self)).items():
            name, value = f"{type(self).__name__}.{field}", getattr(self, field)
            try:
                object.__setattr__(self, field, coerce(value, hint))
            except WrongType:
                raise ValueError(f"{name} {wrong_type_in_words(value, hint)}") from None
            except OutOfRange as error:
                raise ValueError(f"{name}{error.place} {error}") from None
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self.check()

    def check(self) -> None:
        """Raises ValueError where a value is out of range or two fields contradict each other."""


@functools.lru_cache(maxsize=256)  # gin makes subclasses of its own each time that it reads
def field_types(owner: Any) -> dict[str, Any]:
    """Annotations of a dataclass's fields by name, ranges included."""
    hints = typing.get_type_hints(owner, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(owner)}


def coerce(value: Any, hint: Any) -> Any:
    """Returns value as the type of an annotation: an integer serves as a float, a list as a tuple.

    Raises:
      WrongType: the value is of another type.
      OutOfRange: it is a number outside the annotated range.
      ValueError: it is no Unicode text, or text that the annotated function refuses.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value, rule = coerce(value, args[0]), args[1]
        return check_range(value, rule) if isinstance(rule, Range) else rule(value)
    if origin in (typing.Union, types.UnionType):
        return coerce_any(value, args)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(item, args[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {
            coerce(key, args[0]): coerce_item(key, item, args[1]) for key, item in value.items()
        }
    if origin is Literal and value in args:
        return value
    if origin is None and hint is float and type(value) is int:
        # Python refuses to make a float of a larger integer.
        return float(value) if abs(value) <= LARGEST_FLOAT else math.inf
    if origin is None and isinstance(value, hint) and type(value) is not bool:
        if isinstance(value, str):
            check_unicode(value)
        return value
    if hint is bool and type(value) is bool:
        return value
    raise WrongType


def coerce_item(key: Any, value: Any, hint: Any) -> Any:
    """`coerce` of a dict's item, whose key an error names.

    Args:
      key: where the item is.
      value: the item.
      hint: its annotation.
    """
    try:
        return coerce(value, hint)
    except OutOfRange as error:
        place = f'["{key}"]{error.place}'
        raise OutOfRange(error.value, error.limits, place) from None


def check_range(value: float, limits: Range) -> float:
    """Returns a number that is within its limits, and finite; raises OutOfRange for others."""
    if isinstance(value, float) and not math.isfinite(value):
        raise OutOfRange(value, "a finite number")
    if value not in limits:
        raise OutOfRange(value, describe_limits(value, limits))
    if isinstance(value, float) and value and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        size = f"{SMALLEST_FLOAT:.3g} to {LARGEST_FLOAT:.3g}"
        raise OutOfRange(value, f"a number of float32, of size {size}")
    return value


def describe_limits(value: float, limits: Range) -> str:
    """The limits in words; of sizes that are far apart, the one that a value is beyond."""
    far = isinstance(value, int) and FAR <= limits.most <= LARGEST_INT
    if far and value > limits.most:
        return f"at most {limits.most:,}"
    return f"at least {limits.least:g}" if far and not limits.also else str(limits)


def coerce_any(value: Any, hints: tuple) -> Any:
    """Returns value as the first of several types that it fits; raises WrongType if none."""
    for hint in hints:
        try:
            return coerce(value, hint)
        except WrongType:
            continue
    raise WrongType


def wrong_type_in_words(value: Any, hint: Any) -> str:
    """Ends a message about a value of another type: "must be True or False; got 'true'...".

    Args:
      value: the value.
      hint: annotation that it does not fit.
    """
    likely = likely_value(value, hint)
    remedy = "" if likely is None else f"{WRITE}{likely}"
    return f"must be {type_in_words(hint)}; got {value!r:.200}{remedy}"


def likely_value(value: Any, hint: Any) -> str | None:
    """The value of the annotated type that was probably meant, as .gin text; None if unknown.

    Args:
      value: a value of another type, such as 'true', 'none', 1000.0 or a name alone.
      hint: the annotation.
    """
    for each in likely_values(value):
        try:
            coerce(each, hint)
        except (WrongType, ValueError):
            continue
        quoted = [f'"{item}"' for item in each] if isinstance(each, tuple) else []
        return f"({', '.join(quoted)}{',' if len(quoted) == 1 else ''})" if quoted else repr(each)
    name = value.strip("@()").rpartition(".")[2] if isinstance(value, str) else ""
    if name not in class_names(hint):
        return None
    listed = typing.get_origin(hint) is tuple
    return f"(@config.{name}(),)" if listed else f"@config.{name}()"


def likely_values(value: Any) -> list[Any]:
    """Values of other types that a value may stand for."""
    if isinstance(value, float) and value.is_integer():
        return [int(value)]
    if not isinstance(value, str):
        return []
    words = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None}
    text = value.strip()
    likely: list[Any] = [words[text.lower()]] if text.lower() in words else []
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            likely.append(kind(text))
    names = tuple(name.strip(" '\"") for name in text.strip("[]()").split(","))
    plain = all(re.fullmatch(r"[\w./:* +-]+", name) for name in names)
    return [*likely, names] if plain else likely


def class_names(hint: Any) -> set[str]:
    """Names of the dataclasses that an annotation allows."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return {hint.__name__}
    return {name for each in typing.get_args(hint) for name in class_names(each)}


def type_in_words(hint: Any) -> str:
    """An annotation in words: "an integer", "one of 'jsonl', 'tsv' or None"."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
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
    if hint is os.PathLike:
        return "a path"
    return words.get(hint, f"a config.{hint.__name__}")
