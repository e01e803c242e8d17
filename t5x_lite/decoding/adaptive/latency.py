# SPDX-License-Identifier: Apache-2.0
"""Latency of a step at each width: measured once per model, batch and device, and cached.

Measured while texts are written (`tiers`): between two pauses every step has the same width, and
the time from one to the other gives its latency.
"""

import dataclasses
import functools
import hashlib
import os
import platform
import time
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Int

from t5x_lite import config
from t5x_lite.decoding import generation
from t5x_lite.decoding.acceptance.exact import Exact
from t5x_lite.decoding.adaptive.drafter import ANY_WIDTH, Adaptive, CostModel
from t5x_lite.decoding.protocol import Target
from t5x_lite.decoding.request import Request, bucket_length

# How often each width is measured, in turns; the shortest time counts. So often, too, the no-op
# model is timed.
ROUNDS = 2
# Layout of a row of the table, part of its key: rows of another layout are measured anew.
LAYOUT = "plain step, then widths, by bucket of slots"
# Texts whose numbers of slots are in one bucket have the same prices: attention over the cache is a
# small part of a step until it is long. The first bucket's most slots, and how many times more the
# next one has.
LEAST_SLOTS, NEXT_SLOTS = 64, 4


class StepTimer:
    """Seconds of a step at each width, measured over steps of texts that are being written.

    Attributes:
      shortest: shortest seconds of a step at each width; infinity before the first measurement.
      rounds: number of measurements at each width.
    """

    def __init__(self, count: int):
        self.shortest = np.full(count, np.inf)
        self.rounds = np.zeros(count, int)

    def next_width(self) -> int | None:
        """Index of the width to measure next; None if all are measured."""
        number = int(np.argmin(self.rounds))
        return number if self.rounds[number] < ROUNDS else None

    def record(self, number: int, seconds: float, steps: int) -> None:
        """Adds a measurement.

        Args:
          number: index of the width.
          seconds: seconds of all the steps.
          steps: number of steps; 0 where every row had ended.
        """
        if steps:
            self.shortest[number] = min(self.shortest[number], seconds / steps)
            self.rounds[number] += 1

    def seconds(self, overhead: float) -> list[float]:
        """Returns the seconds of a plain step, and of one at each width.

        A wider block never gets less than a narrower one: that would be noise.

        Args:
          overhead: seconds that drafting adds to a step of width 1.
        """
        widths = np.maximum.accumulate(self.shortest)
        return [max(widths[0] - overhead, widths[0] / 4), *widths.tolist()]


def adaptive_drafter(drafting: generation.Drafting) -> Adaptive:
    """The drafter, which has to be an Adaptive."""
    assert isinstance(drafting.drafter, Adaptive)
    return drafting.drafter


def attach_costs(
    drafting: generation.Drafting, seconds: list[float], fixed_width: int = ANY_WIDTH
) -> generation.Drafting:
    """Wraps the weights of a drafter in a CostModel.

    Args:
      drafting: an Adaptive drafter, and its drafter's weights.
      seconds: seconds of a plain step, and of one at each width.
      fixed_width: index of the width of every step; ANY_WIDTH to choose.

    Returns:
      drafting with a CostModel as its weights.
    """
    costs = CostModel(
        seconds=np.array(seconds[1:], np.float32),
        plain_seconds=np.float32(seconds[0]),
        fixed_width=np.int32(fixed_width),
        drafter_weights=drafting.weights,
    )
    return drafting._replace(weights=costs)


def measuring_costs(drafting: generation.Drafting, number: int) -> generation.Drafting:
    """Returns drafting with a CostModel that fixes the width of every step to index `number`."""
    return attach_costs(drafting, [1.0] * (1 + len(adaptive_drafter(drafting).widths)), number)


