# SPDX-License-Identifier: Apache-2.0
"""A server on a chip before it is rented: rows that fit, tokens per second, price of a token."""

import dataclasses
import math
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.planning import compiled, steps
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.figures import Figures, Memory, estimate
from t5x_lite.planning.phases import Phase, ServingArithmetic

# Rows of the table are so many times those of the line above.
ROWS_STEP = 4
# Compilations until fewer rows fit.
MOST_COMPILES = 4


class ServingPoint(NamedTuple):
    """A server whose rows are all in use, at best.

    Attributes:
      rows: texts at once, of all chips.
      memory: bytes of each chip.
      first_seconds: from the row that is free to the first token: its input is read, one step.
      token_seconds: between two tokens of a text, the inputs of others read between them.
      requests_per_second: of all chips.
      tokens_per_second: new tokens of all chips.
      input_price: of 10^6 ids of inputs.
      token_price: of 10^6 new tokens, without their inputs.
      whole_price: of 10^6 new tokens with their inputs.
    """

    rows: int
    memory: int
    first_seconds: float
    token_seconds: float
    requests_per_second: float
    tokens_per_second: float
    input_price: float
    token_price: float
    whole_price: float


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """Figures of a server.

    Attributes:
      known: bytes and FLOPs of its texts.
      price: of one chip for an hour.
      memory: of one chip with the most rows, or with one for each shard where none fits.
      points: figures by number of rows, the most last; empty where it does not fit.
      phases: each phase, decode with the most rows.
      step: a decode step of the most rows by the compiler's program; None by arithmetic alone.
    """

    known: ServingArithmetic
    price: float
    memory: Memory
    points: list[ServingPoint]
    phases: list[Phase]
    step: Figures | None = None


def plan_server(known: ServingArithmetic, price: float, most: int | None = None) -> ServingPlan:
    """Figures of a server by arithmetic.

    Args:
      known: bytes and FLOPs of its texts.
      price: of one chip for an hour.
      most: rows of all chips that it is to have; None for as many as fit.

    Raises:
      ValueError: the mesh cannot split the rows, a weight or the heads.
    """
    shard_rows = fitting_rows(known) if most is None else known.shard_rows(most)
    memory = serving_memory(known, max(shard_rows, 1))
    last = known.decoding(max(shard_rows, 1))
    listed = [] if not memory.fits else list_rows(shard_rows)
    return ServingPlan(
        known=known,
        price=price,
        memory=memory,
        points=[serving_point(known, price, rows, known.decoding(rows).seconds) for rows in listed],
        phases=[known.reading(known.read_rows()), last],
    )


def fitting_rows(known: ServingArithmetic) -> int:
    """The most rows of a shard whose caches fit beside weights and activations."""
    free = known.slice.chip.memory - known.weight_bytes() - known.reading_bytes()
    return max(math.floor(free / (known.row_bytes() + known.working_bytes())), 0)


def serving_memory(known: ServingArithmetic, rows: int) -> Memory:
    """Bytes of a chip by kind.

    Args:
      known: bytes and FLOPs of the texts.
      rows: of a shard.
    """
    kinds = {
        "weights": known.weight_bytes(),
        "caches": math.ceil(rows * known.row_bytes()),
        "activations of a decode step": math.ceil(rows * known.working_bytes()),
        "activations of inputs": math.ceil(known.reading_bytes()),
    }
    peak, available = sum(kinds.values()), known.slice.chip.memory
    return Memory(kinds, peak, available, max(0, peak - available))


def list_rows(most: int) -> list[int]:
    """Numbers of rows of the table, up to the most."""
    listed = [ROWS_STEP**power for power in range(int(math.log(most, ROWS_STEP)) + 1)]
    return [rows for rows in listed if rows < most] + [most]


def serving_point(
    known: ServingArithmetic, price: float, rows: int, step_seconds: float
) -> ServingPoint:
    """Figures of a server whose rows are all in use.

    Args:
      known: bytes and FLOPs of the texts.
      price: of one chip for an hour.
      rows: of a shard.
      step_seconds: duration of a decode step.
    """
    sizes = known.sizes
    together = min(known.read_rows(), rows)
    reading = known.reading(together).seconds
    # Seconds of a shard's chips for one text.
    read, written = reading / together, sizes.new_tokens * step_seconds / rows
    requests = known.shards / (read + written)
    second = price * known.slice.count / 3600 / known.shards
    return ServingPoint(
        rows=rows * known.shards,
        memory=serving_memory(known, rows).peak,
        first_seconds=reading + step_seconds,
        token_seconds=step_seconds + rows / sizes.new_tokens * read,
        requests_per_second=requests,
        tokens_per_second=requests * sizes.new_tokens,
        input_price=1e6 * second * read / sizes.inputs,
        token_price=1e6 * second * written / sizes.new_tokens,
        whole_price=1e6 * second * (read + written) / sizes.new_tokens,
    )


def compile_server(run: config.Run, slice_: Slice, plan: ServingPlan) -> ServingPlan:
    """The plan with a decode step by the compiler's program, and fewer rows where it needs more.

    Args:
      run: config of the run.
      slice_: TPU slice to compile for.
      plan: by arithmetic.

    Raises:
      ValueError: the mesh does not suit the slice or the model.
    """
    known, sizes = plan.known, plan.known.sizes
    rows = max(plan.points[-1].rows // known.shards if plan.points else 1, 1)
    for _ in range(MOST_COMPILES):
        size = steps.Decoding(rows * known.shards, sizes.new_tokens, sizes.inputs, sizes.quantize)
        step = compiled.figures(run, slice_, size)
        if step.memory.fits or rows == 1:
            break
        rows = max(rows - math.ceil(step.memory.excess / known.row_bytes()) - rows // 50, 1)
    fewer = plan_server(known, plan.price, rows * known.shards)
    points = fewer.points[:-1] if step.memory.fits else []
    if step.memory.fits:
        point = serving_point(known, plan.price, rows, estimate(step).scheduled)
        points = [*points, point._replace(memory=step.memory.peak)]
    return dataclasses.replace(fewer, memory=step.memory, points=points, step=step)


def record_plan(plan: ServingPlan) -> dict[str, Any]:
    """All figures as a JSON object, in bytes, seconds and the price's currency."""
    known, memory = plan.known, plan.memory
    return {
        "what": "server",
        "source": "arithmetic" if plan.step is None else "compiled",
        "slice": known.slice.name,
        "chips": known.slice.count,
        "mesh": known.mesh,
        "sizes": known.sizes._asdict(),
        "price": plan.price,
        "memory": {"fits": memory.fits, "peak": memory.peak, "available": memory.available}
        | {"kinds": memory.kinds, "row": known.row_bytes()},
        "phases": [record_phase(phase) for phase in plan.phases],
        "points": [point._asdict() for point in plan.points],
    }


def record_phase(phase: Phase) -> dict[str, Any]:
    """A phase as a JSON object, in FLOPs, bytes and seconds."""
    derived = {name: getattr(phase, name) for name in ("seconds", "intensity", "bound")}
    return phase._asdict() | {"chip": phase.chip.kind} | derived
