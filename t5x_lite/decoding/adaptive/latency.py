# SPDX-License-Identifier: Apache-2.0
"""Latency of a step at each width: measured once per model, batch and device, and cached.

The program that is measured is the one that will run, drafting included, with every draft rejected:
each step adds one token, and the time of some of them gives the latency at a width.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from t5x_lite import config
from t5x_lite.decoding import generation
from t5x_lite.decoding.acceptance.exact import Exact
from t5x_lite.decoding.adaptive.draft_lengths import DISABLED
from t5x_lite.decoding.adaptive.drafter import Adaptive, CostModel
from t5x_lite.decoding.protocol import Target
from t5x_lite.decoding.request import Request, bucket_length
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import cache_folder, local_path

VARIABLE = "T5X_LITE_COSTS"
# Least number of steps of a measurement, and how often each width is measured, in turns; the
# shortest time counts.
STEPS, ROUNDS = 8, 3
# Layout of a row of the table, part of its key: rows of another layout are measured anew.
LAYOUT = "plain call, then widths"


def with_cost_model(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> generation.Drafting:
    """Adds the cost model of an Adaptive drafter, from the table or measured now.

    The first measurement compiles what `generate` needs anyway. Several processes measure together,
    and all use the figures of the first one, so that they choose the same widths.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: a request of the shapes that matter.
      decode: limits and sampling.
      drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.

    Returns:
      drafting with a CostModel as its weights.
    """
    if jax.process_count() > 1:
        seconds = np.array(measure_latencies(cfg, params, request, decode, drafting))
        return attach_costs(drafting, multihost_utils.broadcast_one_to_all(seconds).tolist())
    name = cache_key(cfg, params, request, decode, drafting)
    table = read_table(cache_path())
    if name not in table:
        seconds = measure_latencies(cfg, params, request, decode, drafting)
        table = save_row(cache_path(), name, seconds)
    return attach_costs(drafting, table[name])


def adaptive_drafter(drafting: generation.Drafting) -> Adaptive:
    """The drafter, which has to be an Adaptive."""
    assert isinstance(drafting.drafter, Adaptive)
    return drafting.drafter


def attach_costs(
    drafting: generation.Drafting, seconds: list[float], reject_all: bool = False
) -> generation.Drafting:
    """Wraps the weights of a drafter in a CostModel.

    Args:
      drafting: an Adaptive drafter, and its drafter's weights.
      seconds: seconds of a plain step, and of one at each width.
      reject_all: reject every draft.

    Returns:
      drafting with a CostModel as its weights.
    """
    costs = CostModel(
        seconds=np.array(seconds[1:], np.float32),
        plain_seconds=np.float32(seconds[0]),
        reject_all=np.bool_(reject_all),
        drafter_weights=drafting.weights,
    )
    return drafting._replace(weights=costs)


def measure_latencies(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> list[float]:
    """Measures the seconds of a plain step, and of one at each width of the drafter.

    A wider block never gets less than a narrower one: that would be noise.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: a request of the shapes that matter.
      decode: limits and sampling.
      drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.
    """
    adaptive = adaptive_drafter(drafting)
    count = len(adaptive.widths)
    never = -1 if isinstance(request.eos, int) else np.full_like(request.eos, -1)
    request = request._replace(eos=never)
    most = max(min(decode.max_new_tokens, int(np.max(request.limit))) - 1, 1)

    def time_steps(number: int, steps: int) -> float:
        """Seconds of the start (encoder, prefill, first token) and of so many steps."""
        fixed = attach_costs(drafting, single_width_costs(number, count), reject_all=True)
        rows = request._replace(limit=np.minimum(request.limit, steps + 1))
        begin = time.perf_counter()
        generation.generate(cfg, params, rows, decode, fixed)
        return time.perf_counter() - begin

    time_steps(0, 0)
    start = time_steps(0, 0)
    steps = np.full(count, min(STEPS, most))
    for number in range(count):
        # The start of a small model takes as long as a hundred steps: its noise would be most of
        # the difference if only a few were measured.
        while steps[number] < most and time_steps(number, steps[number]) < 1.5 * start:
            steps[number] = min(2 * steps[number], most)
    total = np.full(count, np.inf)
    for _ in range(ROUNDS):
        start = min(start, time_steps(0, 0))
        total = np.minimum(total, [time_steps(number, steps[number]) for number in range(count)])
    # On a busy machine the start alone can take longer than start and steps did.
    seconds = np.maximum.accumulate(np.maximum(total - start, total / 4) / steps)
    overhead = 0.0
    if adaptive_drafter(drafting).drafts_ahead:
        overhead = measure_draft_overhead(request, decode, drafting)
    return [max(seconds[0] - overhead, seconds[0] / 4), *seconds.tolist()]


def single_width_costs(number: int, count: int) -> list[float]:
    """Costs that leave no choice but width `number` of `count`, or no drafting (DISABLED)."""
    place = 0 if number == DISABLED else number + 1
    return [1.0 if each == place else np.inf for each in range(count + 1)]


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
    narrow = attach_costs(narrow, single_width_costs(0, 2), reject_all=True)
    rows = generation.shard_rows(request._replace(eos=None))

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
    state = generation.initial_state(context, None, context.slots, drafter.begin(context))
    return generation.run_decoding(program, context, state).steps


def cache_key(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> str:
    """Returns a key of all that a latency depends on: model, shapes, drafter, device, versions.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: a request of the shapes that matter.
      decode: limits and sampling.
      drafting: an Adaptive drafter, its drafter's weights, and the acceptance rule.
    """
    shapes = [None if x is None else np.shape(x) for x in (request.inputs, request.prompts)]
    device = jax.devices()[0]
    identity = (
        cfg,
        # Quantized weights take less time to read.
        sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}),
        drafting.drafter,
        drafting.accept,
        jax.tree.map(np.shape, drafting.weights),
        shapes,
        bucket_length(decode.max_new_tokens),
        decode.temperature > 0,
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


def cache_path() -> Path:
    """Path of the table: T5X_LITE_COSTS in the environment, or in the user's cache."""
    named = os.environ.get(VARIABLE)
    return local_path(named) if named else cache_folder() / "costs.json"


def read_table(path: Path) -> dict[str, list[float]]:
    """Returns the latencies by key; none from a file that is missing or damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

    def is_valid(row):
        return isinstance(row, list) and all(isinstance(x, float) for x in row)

    if not isinstance(table, dict):
        return {}
    return {name: row for name, row in table.items() if is_valid(row)}


def save_row(path: Path, name: str, seconds: list[float]) -> dict[str, list[float]]:
    """Adds a row to the table, and replaces its file in one move.

    Args:
      path: the file; one that cannot be written is left as it is.
      name: key of the row.
      seconds: the row.

    Returns:
      The table with the row.
    """
    table = read_table(path) | {name: seconds}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=1) + "\n")
    return table
