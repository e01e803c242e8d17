# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine, and its numbers."""

import dataclasses
from typing import NamedTuple

from t5x_lite import config


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine: they decide its memory, and the shapes of its few programs.

    Attributes:
      rows: texts that are written at the same time with like settings.
      max_inputs: most ids of an input.
      max_new_tokens: most new tokens of a text.
      block: forward passes between two looks at the queue.
      prefill_tokens: ids of inputs that one program reads, about; short inputs share it, and a
        longer prompt of a lone decoder is read in chunks of so many.
      prefill_budget: ids of inputs that are read between two blocks, about; of a long prompt one
        chunk while rows write.
      prefix_bytes: bytes of the prefix cache, which keeps whole chunks; 0 for none.
      queue: requests that may wait.
      lanes: different settings (constraint, drafter, class of widths, ...) that are
        served at the same time, each with rows of its own.
    """

    rows: int = 16
    max_inputs: int = 512
    max_new_tokens: int = 256
    block: int = 4
    prefill_tokens: int = 128
    prefill_budget: int = 512
    prefix_bytes: int = 0
    queue: int = 256
    lanes: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name == "prefix_bytes" else 1
            config.require(
                getattr(self, field.name) >= least,
                f"EngineLimits.{field.name} must be {least} or more; "
                f"got {getattr(self, field.name)}",
            )


DEFAULT_LIMITS = EngineLimits()


class EngineGauges(NamedTuple):
    """Numbers of an engine, for metrics.

    Attributes:
      rows: texts that can be written at the same time.
      rows_used: texts that are being written, or whose prompts are being read.
      queued: requests that wait.
      finished: completions by finish reason.
      prompt_tokens: ids of inputs that were read.
      cached_tokens: those among them whose keys and values were in the prefix cache.
      prefix_bytes: bytes of the prefix cache.
      tokens: new tokens.
      accepted: those among them that a drafter had proposed.
      passes: forward passes.
    """

    rows: int
    rows_used: int
    queued: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    prefix_bytes: int
    tokens: int
    accepted: int
    passes: int
