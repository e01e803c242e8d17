# SPDX-License-Identifier: Apache-2.0
"""Executions of each computation of a compiled program: loop bodies by their trip counts.

A compiler's own `cost_analysis` counts the body of a loop once, however often it runs.
"""

import re
from typing import NamedTuple

from t5x_lite.planning.hlo import Computation, Instruction, Module, hlo_errors

KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


class Executions(NamedTuple):
    """Executions of the computations that run as a sequence, by name; and the names of loops of
    unknown length, counted once."""

    times: dict[str, int]
    unknown: tuple[str, ...]


def executions(module: Module) -> Executions:
    """Counts from the entry through loops, calls and branches; every branch of a conditional
    counts.

    Raises:
      HloError: a loop or a branch is not as its operation requires.
    """
    times: dict[str, int] = {}
    unknown: list[str] = []

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            for called, repeats in called_computations(module, computation, instruction, unknown):
                visit(called, count * repeats)

    with hlo_errors(f"the loops of {module.entry}"):
        visit(module.entry, 1)
    return Executions(times, tuple(dict.fromkeys(unknown)))


def called_computations(
    module: Module, computation: Computation, instruction: Instruction, unknown: list
):
    """Computations that an instruction runs in sequence, and the number of executions of each.

    Args:
      module: the program.
      computation: where the instruction stands.
      instruction: of any operation.
      unknown: receives the name of a loop of unknown length.
    """
    if instruction.operation == "while":
        count = trip_count(module, computation, instruction)
        if count is None:
            unknown.append(instruction.name)
        return [(instruction.called("body"), 1 if count is None else count)]
    if instruction.operation == "call":
        return [(instruction.called("to_apply"), 1)]
    if instruction.operation == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if listed:
            return [(name.strip().lstrip("%"), 1) for name in listed[1].split(",")]
        return [(instruction.called(f"{side}_computation"), 1) for side in ("true", "false")]
    return []


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Executions of a while loop's body; None where it depends on data.

    Read from the compiler's note, or else from the condition: a counter from a constant up to
    another one, in steps of one as every scan has.

    Args:
      module: the program.
      computation: where the loop stands.
      loop: its instruction.
    """
    noted = KNOWN.search(loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.called_by(loop, "condition")
    ending = loop_comparison(module, condition)
    if ending is None:
        return None
    compare, counter, limit, within = ending
    last = constant_value(within, limit)
    if last is None:
        last = initial_value(computation, loop, tuple_index(within, limit))
    first = initial_value(computation, loop, tuple_index(within, counter))
    if first is None or last is None:
        return None
    return max(0, last - first + bool(re.search(r"direction=[LG]E", compare.attributes)))


def loop_comparison(module: Module, condition: Computation):
    """Comparison that ends a loop, its counter and limit, and their computation; None if the loop
    ends otherwise."""
    root, within = condition.instructions[condition.root], condition
    if root.operation == "fusion":
        inner = module.called_by(root, "calls")
        root, within = inner.instructions[inner.root], inline_fusion(condition, root, inner)
    forward = re.search(r"direction=(LT|LE|NE)", root.attributes)
    backward = re.search(r"direction=(GT|GE)", root.attributes)
    if root.operation != "compare" or not (forward or backward):
        return None
    counter, limit = (within.instructions[name] for name in root.operands)
    if backward:
        counter, limit = limit, counter
    return root, counter, limit, within


def inline_fusion(outer: Computation, fusion: Instruction, inner: Computation) -> Computation:
    """Fused computation with its parameters replaced by the fusion's operands.

    Args:
      outer: where the fusion stands.
      fusion: its instruction.
      inner: the computation that it calls.
    """
    known = dict(outer.instructions)
    for name, instruction in inner.instructions.items():
        if instruction.operation == "parameter":
            operand = fusion.operands[int(instruction.arguments)]
            known[name] = outer.instructions[operand]
        else:
            known[name] = instruction
    return Computation(inner.name, known, inner.root)


def skip_copies(computation: Computation, instruction: Instruction) -> Instruction:
    """The instruction, or the one whose value it only copies."""
    # A fusion put in its place may have names of the computation around it, and so a circle.
    for _ in computation.instructions:
        if instruction.operation not in TRANSPARENT or not instruction.operands:
            break
        instruction = computation.operand(instruction, 0)
    return instruction


def constant_value(computation: Computation, instruction: Instruction) -> int | None:
    """Value of an integer constant; None for anything else."""
    source = skip_copies(computation, instruction)
    is_number = source.operation == "constant" and re.fullmatch(r"-?\d+", source.arguments.strip())
    return int(source.arguments) if is_number else None


def tuple_index(computation: Computation, instruction: Instruction) -> int | None:
    """Index of the element of the loop's tuple that an instruction reads; None for any other."""
    source = skip_copies(computation, instruction)
    index = re.search(r"\bindex=(\d+)", source.attributes)
    return int(index[1]) if source.operation == "get-tuple-element" and index else None


def initial_value(computation: Computation, loop: Instruction, index: int | None) -> int | None:
    """Constant value of an element of a loop's tuple before the first iteration, else None.

    Args:
      computation: where the loop stands.
      loop: its instruction.
      index: of the element.
    """
    if index is None:
        return None
    tuple_ = skip_copies(computation, computation.operand(loop, 0))
    if tuple_.operation != "tuple":
        return None
    return constant_value(computation, computation.operand(tuple_, index))
