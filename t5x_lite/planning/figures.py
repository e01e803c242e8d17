# SPDX-License-Identifier: Apache-2.0
"""What is known of a step before it runs, and the time, money and use of the chips that follow."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from t5x_lite.planning.chips import Slice
from t5x_lite.planning.collectives import Collective

What = Literal["training step", "decode step"]


class Memory(NamedTuple):
    """Bytes of one chip: by kind, the most at any one time, and what a program can have.

    `excess` is by how much the program is too large; `said` the compiler's own words.
    """

    kinds: dict[str, int]
    peak: int
    available: int
    excess: int = 0
    said: str = ""

    @property
    def fits(self) -> bool:
        return self.excess == 0


@dataclass(frozen=True)
class Figures:
    """One step of a run on a slice. FLOPs, bytes and collectives are of one chip; model_flops and
    tokens of all chips.

    `source` says where they come from: the compiler's program, or arithmetic. flops are what the
    chip computes, with what is computed again for the backward pass; model_flops what the model
    needs. What a program that does not fit would compute is not known: None.
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
    compile_seconds: float = 0.0


class Estimate(NamedTuple):
    """Seconds of one step by roofline: each resource alone, all overlapped, as the compiler has
    scheduled the collectives, and one after the other; and what follows from the scheduled time.

    mfu is the model's FLOPs over what the chips could do in the time; mfu_bound the same if all
    overlapped. cost is for 10^9 tokens, in the currency of the price; None without a price.
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


def estimate(figures: Figures, price: float | None = None) -> Estimate:
    """The time of a step of which FLOPs and bytes are known; price is of one chip for an hour.

    Compute and HBM traffic are taken to overlap, as they do within every fusion. Scheduled: the
    collectives that the compiler starts early and waits for late overlap with them too, the others
    are waited for.
    """
    chip = figures.slice.chip
    compute, memory = figures.flops / chip.peak, figures.moved / chip.bandwidth
    seconds = {True: 0.0, False: 0.0}
    for each in figures.collectives:
        seconds[each.overlapped] += each.times * each.seconds
    interconnect = seconds[True] + seconds[False]
    overlapped = max(compute, memory, interconnect)
    scheduled = max(compute, memory, seconds[True]) + seconds[False]
    needed = figures.model_flops / figures.slice.count / chip.peak
    speed = figures.tokens / scheduled
    cost = None if price is None else 1e9 / speed * figures.slice.count * price / 3600
    return Estimate(
        compute,
        memory,
        interconnect,
        overlapped,
        scheduled,
        compute + memory + interconnect,
        speed,
        needed / scheduled,
        needed / overlapped,
        cost,
    )
