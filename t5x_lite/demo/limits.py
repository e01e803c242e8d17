# SPDX-License-Identifier: Apache-2.0
"""Limits of requests, and their parsing."""

import json
import math
from dataclasses import dataclass
from typing import Any

from t5x_lite import config


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
      characters: the most characters of a text to read.
      tokens: the most tokens of a text to write.
      waiting: the most texts that may wait while another one is written.
    """

    characters: int = 4000
    tokens: int = 256
    waiting: int = 4

    def __post_init__(self):
        for name, least in (("characters", 1), ("tokens", 1), ("waiting", 0)):
            value = getattr(self, name)
            if value < least:
                option = "--waiting" if name == "waiting" else f"--most_{name}"
                raise ValueError(f"{option} must be at least {least}; got {value}")

    @property
    def bytes(self) -> int:
        """The most bytes of a request: a character takes up to 12 as JSON escapes."""
        return 12 * self.characters + 2000


@dataclass(frozen=True)
class Question:
    """A request to a model.

    Attributes:
      model: name of the model.
      text: its input.
      decode: settings of decoding.
      chat: True if the chat template is applied to the text.
    """

    model: str
    text: str
    decode: config.Decode
    chat: bool = False


# Draft length, the same for all drafters: measuring the best one would take minutes.
WIDTH = 8
# Companions of a request: those that name no file.
COMPANIONS = ("", "unconditional", "layers:low", "layers:high")
# Numeric fields of a request: type, default, least and greatest value.
NUMBERS = {
    "max_new_tokens": (int, 64, 1, math.inf),
    "temperature": (float, 0.0, 0.0, 10.0),
    "seed": (int, 0, 0, 2**32 - 1),
    "top_p": (float, 1.0, 0.001, 1.0),
    "min_p": (float, 0.0, 0.0, 0.999),
    "repetition_penalty": (float, 1.0, 0.1, 10.0),
}
# The most characters of a text that ends an answer.
LONGEST_STOP = 100


def parse_question(body: bytes, drafters: dict[str, list[str]], limits: Limits) -> Question:
    """Parses a request.

    What reads a path (draft:PATH, model:PATH) is not allowed: a page cannot name files.

    Args:
      body: the request as JSON.
      drafters: the allowed drafters of each model.
      limits: limits of the request.

    Raises:
      ValueError: the body is not JSON, a field is missing, has another type or is beyond its
        limit, or the model or the drafter is unknown.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("The question is not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("The question is not a JSON object")
    model, text = (read_string(fields, name) for name in ("model", "text"))
    if model not in drafters:
        raise ValueError(f"Unknown model {model[:100]!r}: choose from {', '.join(drafters)}")
    if len(text) > limits.characters:
        raise ValueError(f"The text has {len(text)} characters, more than {limits.characters}")
    drafter = read_string(fields, "drafter", "plain")
    if drafter not in drafters[model]:
        raise ValueError(f"drafter must be one of {', '.join(drafters[model])}")
    numbers = {name: read_number(fields, name) for name in NUMBERS}
    if numbers["max_new_tokens"] > limits.tokens:
        raise ValueError(
            f"max_new_tokens must be at most {limits.tokens}, got {numbers['max_new_tokens']}"
        )
    chat = fields.get("chat", False)
    if not isinstance(chat, bool):
        raise ValueError("chat must be true or false")
    width = 0 if drafter == "plain" else WIDTH
    decode = config.Decode(
        drafter=drafter,
        draft_length=width,
        choices=read_choices(fields, limits),
        companion=read_companion(fields),
        stop=read_stop(fields),
        **numbers,
    )
    return Question(model, text, decode, chat)


def read_choices(fields: dict[str, Any], limits: Limits) -> tuple[str, ...]:
    """Reads the texts to choose from, between commas."""
    choices = [each.strip() for each in read_string(fields, "choices", "").split(",")]
    if sum(map(len, choices)) > limits.characters:
        raise ValueError(f"choices have more than {limits.characters} characters")
    return tuple(filter(None, choices))


def read_stop(fields: dict[str, Any]) -> tuple[str, ...]:
    """Reads the text that ends an answer; empty for none."""
    stop = read_string(fields, "stop", "")
    if len(stop) > LONGEST_STOP:
        raise ValueError(f"stop has more than {LONGEST_STOP} characters")
    return (stop,) if stop else ()


def read_companion(fields: dict[str, Any]) -> str:
    """Reads the companion, which is one of COMPANIONS."""
    companion = read_string(fields, "companion", "")
    if companion not in COMPANIONS:
        raise ValueError(f"companion must be empty or one of {', '.join(filter(None, COMPANIONS))}")
    return companion


def read_string(fields: dict[str, Any], name: str, otherwise: str | None = None) -> str:
    """Reads a text field.

    Args:
      fields: fields of the request.
      name: name of the field.
      otherwise: its default; None if it is required.
    """
    value = fields.get(name, otherwise)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    # A lone surrogate, which JSON can escape, cannot be encoded.
    return value.encode("utf-8", "replace").decode("utf-8")


def read_number(fields: dict[str, Any], name: str) -> Any:
    """Reads a numeric field, within the limits of NUMBERS."""
    kind, otherwise, least, most = NUMBERS[name]
    value = fields.get(name, otherwise)
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    # NaN fails this comparison.
    if not fits or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}")
    return kind(value)
