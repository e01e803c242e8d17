# SPDX-License-Identifier: Apache-2.0
"""FLOPs and bytes of a compiled program on one chip, loops counted as often as they run.

FLOPs are those of matrix products and of kernels (by their cost estimates): the work of the matrix
unit, to be compared with a chip's peak. Additions and the like are not counted; they are 2 to 5 %
more.

Bytes moved are the reads and writes of HBM by every scheduled instruction: a fusion's intermediate
values and arrays in fast memory cost none; of what is sliced or gathered only that part is read,
and an update in place writes only the update. Padding of tiles is left out.
"""

import re
from typing import NamedTuple

import numpy as np

from t5x_lite.planning.hlo import (
    HBM,
    Array,
    Computation,
    HloError,
    Instruction,
    Module,
    hlo_errors,
)
from t5x_lite.planning.trips import Executions
from t5x_lite.utils.not_none import not_none

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# They name, forward or end what is counted elsewhere.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "optimization-barrier",
    "opt-barrier", "add-dependency", "domain", "async-update",
}  # fmt: skip
FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveDone"}
SLICES = ("dynamic-slice", "slice", "gather", "slice-start")
KERNEL = re.compile(r'"cost_estimate":\{([^}]*)\}')
# Places of a convolution's result times those of its kernel along one axis; at a million tokens
# and a kernel of 64 taps there are as many.
MOST_PLACES = 2**26


class ProgramCost(NamedTuple):
    """Work of one chip: FLOPs of products and kernels, and bytes of HBM read and written."""

    flops: int
    moved: int


def program_cost(module: Module, run: Executions) -> ProgramCost:
    """FLOPs and bytes of the whole program on one chip.

    Raises:
      HloError: an instruction is not as its operation requires; names it.
    """
    flops = moved = 0
    for name, times in run.times.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            with hlo_errors(instruction.name):
                flops += times * instruction_flops(module, computation, instruction)
                moved += times * instruction_bytes(module, computation, instruction)
    return ProgramCost(flops, moved)


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one execution, called computations included, unless it is control flow.

    Args:
      module: the program.
      computation: where the instruction stands.
      instruction: of any operation.
    """
    if instruction.operation == "convolution":
        return convolution_flops(computation, instruction)
    if instruction.operation == "dot":
        return dot_flops(computation, instruction)
    if instruction.operation == "custom-call":
        cost = kernel_cost(instruction)
        return cost.flops if cost else 0
    if instruction.operation in ("fusion", "async-start"):
        called = module.called_by(instruction, "calls")
        inner = called.instructions.values()
        return sum(instruction_flops(module, called, each) for each in inner)
    return 0


def dot_flops(computation: Computation, dot: Instruction) -> int:
    """Two for every product of a matrix product."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    left = computation.operand(dot, 0).arrays[0].shape
    depth = 1
    for axis in filter(None, contracted[1].split(",") if contracted else []):
        depth *= left[int(axis)]
    return 2 * dot.arrays[0].size * depth


def convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Two for every product that is not with padding.

    TPU compilers write batched matrix products as convolutions whose window meets one place of the
    input only.
    """
    labels = not_none(re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes))
    left, kernel = (computation.operand(convolution, i).arrays[0] for i in (0, 1))
    result = convolution.arrays[0]

    def size(array: Array, axes: str, axis: str) -> int:
        return array.shape[axes.index(axis)]

    places = 1
    for axis in filter(str.isdigit, labels[3]):
        sizes = (size(left, labels[1], axis), size(kernel, labels[2], axis))
        places *= valid_places(
            convolution.attributes, int(axis), *sizes, size(result, labels[3], axis)
        )
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    batch = size(left, labels[1], "b") // (int(groups[1]) if groups else 1)
    return 2 * batch * size(result, labels[3], "f") * size(kernel, labels[2], "i") * places


def valid_places(attributes: str, axis: int, left: int, kernel: int, result: int) -> int:
    """Pairs of places of result and kernel that meet a place of the input, along one axis.

    Args:
      attributes: of the convolution.
      axis: number of the spatial axis.
      left: size of the input.
      kernel: size of the kernel.
      result: size of the result.
    """
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def field(name: str) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else 1

    if result * kernel > MOST_PLACES:
        raise HloError(f"a convolution of {result:,} places with a kernel of {kernel:,}")
    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    dilation = field("lhs_dilate")
    place = np.arange(result)[:, None] * field("stride") - low
    place = place + np.arange(kernel)[None, :] * field("rhs_dilate")
    inside = (place >= 0) & (place <= (left - 1) * dilation) & (place % dilation == 0)
    return int(inside.sum())


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM that one execution reads and writes.

    Args:
      module: the program.
      computation: where the instruction stands.
      instruction: of any operation.
    """
    operation = instruction.operation
    if operation in FREE or operation.endswith("-done"):
        return 0
    if operation == "custom-call":
        return custom_bytes(computation, instruction)
    if operation == "async-start":
        called = module.called_by(instruction, "calls")
        return sum(instruction_bytes(module, called, each) for each in called.instructions.values())
    if operation == "fusion":
        return fusion_bytes(module, computation, instruction)
    if operation in ("copy-start", *SLICES):
        return copied_bytes(computation, instruction)
    if operation == "dynamic-update-slice":
        update = computation.operand(instruction, 1)
        return sum(map(in_hbm, update.arrays)) + part_in_hbm(instruction.arrays[0], update.bytes)
    if operation == "scatter":
        return 3 * sum(map(in_hbm, computation.operand(instruction, 2).arrays))
    return read_bytes(computation, instruction) + written_bytes(instruction)


