# SPDX-License-Identifier: Apache-2.0
"""Specifications of accelerators, from their makers' pages, and the wiring of TPU slices."""

import math
import re
from typing import NamedTuple

from t5x_lite.training import flops
from t5x_lite.utils.not_none import not_none

GIB = 1 << 30


class Chip(NamedTuple):
    """Specification of one accelerator.

    Attributes:
      kind: jax's device kind.
      memory: bytes of HBM that a program can have.
      bandwidth: of HBM, bytes per second.
      link: bandwidth of one link in one direction, bytes per second.
      ring: chips in a row that form a ring, where slices are flat; 0: a slice of whole cubes
        (4 x 4 x 4 chips) has rings along all of its sides.
      box: number of chips that reach each other over the link; None: all of a slice are one torus.
      network: bandwidth between boxes, or between slices, bytes per second for each chip (0: not
        known).
      price: dollars for an hour, on demand, by `price_source`.
    """

    kind: str
    memory: int
    bandwidth: float
    link: float
    ring: int = 0
    box: int | None = None
    network: float = 0.0
    price: float = 0.0

    @property
    def price_source(self) -> str:
        """Source and date of the price."""
        return TPU_PRICES if self.box is None else GPU_PRICES

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return not_none(flops.peak_flops(self.kind))


# Memory of a TPU is what its compiler grants to a program (libtpu 0.0.52 names it when a program is
# larger). Bandwidths: docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e); they give the links' bits
# or bytes of both directions and all ports (4 on v5e and v6e, 6 on v4 and v5p). GPUs: NVIDIA's data
# sheets of A100 80GB SXM, H100 SXM and H200 SXM; memory as nvidia-smi reports, NVLink in one
# direction, network of a DGX (200 or 400 Gb/s for each GPU). Network of v5e and v6e: a pod's of 256
# chips on the page of v6e (6.4 and 25.6 Tb/s).
CHIPS = {
    "v4": Chip("TPU v4", int(31.75 * GIB), 1228e9, 50e9, price=3.22),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 50e9, ring=16, network=3.125e9, price=1.20),
    "v5p": Chip("TPU v5p", int(95.73 * GIB), 2765e9, 100e9, price=4.20),
    "v6e": Chip(
        "TPU v6 lite", int(31.24 * GIB), 1638e9, 100e9, ring=16, network=12.5e9, price=2.70
    ),
    "a100": Chip("NVIDIA A100", 80 * GIB, 2039e9, 300e9, box=8, network=25e9, price=1.30),
    "h100": Chip("NVIDIA H100", int(79.6 * GIB), 3350e9, 450e9, box=8, network=50e9, price=3.00),
    "h200": Chip("NVIDIA H200", int(140.4 * GIB), 4800e9, 450e9, box=8, network=50e9, price=4.00),
}
# Where the prices are from. Those of TPUs are of the cheapest region of the United States; v4 was
# read on a copy of the page, v5p and v6e have not been checked since they were noted. Those of GPUs
# are the middle of what clouds for GPUs ask (1.10 to 1.50, 2.50 to 3.50, 3.50 to 4.50).
TPU_PRICES = "cloud.google.com/tpu/pricing, on demand, about the end of 2024: check it there"
GPU_PRICES = "mercatus-ai.com/blog/cloud-gpu-pricing, May 2026"
TPUS = tuple(name for name, chip in CHIPS.items() if chip.box is None)

# Latency of one hop between neighbors, whatever is sent: "How to Scale Your Model" (Austin et al.,
# 2025), part 3.
HOP_SECONDS = 1e-6

# Slices that there are: docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e). Flat ones are listed;
# others are below one cube of 4 x 4 x 4 chips, or whole cubes, up to so many chips along a side.
# libtpu ends the process for some that there are not (v5e:4x4x4, v5p:0x1).
FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
PARTS_OF_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
CUBE, LONGEST_SIDE = 4, {"v4": 16, "v5p": 28}

