# SPDX-License-Identifier: Apache-2.0
"""What a page may ask for, and how a question of it is read."""

import json
import math
from dataclasses import dataclass
from typing import Any

from t5x_lite import config


@dataclass(frozen=True)
class Limits:
    """The most letters of a text to read, tokens of one to write, and texts that may wait while
    another one is written."""

    letters: int = 4000
    tokens: int = 256
    waiting: int = 4

    def __post_init__(self):
        for name, least in (("letters", 1), ("tokens", 1), ("waiting", 0)):
            value = getattr(self, name)
            if value < least:
                option = "--waiting" if name == "waiting" else f"--most_{name}"
                raise ValueError(f"{option} must be at least {least}; got {value}")

    @property
    def bytes(self) -> int:
        """Of a question: a letter takes at most 12 as JSON escapes, the rest is short."""
        return 12 * self.letters + 2000


@dataclass(frozen=True)
class Question:
    """A text for a model to go on from, or with chat a question to it, and how."""

    model: str
    text: str
    decode: config.Decode
    chat: bool = False


# Tokens of a block of drafts: the same for all, where measuring what is best would take minutes.
WIDTH = 8
# Of a question's fields: their types, what they are without being told, least and most.
NUMBERS = {
    "length": (int, 64, 1, math.inf),
    "temperature": (float, 0.0, 0.0, 10.0),
    "seed": (int, 0, 0, 2**32 - 1),
}


def question(body: bytes, decoders: dict[str, list[str]], limits: Limits) -> Question:
    """What a page asks, as JSON; decoders has for each model the drafters that it may name.

    A decoder that reads a path (draft:PATH) is none of them: a page names no files.

    Raises:
      ValueError: it is no JSON, a field is missing, of another type or beyond its limit, or there
        is no such model or decoder.
    """
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("The question is no JSON") from error
    if not isinstance(told, dict):
        raise ValueError("The question is no JSON object")
    model, text = (string(told, name) for name in ("model", "text"))
    if model not in decoders:
        raise ValueError(f"There is no model {model[:100]!r}, but {', '.join(decoders)}")
    if len(text) > limits.letters:
        raise ValueError(f"The text has {len(text)} letters: give at most {limits.letters}")
    decoder = string(told, "decoder", "plain")
    if decoder not in decoders[model]:
        raise ValueError(f"decoder must be one of {', '.join(decoders[model])}")
    numbers = {name: number(told, name) for name in NUMBERS}
    if numbers["length"] > limits.tokens:
        raise ValueError(f"length must be at most {limits.tokens}, got {numbers['length']}")
    chat = told.get("chat", False)
    if not isinstance(chat, bool):
        raise ValueError("chat must be true or false")
    width = 0 if decoder == "plain" else WIDTH
    decode = config.Decode(decoder=decoder, width=width, **numbers)
    return Question(model, text, decode, chat)


def string(told: dict[str, Any], name: str, otherwise: str | None = None) -> str:
    value = told.get(name, otherwise)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    # Half of a pair of surrogates, which JSON can name, is no text that can be encoded.
    return value.encode("utf-8", "replace").decode("utf-8")


def number(told: dict[str, Any], name: str) -> Any:
    kind, otherwise, least, most = NUMBERS[name]
    value = told.get(name, otherwise)
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    # Written so that NaN fails.
    if not fits or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}")
    return kind(value)
