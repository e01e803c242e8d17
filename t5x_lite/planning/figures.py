# SPDX-License-Identifier: Apache-2.0
"""Figures of a step before it runs, and the time, cost and utilization that follow from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from t5x_lite.planning.chips import Slice
from t5x_lite.planning.collectives import Collective
from t5x_lite.utils.not_none import not_none

What = Literal["training step", "decode step"]


class Memory(NamedTuple):
    """Memory of one chip, in bytes.

    Attributes:
      kinds: bytes by kind of array.
      peak: the most at any one time.
      available: what a program can have.
      excess: bytes by which the program is too large; 0 if it fits.
      message: the compiler's, where the program does not fit.
    """

    kinds: dict[str, int]
    peak: int
    available: int
    excess: int = 0
    message: str = ""

    @property
    def fits(self) -> bool:
        return self.excess == 0


@dataclass(frozen=True)
class Figures:
    """One step of a run on a slice.

    Attributes:
      what: kind of step.
      source: origin of the figures: the compiler's program, or arithmetic.
      slice: the chips.
      mesh: sizes of the mesh axes.
      memory: of one chip.
      tokens: of a step, all chips together.
      model_flops: FLOPs that the model needs for a step, all chips together.
      flops: FLOPs that one chip computes, recomputation included; None where the program does not
        fit.
      moved: bytes of HBM that one chip reads and writes; None where the program does not fit.
      collectives: those that one chip takes part in.
      unknown_loops: names of loops of unknown length, counted once.
      instructions: number of the program's instructions, those of loops once.
      compile_seconds: duration of the compilation.
    """

    what: What
    source: Literal["compiled", "arithmetic"]
    slice: Slice
    mesh: dict[str, int]
    memory: Memory
    tokens: int
    model_flops: int
    flops: int | None = None
    moved: int | None = None
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    instructions: int = 0
    compile_seconds: float = 0.0


class StepEstimate(NamedTuple):
    """Time of one step by roofline, and what follows from it.

    Attributes:
      compute: seconds of the FLOPs alone.
      memory: seconds of the HBM traffic alone.
      interconnect: seconds of the collectives alone.
      overlapped: seconds if all three overlap.
      scheduled: seconds with the overlap of collectives that the compiler has scheduled.
      summed: seconds if nothing overlaps.
      tokens_per_second: of all chips, at the scheduled time.
      mfu: model FLOP utilization at the scheduled time.
      mfu_bound: the same if all overlap.
      cost: of 10^9 tokens, in the currency of the price; None without a price.
    """

    compute: float
    memory: float
    interconnect: float
    overlapped: float
    scheduled: float
    summed: float
    tokens_per_second: float
    mfu: float
    mfu_bound: float
    cost: float | None


def estimate(figures: Figures, price: float | None = None) -> StepEstimate:
    """Time of a step of which FLOPs and bytes are known; price is of one chip for an hour.

    Compute and HBM traffic are assumed to overlap, as they do within every fusion. Scheduled: the
    collectives that the compiler starts early and waits for late overlap with them too, the others
    are waited for.
    """
    chip = figures.slice.chip
    compute, memory = not_none(figures.flops) / chip.peak, not_none(figures.moved) / chip.bandwidth
    seconds = {True: 0.0, False: 0.0}
    for each in figures.collectives:
        seconds[each.overlapped] += each.times * each.seconds
    interconnect = seconds[True] + seconds[False]
    overlapped = max(compute, memory, interconnect)
    scheduled = max(compute, memory, seconds[True]) + seconds[False]
    needed = figures.model_flops / figures.slice.count / chip.peak
    speed = figures.tokens / scheduled
    cost = None if price is None else 1e9 / speed * figures.slice.count * price / 3600
    return StepEstimate(
        compute=compute,
        memory=memory,
        interconnect=interconnect,
        overlapped=overlapped,
        scheduled=scheduled,
        summed=compute + memory + interconnect,
        tokens_per_second=speed,
        mfu=needed / scheduled,
        mfu_bound=needed / overlapped,
        cost=cost,
    )