def in_hbm(array: Array) -> int:
    """Bytes of an array if it lies in HBM, else 0."""
    return part_in_hbm(array, array.bytes)


def part_in_hbm(array: Array, count: int) -> int:
    """`count` bytes of an array if it lies in HBM, else 0."""
    return count if array.space == HBM else 0


def read_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM of an instruction's operands, each once."""
    names = dict.fromkeys(instruction.operands)
    return sum(in_hbm(x) for name in names for x in computation.instructions[name].arrays)


def written_bytes(instruction: Instruction) -> int:
    """Bytes of HBM of an instruction's results."""
    return sum(map(in_hbm, instruction.arrays))


def copied_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM of a copy or slice: it reads as much as it writes."""
    if instruction.operation == "slice-start":
        source, result = instruction.arrays[0], instruction.arrays[1]
    else:
        source = computation.operand(instruction, 0).arrays[0]
        result = instruction.arrays[0]
    return in_hbm(result) + part_in_hbm(source, result.bytes)


def custom_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM of a custom call."""
    if instruction.target in FREE_TARGETS:
        return 0
    cost = kernel_cost(instruction)
    if cost is None:
        return read_bytes(computation, instruction) + written_bytes(instruction)
    # A kernel's estimate covers all of its arrays; those that the compiler keeps in fast memory
    # cost no HBM traffic.
    operands = [x for name in instruction.operands for x in computation.instructions[name].arrays]
    arrays = [*operands, *instruction.arrays]
    whole = sum(array.bytes for array in arrays)
    return int(cost.moved * sum(map(in_hbm, arrays)) / whole) if whole else 0


def kernel_cost(instruction: Instruction) -> ProgramCost | None:
    """Cost estimate that a kernel passes to the compiler, bytes of fast memory included."""
    match = KERNEL.search(instruction.attributes)
    if match is None:
        return None
    # The compiler writes the fields in one order, jaxlib in another.
    fields = dict(re.findall(r'"(\w+)":"(\d+)"', match[1]))
    return ProgramCost(int(fields.get("flops", 0)), int(fields.get("bytes_accessed", 0)))


def fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> int:
    """Bytes of HBM that a fusion reads of its operands and writes of its results.

    Args:
      module: the program.
      computation: where the fusion stands.
      fusion: the instruction.
    """
    inner = module.called_by(fusion, "calls")
    total = 0
    for index, name in enumerate(fusion.operands):
        arrays = computation.instructions[name].arrays
        if len(arrays) == 1:
            total += part_in_hbm(arrays[0], operand_bytes(module, inner, index))
    roots = [inner.instructions[inner.root]]
    if roots[0].operation == "tuple":
        roots = [inner.instructions[name] for name in roots[0].operands]
    for root, array in zip(roots, fusion.arrays, strict=False):
        total += part_in_hbm(array, result_bytes(module, inner, root))
    return total


def operand_bytes(module: Module, inner: Computation, index: int) -> int:
    """Bytes of one operand that a fusion reads.

    Args:
      module: the program.
      inner: the fused computation.
      index: number of the operand.
    """
    for each in inner.instructions.values():
        if each.operation == "parameter" and int(each.arguments) == index:
            return used_bytes(module, inner, each)
    raise HloError(f"HLO computation {inner.name} has no parameter {index}")


def used_bytes(module: Module, inner: Computation, value: Instruction) -> int:
    """Bytes of a value that the instructions of a fusion read; all where it is the result.

    Args:
      module: the program.
      inner: the fused computation.
      value: one of its instructions.
    """
    total = value.bytes if value.name == inner.root else 0
    for user in inner.instructions.values():
        if value.name not in user.operands or passes_on(user):
            continue
        place = user.operands.index(value.name)
        if user.operation == "bitcast":
            total += used_bytes(module, inner, user)
        elif user.operation == "fusion":
            total += operand_bytes(module, module.called_by(user, "calls"), place)
        elif user.operation in SLICES and place == 0:
            total += user.bytes
        elif user.operation == "dynamic-update-slice" and place == 0:
            continue
        else:
            return value.bytes
    return min(total, value.bytes)


def passes_on(user: Instruction) -> bool:
    """True for a part of a collective that runs beside a fusion, or that forwards its buffers."""
    return user.operation in (*COLLECTIVES, "tuple") or user.target.startswith("AsyncCollective")


def result_bytes(module: Module, inner: Computation, root: Instruction) -> int:
    """Bytes that a fusion writes of one result.

    Args:
      module: the program.
      inner: the fused computation.
      root: the instruction of the result.
    """
    while root.operation == "bitcast":
        root = inner.operand(root, 0)
    if root.operation == "fusion" and len(root.arrays) == 1:
        called = module.called_by(root, "calls")
        return result_bytes(module, called, called.instructions[called.root])
    if root.operation == "dynamic-update-slice":
        return inner.operand(root, 1).bytes
    if root.operation == "parameter" or passes_on(root):
        return 0
    if root.operation == "scatter":
        return 2 * inner.operand(root, 2).bytes
    return root.bytes
