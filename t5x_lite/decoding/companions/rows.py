# SPDX-License-Identifier: Apache-2.0
"""Rows that a companion reads, and layers that it names.

b rows
"""

import dataclasses
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.config.companions import parse_companion, parse_layers
from t5x_lite.decoding.companions.companion import Companion
from t5x_lite.decoding.request import PromptRows, Request
from t5x_lite.utils.not_none import not_none

# Of at most so many layers every second one of a half is a candidate; of more, every second of the
# 20 nearest to that end, as in transformers.
MANY_LAYERS = 40


def attach_companion(
    request: Request, companion: Companion, rows: PromptRows | None = None
) -> Request:
    """Returns a request with a companion.

    Args:
      request: the rows.
      companion: the companion, without rows.
      rows: what it reads, one row for all samples of an input; None for layers.
    """
    return request._replace(companion=dataclasses.replace(companion, rows=rows))


def same_rows(request: Request, samples: int = 1) -> PromptRows:
    """Rows of a companion that reads what the model reads.

    Args:
      request: the rows of the model.
      samples: rows in a row that continue the same input.
    """
    names = ("inputs", "inputs_length", "prompts", "prompts_length")
    arrays = (getattr(request, name) for name in names)
    return PromptRows(*(None if each is None else each[::samples] for each in arrays))


def last_rows(request: Request, samples: int = 1) -> PromptRows:
    """Rows of a companion that reads the last token of the input alone, as in transformers.

    Args:
      request: the rows of the model.
      samples: rows in a row that continue the same input.
    """
    rows = same_rows(request, samples)
    if rows.inputs is None:
        tokens, length = take_last(rows.prompts, rows.prompts_length)
        return rows._replace(prompts=tokens, prompts_length=length)
    tokens, length = take_last(rows.inputs, rows.inputs_length)
    return rows._replace(inputs=tokens, inputs_length=length)


def take_last(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the last token of each row [b 1], and lengths of 1."""
    return np.take_along_axis(tokens, lengths[:, None] - 1, axis=1), np.ones_like(lengths)


def place_companion(companion: Companion | None, shard: Any) -> Companion | None:
    """Places the rows of a companion on the mesh.

    Args:
      companion: the companion; None for none.
      shard: splits rows over the mesh.
    """
    if companion is None or companion.rows is None:
        return companion
    return dataclasses.replace(companion, rows=shard(companion.rows))


def check_companion(cfg: config.Model, decode: config.Decode) -> None:
    """Checks a companion as far as that is possible without loading anything.

    Args:
      cfg: config of the model.
      decode: its companion and combine.

    Raises:
      ValueError: it names layers that the model lacks.
    """
    if decode.companion.startswith("layers:"):
        companion_layers(cfg, decode.companion)


def companion_layers(cfg: config.Model, companion: str) -> tuple[int, ...]:
    """Returns the layers of a companion such as "layers:2,4" or "layers:high".

    Args:
      cfg: config of the model.
      companion: Decode.companion.

    Raises:
      ValueError: the model has fewer layers.
    """
    _, argument = parse_companion(companion)
    count = not_none(cfg.decoder).layers
    layers = parse_layers(argument)
    for layer in layers:
        config.require(
            1 <= layer < count,
            f"Decode.companion {companion}: the decoder has {count} layers, so {layer} must be in "
            f"1..{count - 1}",
        )
    config.require(count > 1, f"Decode.companion {companion}: the decoder has one layer only")
    half = count // 2
    if argument == "low":
        return tuple(range(2, half if count <= MANY_LAYERS else 20, 2)) or (1,)
    if argument == "high":
        return tuple(range(half if count <= MANY_LAYERS else count - 20, count, 2))
    return layers
