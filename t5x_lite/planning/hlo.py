# SPDX-License-Identifier: Apache-2.0
"""The optimized program that a compiler made, read from its text (HLO).

Only what planning needs is kept: of every instruction its arrays, operation, operands and
attributes, by computation.

An operand that is an element of a tuple has an instruction of its own, `%x = s32[]
get-tuple-element(%loop), index=0`, or, since XLA's dumps are compact (those of jaxlib 0.12), is
written where it is used, `%loop#0`. Both are read as the same module.
"""

import contextlib
import math
import re
from collections.abc import Generator
from typing import NamedTuple

from t5x_lite.utils.not_none import not_none

# Bits of an element, by the names of XLA's primitive types.
BITS = {"pred": 8, "token": 0, "opaque": 0}
INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NUMBERED = re.compile(r"(\d+)")
HBM = 0
# Attributes that name a computation which is read; the `to_apply` of a reduction is not.
FOLLOWED = ("calls", "body", "condition", "true_computation", "false_computation")


# What a broken program raises where a whole one is taken for granted.
BROKEN = (ArithmeticError, AssertionError, AttributeError, LookupError)
BROKEN += (RecursionError, TypeError, ValueError)


class HloError(ValueError):
    """A compiler's text is not the program that is expected, or contradicts itself."""


class Array(NamedTuple):
    """One array of a value.

    Attributes:
      element: XLA's name of the element type.
      shape: sizes.
      space: memory space; 0 is HBM, 1 fast memory.
    """

    element: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        return -(-self.size * bits(self.element) // 8)


class Instruction(NamedTuple):
    """One line of a computation, `%name = shape operation(operands), attributes`.

    Attributes:
      name: without the percent sign.
      shape: text of the result's shape.
      arrays: of the result; those of a tuple one by one.
      operation: name of the operation.
      operands: names of the operands.
      arguments: text between the parentheses.
      attributes: text after them.
    """

    name: str
    shape: str
    arrays: tuple[Array, ...]
    operation: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self, role: str) -> str | None:
        """Name of the computation called as `role`: calls, body, condition, to_apply."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def target(self) -> str:
        """Target of a custom call, otherwise empty."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Computation(NamedTuple):
    """One computation: its name, its instructions by name in the order of the schedule, and the
    name of the root, which is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.instructions[instruction.operands[index]]


class Module(NamedTuple):
    """A program: its computations by name, and the name of the entry."""

    computations: dict[str, Computation]
    entry: str

    def called_by(self, instruction: Instruction, role: str) -> Computation:
        """The computation that an instruction calls as `role`; it has to call one."""
        return self.computations[not_none(instruction.called(role))]


def bits(element: str) -> int:
    """Bits of one element: f32, bf16, s4, f8e4m3fn ..."""
    if element in BITS:
        return BITS[element]
    match = NUMBERED.search(element)
    return int(match[1]) if match else 0


def parse_module(text: str) -> Module:
    """Parses the text of `executable.as_text()`.

    A program comes before what uses it: an instruction before its users, a computation before its
    callers. So neither can be used by itself, and whoever follows operands comes to an end.

    Raises:
      HloError: the text has no entry computation, or uses what does not stand before.
    """
    computations, entry, current, root, name = {}, None, None, "", ""
    for line in text.splitlines():
        if current is None:
            head = HEAD.match(line)
            if head and "->" in line:
                name, current, root = head[2], {}, ""
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, current, root)
            current = None
        elif " = " in line:
            with hlo_errors(line):
                parsed = parse_instruction(line)
                add_elements(current, parsed.operands)
                check_references(parsed, current, computations)
            current[parsed.name] = parsed
            root = parsed.name if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise HloError("The compiler's text has no ENTRY computation: it is not an HLO module")
    return Module(computations, entry)


def check_references(
    instruction: Instruction, before: dict[str, Instruction], computations: dict[str, Computation]
) -> None:
    """Checks that an instruction uses only what stands before it.

    Args:
      instruction: the instruction.
      before: instructions of its computation so far.
      computations: computations so far.

    Raises:
      HloError: it does not, or has the name of another one.
    """
    called = filter(None, map(instruction.called, FOLLOWED))
    missing = [name for name in instruction.operands if name not in before]
    missing += [name for name in called if name not in computations]
    if missing:
        raise HloError(f"HLO instruction {instruction.name} uses {missing[0]} before it is defined")
    if instruction.name in before:
        raise HloError(f"HLO instruction {instruction.name} is defined twice")


@contextlib.contextmanager
def hlo_errors(what: str) -> Generator[None]:
    """Turns errors of reading `what`, a line or a program, into an HloError that quotes it."""
    try:
        yield
    except HloError:
        raise
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise HloError(f"HLO that cannot be read: {what.strip()[:200]} ({reason:.200})") from error


def parse_instruction(line: str) -> Instruction:
    """Parses one line of a computation."""
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if "/*" in rest:
        rest = INDEX_COMMENT.sub("", rest)
    cut = closing_parenthesis(rest, 0) if rest[0] == "(" else shape_end(rest)
    shape, rest = rest[:cut], rest[cut:].lstrip()
    operation, _, _ = rest.partition("(")
    end = closing_parenthesis(rest, len(operation))
    arguments = rest[len(operation) + 1 : end - 1]
    operands = tuple(NAME.findall(arguments))
    attributes = rest[end:].lstrip(", ")
    return Instruction(
        name=name.lstrip("%"),
        shape=shape,
        arrays=parse_arrays(shape),
        operation=operation,
        operands=operands,
        arguments=arguments,
        attributes=attributes,
    )


def add_elements(instructions: dict[str, Instruction], operands: tuple[str, ...]) -> None:
    """Adds the get-tuple-element instructions that operands such as `loop#0` stand for; `loop#1#0`
    is the first element of loop's second."""
    for operand in operands:
        name, *indices = operand.split("#")
        for index in indices:
            source, name = instructions[name], f"{name}#{index}"
            shape = tuple_elements(source.shape)[int(index)]
            instructions[name] = Instruction(
                name=name,
                shape=shape,
                arrays=parse_arrays(shape),
                operation="get-tuple-element",
                operands=(source.name,),
                arguments=f"%{source.name}",
                attributes=f"index={index}",
            )


def tuple_elements(shape: str) -> list[str]:
    """Splits a tuple's shape into those of its elements: (f32[2,3]{1,0}, (s32[], u8[])) has two."""
    depth, start, parts = 0, 1, []
    for place, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(shape[start:place].strip())
            start = place + 1
    return parts


def shape_end(text: str) -> int:
    """Length of the shape at the start of a text: a layout has parentheses, but no spaces."""
    end = text.find(" ")
    return len(text) if end < 0 else end


def closing_parenthesis(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at start."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    return len(text)


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """Parses the arrays of a shape such as (f32[2,3]{1,0:S(1)}, s32[])."""
    result = []
    for element, sizes, layout in ARRAY.findall(shape):
        space = SPACE.search(layout)
        lengths = (not_none(NUMBERED.search(size))[1] for size in sizes.split(",") if size)
        result.append(Array(element, tuple(map(int, lengths)), int(space[1]) if space else HBM))
    return tuple(result)
