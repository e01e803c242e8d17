# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller passes in Python; loads no library of arrays."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from t5x_lite.config.checked import OutOfRange, WrongType, coerce, wrong_type_in_words


def check_argument(name: str, value: Any, hint: Any) -> Any:
    """Returns an argument as the type of an annotation.

    Args:
      name: of the argument, for messages.
      value: what was passed.
      hint: annotation with its range, as of a config's field.

    Raises:
      ValueError: it is of another type, or out of range.
    """
    try:
        return coerce(value, hint)
    except WrongType:
        raise ValueError(f"{name} {wrong_type_in_words(value, hint)}") from None
    except OutOfRange as error:
        raise ValueError(f"{name} {error}") from None


def check_callback(name: str, value: Callable | None) -> None:
    """Raises ValueError unless an argument can be called, or is None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function or None; got {shorten(value)}")


def list_texts(texts: Any, one: bool = False) -> list[str]:
    """Returns a text, or an iterable of texts, as a list.

    Args:
      texts: the argument of a method.
      one: it must be a single text.

    Raises:
      ValueError: it is something else, or something in it is.
    """
    if isinstance(texts, str):
        return [texts]
    # Of a dict, a set or bytes the order or the parts are not what one means.
    listed = isinstance(texts, Iterable) and not isinstance(texts, dict | set | bytes)
    if one or not listed:
        wanted = "a text" if one else "a text or a list of texts"
        raise ValueError(f"Expected {wanted}; got {shorten(texts)}")
    every = list(texts)
    for number, each in enumerate(every):
        if not isinstance(each, str):
            raise ValueError(f"Text {number} of the list must be a text; got {shorten(each)}")
    return every


def list_pairs(name: str, inputs: Any, targets: Any) -> tuple[list[str], list[str]]:
    """Returns inputs and their targets as two lists of texts.

    Args:
      name: of the method, for messages.
      inputs: a text or a list of texts.
      targets: as many.

    Raises:
      ValueError: they are not texts, or do not pair up.
    """
    pair = list_texts(inputs), list_texts(targets)
    if isinstance(inputs, str) != isinstance(targets, str):
        raise ValueError(f"{name} takes two texts, or two lists of texts")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{name} takes pairs: got {len(pair[0])} inputs but {len(pair[1])} targets"
        )
    return pair


def check_messages(messages: Any) -> None:
    """Raises ValueError unless messages are a list of dicts, each with a role."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, bytes) and messages
    if not listed or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise ValueError(
            'Expected a question, or a list such as [{"role": "user", "content": "..."}]; got '
            f"{shorten(messages)}"
        )


def shorten(value: Any) -> str:
    """The representation of a value, cut for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