def measure_draft_overhead(
    request: Request, decode: config.Decode, drafting: generation.Drafting
) -> float:
    """Measures the seconds that drafting and choosing the width add to a plain step.

    With a model that does nothing. In the steps of a large model it is less than their noise: a
    drafter whose cost was measured as 1 ms in 28 (the truth is 2 us) used up its budget for trying
    drafts, and decoded two of eight texts at width 1 that a block of 8 decodes in 0.76 and 0.98 of
    the time.

    Args:
      request: a request of the shapes that matter.
      decode: limits.
      drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.
    """
    wide = adaptive_drafter(drafting)
    narrow = drafting._replace(drafter=dataclasses.replace(wide, widths=(1, wide.tree.width)))
    narrow = measuring_costs(narrow, 0)
    rows = generation.place_request(request)._replace(eos=None)

    def time_noop(drafting: generation.Drafting) -> float:
        program = generation.DecodeProgram(
            cfg=cast(config.Model, None),  # never read: no model runs
            length=bucket_length(decode.max_new_tokens),
            beams=1,
            n_best=1,
            drafter=drafting.drafter,
            accept=Exact(),
        )
        begin = time.perf_counter()
        jax.block_until_ready(run_noop_model(program, rows, drafting.weights))
        return time.perf_counter() - begin

    both = generation.PLAIN, narrow
    list(map(time_noop, both))
    plain, drafted = np.min([list(map(time_noop, both)) for _ in range(ROUNDS)], axis=0)
    return float(max(drafted - plain, 0.0)) / max(int(np.max(request.limit)), 1)


@functools.partial(jax.jit, static_argnums=0)
def run_noop_model(
    program: generation.DecodeProgram, request: Request, weights: Any
) -> Int[Array, ""]:
    """Decodes with a model that costs nothing and always chooses token 0, to time the loop alone.

    Args:
      program: static arguments; its config is not used.
      request: the rows, on the mesh.
      weights: the drafter's weights.

    Returns:
      The number of steps.
    """
    drafter = program.drafter
    vocabulary = np.zeros(max(drafter.top, 1), np.float32)
    noop_model = Target(
        forward=lambda tokens, index, cache, tree=None: (0.0 * tokens[..., None], cache),
        logits=lambda hidden: hidden + vocabulary,
    )
    rules = generation.ChoiceRules()
    context = generation.make_context(program, noop_model, request._replace(eos=-1), rules, weights)
    state = generation.initial_state(context, (), context.slots, drafter.begin(context))
    state = generation.begin_drafting(context, drafter, state)
    return generation.run_decoding(program, context, state).steps


def price_key(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> str:
    """Returns a key of all that a latency depends on: model, sizes, drafter, device, versions.

    Rows count exactly, lengths by bucket: a step costs about the same within one.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: a request of the shapes that matter.
      decode: limits and sampling.
      drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.
    """
    rows, prompt = request.prompts.shape
    inputs = 0 if request.inputs is None else request.inputs.shape[1]
    slots = prompt + bucket_length(decode.max_new_tokens)
    device = jax.devices()[0]
    identity = (
        cfg,
        # Quantized weights take less time to read.
        sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}),
        drafting.drafter,
        drafting.accept,
        jax.tree.map(np.shape, drafting.weights),
        (rows, slot_bucket(inputs), slot_bucket(slots)),
        decode.temperature > 0,
        *([decode.companion, decode.combine] if decode.companion else []),
        *([decode.kv_cache] if decode.kv_cache != "auto" else []),
        (
            device.platform,
            device.device_kind,
            jax.device_count(),
            platform.node(),
            os.cpu_count(),
        ),
        jax.sharding.get_abstract_mesh().shape_tuple,
        jax.__version__,
        LAYOUT,
    )
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:24]


def slot_bucket(slots: int) -> int:
    """Most slots of the bucket that a number of slots is in; 0 for none."""
    most = LEAST_SLOTS if slots else 0
    while most < slots:
        most *= NEXT_SLOTS
    return most
