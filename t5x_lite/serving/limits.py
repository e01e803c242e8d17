# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine."""

import dataclasses

from t5x_lite import config


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine: they decide its memory, and the shapes of its few programs.

    Attributes:
      rows: texts that are written at the same time with like settings.
      max_inputs: most ids of an input.
      max_new_tokens: most new tokens of a text.
      block: forward passes between two looks at the queue.
      prefill_tokens: ids of inputs that one program reads, about; short inputs share it.
      prefill_budget: ids of inputs that are read between two blocks, about.
      queue: requests that may wait.
      lanes: different settings (adapter, constraint, drafter, class of widths, ...) that are
        served at the same time, each with rows of its own.
    """

    rows: int = 16
    max_inputs: int = 512
    max_new_tokens: int = 256
    block: int = 4
    prefill_tokens: int = 128
    prefill_budget: int = 512
    queue: int = 256
    lanes: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            config.require(
                getattr(self, field.name) >= 1,
                f"EngineLimits.{field.name} must be 1 or more; got {getattr(self, field.name)}",
            )


DEFAULT_LIMITS = EngineLimits()
