# SPDX-License-Identifier: Apache-2.0
"""Collectives of a compiled program: kind, bytes, mesh axes, executions."""

import math
import re
from typing import NamedTuple

import numpy as np

from t5x_lite.planning import chips
from t5x_lite.planning.counted import COLLECTIVES
from t5x_lite.planning.hlo import Computation, Instruction, Module
from t5x_lite.planning.trips import Executions

LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# libtpu 0.0.42 also writes the devices of a mesh whose order is not that of their ids.
MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r"\s*\{([^}]*)\}"
)
PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: HLO's name, "all-gather".
      bytes: of the whole array on one chip of a group: the result of an all-gather, the input of
        the others.
      members: chips of a group.
      axes: mesh axes along which its groups lie.
      times: executions in a run of the program.
      seconds: of one execution, by the links' bandwidth.
      overlapped: true if the compiler runs it beside other work.
    """

    kind: str
    bytes: int
    members: int
    axes: tuple[str, ...]
    times: int
    seconds: float
    overlapped: bool


class Wiring(NamedTuple):
    """Placement of a program's devices in a slice.

    Attributes:
      axes: names of the mesh axes.
      sizes: their sizes.
      places: coordinates in the slice of each device, in the program's order [devices, sides].
      slice: the slice.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    places: np.ndarray
    slice: chips.Slice


def mesh_wiring(mesh, slice_: chips.Slice) -> Wiring:
    """The wiring of a jax mesh of TPU devices that fill slice_."""
    devices = mesh.devices.flatten()
    places = np.array([device.coords[: len(slice_.sides)] for device in devices])
    return Wiring(tuple(mesh.axis_names), mesh.devices.shape, places, slice_)


def collectives(module: Module, run: Executions, where: Wiring) -> list[Collective]:
    """Every collective that the program runs, in the order of the schedule.

    Args:
      module: the program.
      run: executions of each of its computations.
      where: placement of its devices.
    """
    return [
        make_collective(instruction, kind, overlapped, times, where)
        for name, times in run.times.items()
        for instruction, kind, overlapped in computation_collectives(
            module, module.computations[name]
        )
    ]


def computation_collectives(module: Module, computation: Computation):
    """Yields the collectives of one computation: instruction, kind, and true if it is overlapped.

    An asynchronous one stands in several fusions, of which each does a part: the one that begins it
    counts. Channels do not distinguish them: all that a shard_map has written share one. A
    reduce-scatter may be an all-reduce in a fusion that takes a slice of it.
    """
    for instruction in computation.instructions.values():
        kind = instruction.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            yield instruction, kind, kind != instruction.operation
        elif instruction.operation in ("fusion", "async-start"):
            inner = module.called_by(instruction, "calls")
            targets = {each.target for each in inner.instructions.values()}
            begins = "AsyncCollectiveStart" in targets
            if not begins and continues_collective(inner, targets):
                continue
            scattered = "reduce-scatter" in inner.name or "all-reduce-scatter" in inner.name
            for each in inner.instructions.values():
                if each.operation in COLLECTIVES:
                    kind = "reduce-scatter" if scattered else each.operation
                    yield each, kind, begins or instruction.operation == "async-start"


def continues_collective(fused: Computation, targets: set[str]) -> bool:
    """True if a fusion does a later part of a collective that another one has begun."""
    return "AsyncCollectiveDone" in targets or fused.name.startswith("async_collective_fusion")


def make_collective(
    instruction: Instruction, kind: str, overlapped: bool, times: int, where: Wiring
) -> Collective:
    """Collective of an instruction, with its time on these chips.

    Args:
      instruction: one of COLLECTIVES, or its start.
      kind: the collective that it is part of.
      overlapped: true if it runs beside other work.
      times: executions in a run of the program.
      where: placement of the program's devices.
    """
    size = instruction.bytes
    if instruction.operation.endswith("-start"):
        # (operands, results, contexts): the results are as many as the operands.
        count = len(instruction.operands)
        size = sum(array.bytes for array in instruction.arrays[count : 2 * count])
        size = size or instruction.bytes
    groups = replica_groups(instruction.attributes, len(where.places))
    members = groups.shape[1]
    if instruction.operation.removesuffix("-start") == "reduce-scatter":
        size *= members
    axes, spans = spanned_axes(groups, where)
    seconds = seconds_of(kind, size, members, spans, where.slice)
    return Collective(kind, size, members, axes, times, seconds, overlapped)


def count_devices(sizes: str, order: str | None) -> np.ndarray:
    """Device ids in an array of `sizes` with its axes put in `order`; XLA writes [2,4]T(1,0)."""
    lengths = list(map(int, sizes.split(",")))
    ids = np.arange(math.prod(lengths)).reshape(lengths)
    return ids.transpose(list(map(int, order.split(",")))) if order else ids


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Groups of devices that work together [groups, members], in any of XLA's notations.

    Raises:
      ValueError: they are written in none of them.
    """
    if match := MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        wanted = re.findall(r"'([^']+)'", match[4])
        ids = count_devices(match[2], match[3]) if match[2] else np.arange(devices)
        ids = ids.reshape(tuple(sizes.values()))
        order = [name for name in sizes if name not in wanted] + wanted
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return ids.reshape(-1, math.prod(sizes[name] for name in wanted))
    if match := COUNTED.search(attributes):
        return count_devices(match[2], match[3]).reshape(list(map(int, match[1].split(","))))
    if match := LISTED.search(attributes) or PAIRS.search(attributes):
        groups = [list(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(groups)
    if "replica_groups={}" in attributes:
        return np.arange(devices)[None]
    raise ValueError(f"The compiler writes a collective's groups in a new way: {attributes[:200]}")


def spanned_axes(groups: np.ndarray, where: Wiring) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Mesh axes along which the members of a group differ, and the number of chips that they cover
    along each side of the slice; of the widest group."""
    places = np.stack(np.unravel_index(groups, where.sizes), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, differs in zip(where.axes, differ, strict=True) if differs)
    chips_of = where.places[groups]
    spans = (chips_of.max(axis=1) - chips_of.min(axis=1) + 1).max(axis=0)
    return axes, tuple(int(span) for span in spans)


def seconds_of(
    kind: str, size: int, members: int, spans: tuple[int, ...], slice_: chips.Slice
) -> float:
    """Seconds of one collective: bytes over bandwidth, or the time of its hops if that is longer.

    "How to Scale Your Model", part 3: an all-gather or reduce-scatter receives all but the chip's
    part of the array, an all-reduce is both, in an all-to-all a part goes a quarter of the way.

    Args:
      kind: HLO's name.
      size: bytes of the whole array.
      members: chips of a group.
      spans: chips that the group covers along each side of the slice.
      slice_: the slice.
    """
    if members == 1:
        return 0.0
    bandwidth = chips.ring_bandwidth(slice_, spans, min(members, math.prod(spans)))
    share = (members - 1) / members
    if kind == "collective-permute":
        return max(size / slice_.chip.link, chips.HOP_SECONDS)
    passes = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(kind, 1.0)
    hops = sum(span // 2 for span in spans if span > 1) * (2 if kind == "all-reduce" else 1)
    return max(passes * share * size / bandwidth, hops * chips.HOP_SECONDS)
