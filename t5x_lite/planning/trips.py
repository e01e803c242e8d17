# SPDX-License-Identifier: Apache-2.0
"""How often each computation of a compiled program runs: loop bodies by their trip counts.

A compiler's own `cost_analysis` counts the body of a loop once, however often it runs.
"""

import re
from typing import NamedTuple

from t5x_lite.planning.hlo import Computation, Instruction, Module

KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


class Executions(NamedTuple):
    """How often each computation that is run as a sequence runs; and the loops of which nobody
    knows how long they go on, counted once."""

    times: dict[str, int]
    unknown: tuple[str, ...]


def executions(module: Module) -> Executions:
    """From the entry through loops, calls and branches; of a conditional every branch counts."""
    times: dict[str, int] = {}
    unknown: list[str] = []

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            for called, repeats in continued(module, computation, instruction, unknown):
                visit(called, count * repeats)

    visit(module.entry, 1)
    return Executions(times, tuple(dict.fromkeys(unknown)))


def continued(module: Module, computation: Computation, instruction: Instruction, unknown: list):
    """The computations that an instruction runs in sequence, and how often."""
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
    """How often a while loop's body runs; None where it depends on data.

    Read from the compiler's note, or else from the condition: a counter from a constant up to
    another one, in steps of one as every scan has.
    """
    noted = KNOWN.search(loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.called("condition")]
    found = comparison(module, condition)
    if found is None:
        return None
    compare, counter, limit, within = found
    last = constant(within, limit)
    if last is None:
        last = initial(computation, loop, element(within, limit))
    first = initial(computation, loop, element(within, counter))
    if first is None or last is None:
        return None
    return max(0, last - first + bool(re.search(r"direction=[LG]E", compare.attributes)))


def comparison(module: Module, condition: Computation):
    """The comparison that ends a loop, its counter and limit, and where they are; None if the loop
    ends otherwise."""
    root, within = condition.instructions[condition.root], condition
    if root.operation == "fusion":
        inner = module.computations[root.called("calls")]
        root, within = inner.instructions[inner.root], inlined(condition, root, inner)
    forward = re.search(r"direction=(LT|LE|NE)", root.attributes)
    backward = re.search(r"direction=(GT|GE)", root.attributes)
    if root.operation != "compare" or not (forward or backward):
        return None
    counter, limit = (within.instructions[name] for name in root.operands)
    if backward:
        counter, limit = limit, counter
    return root, counter, limit, within


def inlined(outer: Computation, fusion: Instruction, inner: Computation) -> Computation:
    """inner with its parameters replaced by what fusion gives them."""
    known = dict(outer.instructions)
    for name, instruction in inner.instructions.items():
        if instruction.operation == "parameter":
            given = fusion.operands[int(instruction.arguments)]
            known[name] = outer.instructions[given]
        else:
            known[name] = instruction
    return Computation(inner.name, known, inner.root)


def through(computation: Computation, instruction: Instruction) -> Instruction:
    """instruction, or what it only copies."""
    while instruction.operation in TRANSPARENT and instruction.operands:
        instruction = computation.operand(instruction, 0)
    return instruction


def constant(computation: Computation, instruction: Instruction) -> int | None:
    found = through(computation, instruction)
    is_number = found.operation == "constant" and re.fullmatch(r"-?\d+", found.arguments.strip())
    return int(found.arguments) if is_number else None


def element(computation: Computation, instruction: Instruction) -> int | None:
    """Which element of the loop's tuple an instruction reads."""
    found = through(computation, instruction)
    index = re.search(r"\bindex=(\d+)", found.attributes)
    return int(index[1]) if found.operation == "get-tuple-element" and index else None


def initial(computation: Computation, loop: Instruction, index: int | None) -> int | None:
    """What an element of a loop's tuple is before the first turn, if that is a constant."""
    if index is None:
        return None
    tuple_ = through(computation, computation.operand(loop, 0))
    if tuple_.operation != "tuple":
        return None
    return constant(computation, computation.operand(tuple_, index))
