# SPDX-License-Identifier: Apache-2.0
"""The optimized program that a compiler made, read from its text (HLO).

Only what planning asks for is kept: of every instruction its arrays, operation, operands and
attributes, by computation.

An operand that is an element of a tuple has an instruction of its own, `%x = s32[]
get-tuple-element(%loop), index=0`, or, since XLA's dumps are compact (those of jaxlib 0.12), is
written where it is used, `%loop#0`. Both are read as the same module.
"""

import math
import re
from typing import NamedTuple

# Bits of an element, by the names of XLA's primitive types.
BITS = {"pred": 8, "token": 0, "opaque": 0}
INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NUMBERED = re.compile(r"(\d+)")
HBM = 0


class Array(NamedTuple):
    """One array of a value: element type, sizes, and memory space (0 is HBM, 1 fast memory)."""

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
    """`%name = shape operation(operands), attributes`; a tuple's arrays stand one by one."""

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
        """The computation that this one calls as `role`: calls, body, condition, to_apply."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def target(self) -> str:
        """A custom call's name, otherwise empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in the order of the schedule, and which of them is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.instructions[instruction.operands[index]]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def bits(element: str) -> int:
    """Bits of one element: f32, bf16, s4, f8e4m3fn ..."""
    if element in BITS:
        return BITS[element]
    found = NUMBERED.search(element)
    return int(found[1]) if found else 0


def parse(text: str) -> Module:
    """The module that `executable.as_text()` describes.

    Raises:
      ValueError: the text has no entry computation.
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
            found = instruction(line)
            add_elements(current, found.operands)
            current[found.name] = found
            root = found.name if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise ValueError("The compiler's text has no ENTRY computation: it is no HLO module")
    return Module(computations, entry)


def instruction(line: str) -> Instruction:
    """One line of a computation."""
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if "/*" in rest:
        rest = INDEX_COMMENT.sub("", rest)
    cut = closing(rest, 0) if rest[0] == "(" else shape_end(rest)
    shape, rest = rest[:cut], rest[cut:].lstrip()
    operation, _, _ = rest.partition("(")
    end = closing(rest, len(operation))
    arguments = rest[len(operation) + 1 : end - 1]
    operands = tuple(NAME.findall(arguments))
    attributes = rest[end:].lstrip(", ")
    return Instruction(
        name.lstrip("%"), shape, arrays(shape), operation, operands, arguments, attributes
    )


def add_elements(instructions: dict[str, Instruction], operands: tuple[str, ...]) -> None:
    """Adds the get-tuple-element instructions that operands such as `loop#0` stand for; `loop#1#0`
    is the first element of loop's second."""
    for operand in operands:
        name, *indices = operand.split("#")
        for index in indices:
            source, name = instructions[name], f"{name}#{index}"
            shape = elements(source.shape)[int(index)]
            instructions[name] = Instruction(
                name=name,
                shape=shape,
                arrays=arrays(shape),
                operation="get-tuple-element",
                operands=(source.name,),
                arguments=f"%{source.name}",
                attributes=f"index={index}",
            )


def elements(shape: str) -> list[str]:
    """Splits a tuple's shape into those of its elements: (f32[2,3]{1,0}, (s32[], u8[])) has two."""
    depth, start, parts = 0, 1, []
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:place].strip())
            start = place + 1
    return parts


def shape_end(text: str) -> int:
    """Where the shape that text begins with ends: a layout has no blanks, but parentheses."""
    end = text.find(" ")
    return len(text) if end < 0 else end


def closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at start."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape such as (f32[2,3]{1,0:S(1)}, s32[])."""
    found = []
    for element, sizes, layout in ARRAY.findall(shape):
        space = SPACE.search(layout)
        shape = tuple(int(NUMBERED.search(size)[1]) for size in sizes.split(",") if size)
        found.append(Array(element, shape, int(space[1]) if space else HBM))
    return tuple(found)
