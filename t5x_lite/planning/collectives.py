# SPDX-License-Identifier: Apache-2.0
"""What chips send one another in a compiled program: kind, bytes, mesh axes, how often."""

import re
from typing import NamedTuple

import numpy as np

from t5x_lite.planning import chips
from t5x_lite.planning.counted import COLLECTIVES
from t5x_lite.planning.hlo import Computation, Instruction, Module
from t5x_lite.planning.trips import Executions

LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


class Collective(NamedTuple):
    """One collective of a program: `bytes` of the whole array on one chip of a group (what an
    all-gather makes, what the others begin with), `times` in a run of the program, the mesh axes
    along which its groups lie, seconds of one by the links' bandwidth, and whether the compiler
    lets it go on beside other work.
    """

    kind: str
    bytes: int
    members: int
    axes: tuple[str, ...]
    times: int
    seconds: float
    overlapped: bool


class Wiring(NamedTuple):
    """Where the devices of a program are: mesh axes and sizes, and of each device, in the order of
    the program, its place in the slice [devices, sides]."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    places: np.ndarray
    slice: chips.Slice


def wiring(mesh, slice_: chips.Slice) -> Wiring:
    """The wiring of a jax mesh of TPU devices that fill slice_."""
    devices = mesh.devices.flatten()
    places = np.array([device.coords[: len(slice_.sides)] for device in devices])
    return Wiring(tuple(mesh.axis_names), mesh.devices.shape, places, slice_)


def collectives(module: Module, run: Executions, where: Wiring) -> list[Collective]:
    """Every collective that the program runs, in the order of the schedule."""
    found = []
    for name, times in run.times.items():
        for own, kind, overlapped in within(module, module.computations[name]):
            found.append(described(own, kind, overlapped, times, where))
    return found


def within(module: Module, computation: Computation):
    """The collectives of one computation, each with its kind and whether it is overlapped.

    An asynchronous one stands in several fusions, of which each does a part: the one that begins it
    counts. Channels do not tell them apart: all that a shard_map has written share one. A
    reduce-scatter may be an all-reduce in a fusion that takes a slice of it.
    """
    for instruction in computation.instructions.values():
        kind = instruction.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            yield instruction, kind, kind != instruction.operation
        elif instruction.operation in ("fusion", "async-start"):
            inner = module.computations[instruction.called("calls")]
            targets = {each.target for each in inner.instructions.values()}
            begins = "AsyncCollectiveStart" in targets
            if not begins and continues(inner, targets):
                continue
            scattered = "reduce-scatter" in inner.name or "all-reduce-scatter" in inner.name
            for own in inner.instructions.values():
                if own.operation in COLLECTIVES:
                    kind = "reduce-scatter" if scattered else own.operation
                    yield own, kind, begins or instruction.operation == "async-start"


def continues(fused: Computation, targets: set[str]) -> bool:
    """Whether a fusion does a later part of a collective that another one has begun."""
    return "AsyncCollectiveDone" in targets or fused.name.startswith("async_collective_fusion")


def described(own: Instruction, kind: str, overlapped: bool, times: int, where: Wiring):
    """The collective that an instruction is, with its time on these chips."""
    size = own.bytes
    if own.operation.endswith("-start"):
        # (operands, results, contexts): the results are as many as the operands.
        count = len(own.operands)
        size = sum(array.bytes for array in own.arrays[count : 2 * count]) or own.bytes
    groups = replica_groups(own.attributes, len(where.places))
    members = groups.shape[1]
    if own.operation.removesuffix("-start") == "reduce-scatter":
        size *= members
    axes, spans = spanned(groups, where)
    seconds = seconds_of(kind, size, members, spans, where.slice)
    return Collective(kind, size, members, axes, times, seconds, overlapped)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Which devices work together [groups, members], in any of the three ways XLA writes it.

    Raises:
      ValueError: it is written in none of them.
    """
    if found := MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        wanted = re.findall(r"'([^']+)'", found[2])
        ids = np.arange(devices).reshape(tuple(sizes.values()))
        order = [name for name in sizes if name not in wanted] + wanted
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return ids.reshape(-1, chips.product(sizes[name] for name in wanted))
    if found := COUNTED.search(attributes):
        numbers = [list(map(int, part.split(","))) if part else None for part in found.groups()]
        ids = np.arange(chips.product(numbers[1])).reshape(numbers[1])
        ids = ids if numbers[2] is None else ids.transpose(numbers[2])
        return ids.reshape(numbers[0])
    if found := LISTED.search(attributes) or PAIRS.search(attributes):
        groups = [list(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(groups)
    if "replica_groups={}" in attributes:
        return np.arange(devices)[None]
    raise ValueError(f"The compiler writes a collective's groups in a new way: {attributes[:200]}")


def spanned(groups: np.ndarray, where: Wiring) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The mesh axes along which the members of a group differ, and how many chips of each side of
    the slice they cover; of the widest group."""
    places = np.stack(np.unravel_index(groups, where.sizes), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, own in zip(where.axes, differ, strict=True) if own)
    chips_of = where.places[groups]
    spans = (chips_of.max(axis=1) - chips_of.min(axis=1) + 1).max(axis=0)
    return axes, tuple(int(span) for span in spans)


def seconds_of(
    kind: str, size: int, members: int, spans: tuple[int, ...], slice_: chips.Slice
) -> float:
    """Seconds of one collective: bytes over bandwidth, or what its hops take if that is longer.

    "How to Scale Your Model", part 3: an all-gather or reduce-scatter takes in all but its own
    part of the array, an all-reduce is both, in an all-to-all a part goes a quarter of the way.
    """
    if members == 1:
        return 0.0
    bandwidth = chips.ring_bandwidth(slice_, spans, min(members, chips.product(spans)))
    share = (members - 1) / members
    if kind == "collective-permute":
        return max(size / slice_.chip.link, chips.HOP_SECONDS)
    passes = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(kind, 1.0)
    hops = sum(span // 2 for span in spans if span > 1) * (2 if kind == "all-reduce" else 1)
    return max(passes * share * size / bandwidth, hops * chips.HOP_SECONDS)
