# SPDX-License-Identifier: Apache-2.0
"""Tiered decoding: plain steps first, drafted blocks once they repay their compilation.

A program that chooses among widths holds the model once for each, and plain decoding's alone takes
9 s of CPU time to compile for 135M weights, where a text of 128 tokens takes 4 s of plain steps.
Nobody knows how much will be written. So blocks are compiled when plain steps have taken as long as
that would take, as one buys skis when their rent has reached the price (Karlin et al., 1988):
whatever comes, waiting is at most about twice that of the best choice. Then the text goes on with
blocks. Latencies are measured on the way, over steps that write the text.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite import config
from t5x_lite.decoding.adaptive import latency
from t5x_lite.decoding.generation import Drafting, make_program
from t5x_lite.decoding.request import Request
from t5x_lite.decoding.result import Result
from t5x_lite.decoding.streaming import DecodeStream
from t5x_lite.utils import latency_table
from t5x_lite.utils.not_none import not_none

# Forward passes between two pauses where nobody reads the text before its end.
EVERY = 16
# Least seconds that a layer is assumed to take to compile: the plain program may be compiled
# already, by requests without drafts. SmolLM2's 30 layers take 0.3 s of CPU time each.
LAYER_SECONDS = 0.1


@dataclasses.dataclass
class ProgramTier:
    """Work with the programs of one shape.

    Attributes:
      setup_seconds: seconds to compile the plain program; None before that.
      plain_seconds: seconds of all plain steps so far.
      compiled: the drafted program is compiled.
    """

    setup_seconds: float | None = None
    plain_seconds: float = 0.0
    compiled: bool = False


class TieredDecoder:
    """Decodes with adaptive drafters, which it compiles and prices when that pays.

    Attributes:
      cfg: config of the model.
      report: callback with a line about what is waited for.
      at_once: compile the blocks before the first step, as reports on drafting need.
    """

    def __init__(self, cfg: config.Model, report: Callable[[str], None]):
        self.cfg, self.report = cfg, report
        self.at_once = False
        self.tiers: dict[tuple, ProgramTier] = {}
        self.timers: dict[str, latency.StepTimer] = {}
        self.prices: dict[str, list[float]] = {}

    def stream(
        self,
        params: Any,
        request: Request,
        decode: config.Decode,
        drafting: Drafting,
        every: int = EVERY,
    ) -> Iterator[Result]:
        """Yields the growing result, as `streaming.stream`; the text is that of plain decoding.

        Args:
          params: weights from `prepare_params`.
          request: the rows.
          decode: limits and sampling.
          drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.
          every: number of forward passes between two results.
        """
        text = DecodeStream(self.cfg, params, request, decode)
        tier = self.tiers.setdefault(program_key(text, drafting), ProgramTier())
        done = False
        if not (tier.compiled or self.at_once):
            self.set_up_plain(tier, text)
            while not done and not self.is_due(tier, drafting):
                began = time.perf_counter()
                result, done = text.advance(every)
                tier.plain_seconds += time.perf_counter() - began
                yield result
        if not done:
            self.set_up_blocks(tier, text, drafting)
            key = latency.price_key(self.cfg, params, request, decode, drafting)
            while not done:
                result, done = self.advance_blocks(key, text, drafting, every)
                yield result

    def set_up_plain(self, tier: ProgramTier, text: DecodeStream) -> None:
        """Compiles the plain program, and notes how long that takes the first time."""
        if tier.setup_seconds is None:
            began = time.perf_counter()
            text.advance(0)
            tier.setup_seconds = time.perf_counter() - began

    def setup_estimate(self, tier: ProgramTier, drafting: Drafting) -> float:
        """Estimates the seconds to compile blocks: for each width as many as the plain program."""
        adaptive = latency.adaptive_drafter(drafting)
        models = len(adaptive.widths) + adaptive.drafts_ahead
        least = LAYER_SECONDS * not_none(self.cfg.decoder).layers
        return models * max(tier.setup_seconds or 0.0, least)

    def is_due(self, tier: ProgramTier, drafting: Drafting) -> bool:
        """Returns True if plain steps have taken as long as the compilation of blocks would."""
        due = tier.plain_seconds >= self.setup_estimate(tier, drafting)
        return agree([float(due)])[0] > 0

    def set_up_blocks(self, tier: ProgramTier, text: DecodeStream, drafting: Drafting) -> None:
        """Compiles the drafted program, and goes on with it.

        Args:
          tier: work with programs of this shape.
          text: the text so far.
          drafting: the drafter.
        """
        if not tier.compiled:
            widths = latency.adaptive_drafter(drafting).widths[1:]
            seconds = self.setup_estimate(tier, drafting)
            known = f", about {seconds:.0f} s" if tier.setup_seconds else ""
            sizes = ", ".join(map(str, widths))
            self.report(f"compiling blocks of {sizes} tokens{known}, once for these lengths")
        text.change_drafter(latency.measuring_costs(drafting, 0))
        text.advance(0)
        tier.compiled = True

    def advance_blocks(
        self, key: str, text: DecodeStream, drafting: Drafting, every: int
    ) -> tuple[Result, bool]:
        """Decodes up to the next pause, at the best widths or at the one to measure next.

        Args:
          key: key of the prices.
          text: the text.
          drafting: the drafter.
          every: number of forward passes.

        Returns:
          The result so far, and True if every row is done.
        """
        count = len(latency.adaptive_drafter(drafting).widths)
        seconds = self.look_up(key, 1 + count)
        if seconds is not None:
            weights = latency.attach_costs(drafting, seconds).weights
            text.arguments = text.arguments._replace(weights=weights)
            return text.advance(every)
        timer = self.timers.setdefault(key, latency.StepTimer(count))
        number = not_none(timer.next_width())
        weights = latency.measuring_costs(drafting, number).weights
        text.arguments = text.arguments._replace(weights=weights)
        before, began = int(text.state.steps), time.perf_counter()
        result, done = text.advance(every)
        timer.record(number, time.perf_counter() - began, result.steps - before)
        if timer.next_width() is None:
            self.keep_prices(key, timer, text, drafting)
        return result, done

    def look_up(self, key: str, count: int) -> list[float] | None:
        """Returns the prices of a key: those of this process, or else of the table.

        Args:
          key: key of the prices.
          count: number of prices; a row of another length is not one.
        """
        if key not in self.prices and key not in self.timers:
            row = latency_table.read_table(latency_table.cache_path()).get(key, [])
            row = agree(row if len(row) == count else [np.nan] * count)
            if np.all(np.isfinite(row)) and np.min(row) > 0:
                self.prices[key] = row
        return self.prices.get(key)

    def keep_prices(
        self, key: str, timer: latency.StepTimer, text: DecodeStream, drafting: Drafting
    ) -> None:
        """Keeps what was measured, for this process and in the table.

        Args:
          key: key of the prices.
          timer: the measurements.
          text: a text of these sizes.
          drafting: the drafter.
        """
        overhead = 0.0
        if latency.adaptive_drafter(drafting).drafts_ahead:
            overhead = latency.measure_draft_overhead(text.request, text.decode, drafting)
        self.prices[key] = agree(timer.seconds(overhead))
        if jax.process_count() == 1:
            latency_table.save_row(latency_table.cache_path(), key, self.prices[key])


def program_key(text: DecodeStream, drafting: Drafting) -> tuple:
    """Returns the key of a text's programs: static arguments, rules and shapes of the rows."""
    request = text.arguments.request
    shapes = [None if x is None else x.shape for x in (request.inputs, request.prompts)]
    drafted = make_program(text.cfg, text.decode, drafting)
    return drafted, *shapes, jax.tree.structure(text.arguments.rules)


def agree(values: list[float]) -> list[float]:
    """Returns the values of the first process, so that all processes do the same."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.array(values)).tolist()