TOPOLOGY = re.compile(r"(\w+?):(\d+(?:x\d+){1,2})")
COUNTED = re.compile(r"(\w+?)x(\d+)")


class Slice(NamedTuple):
    """Chips that work together.

    Attributes:
      name: as on the command line, "v5e:4x4".
      chip: their kind.
      count: number of chips.
      sides: chips along each side of the box that they fill.
    """

    name: str
    chip: Chip
    count: int
    sides: tuple[int, ...]

    def wraps(self, side: int) -> bool:
        """True if the chips along a side are a ring: the last is a neighbor of the first."""
        if self.chip.ring:
            return self.sides[side] == self.chip.ring
        return len(self.sides) == 3 and all(size % 4 == 0 for size in self.sides)


def parse_topology(name: str) -> Slice:
    """The slice that a name such as "v5e:4x4" means.

    Raises:
      ValueError: it is not the name of a TPU slice, or of one that there is not.
    """
    match = TOPOLOGY.fullmatch(name)
    if not match or match[1] not in TPUS:
        raise ValueError(
            f"--topology={name}: write a TPU generation ({', '.join(TPUS)}) and the sides of the "
            "slice, such as v5e:4x4, v6e:16x16 or v5p:4x4x8; GPUs are --chips=h100x8"
        )
    sides = tuple(int(side) for side in match[2].split("x"))
    check_sides(name, match[1], sides)
    return Slice(name, CHIPS[match[1]], math.prod(sides), sides)


def check_sides(name: str, generation: str, sides: tuple[int, ...]) -> None:
    """Checks the shape of a slice before a compiler sees it.

    Args:
      name: as on the command line.
      generation: of the TPU, such as "v5e".
      sides: chips along each side.

    Raises:
      ValueError: there are no such slices of that generation; lists those that there are.
    """
    if generation not in LONGEST_SIDE:
        if sides not in FLAT_SLICES:
            raise ValueError(
                f"--topology={name} does not exist: slices of {generation} are "
                f"{', '.join(map(sides_text, FLAT_SLICES))}"
            )
        return
    longest = LONGEST_SIDE[generation]
    cubes = len(sides) == 3 and all(side and side % CUBE == 0 for side in sides)
    if sides not in PARTS_OF_CUBE and not (cubes and max(sides) <= longest):
        raise ValueError(
            f"--topology={name} does not exist: slices of {generation} are "
            f"{', '.join(map(sides_text, PARTS_OF_CUBE))}, or have three sides that are multiples "
            f"of {CUBE} up to {longest}, such as 4x4x8"
        )


def sides_text(sides: tuple[int, ...]) -> str:
    """Sides as they are written in the name of a slice: 4x8."""
    return "x".join(map(str, sides))


def parse_chips(name: str) -> Slice:
    """The chips that a name such as "h100x8" means; TPUs as a flat slice or cubes of so many.

    Raises:
      ValueError: the chip is unknown.
    """
    if TOPOLOGY.fullmatch(name):
        return parse_topology(name)
    match = COUNTED.fullmatch(name)
    if not match or match[1] not in CHIPS or not int(match[2]):
        raise ValueError(
            f"--chips={name}: write a chip ({', '.join(CHIPS)}) and a count, such as h100x8 or "
            "v5ex16, or a TPU topology such as v5e:4x4"
        )
    return Slice(name, CHIPS[match[1]], int(match[2]), (int(match[2]),))


def ring_bandwidth(slice_: Slice, spans: tuple[int, ...], members: int) -> float:
    """Bytes per second that each chip of a group receives, at best, in an all-gather.

    Along every side longer than one a chip has two links where the side is a ring, else one at its
    end; where the box holds several such groups, they share its links ("How to Scale Your Model",
    part 3).

    Args:
      slice_: the slice.
      spans: chips along each side of the box in which the group lies.
      members: chips of the group.
    """
    filled = math.prod(spans)
    links = sum(
        2 if slice_.wraps(side) and span == slice_.sides[side] else 1
        for side, span in enumerate(spans)
        if span > 1
    )
    return slice_.chip.link * max(1, links) * members / filled
