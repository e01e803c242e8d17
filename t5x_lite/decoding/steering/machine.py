# SPDX-License-Identifier: Apache-2.0
"""Automata over bytes of regular expressions."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from t5x_lite.decoding.steering.byte_automaton import (
    END,
    ByteAutomaton,
    intersect,
    minimize,
)
from t5x_lite.decoding.steering.expressions import (
    AllOf,
    Chain,
    Characters,
    Expression,
    Literal,
    OneOf,
    Ranges,
    Repeat,
    RuleReference,
)

MOST_STATES = 100_000
MOST_REPEATED = 2 * MOST_STATES  # before an automaton is deterministic
SURROGATES = 0xD800, 0xDFFF
# Last code point that UTF-8 writes in 1, 2, 3 and 4 bytes.
LAST_OF_LENGTH = 0x7F, 0x7FF, 0xFFFF, 0x10FFFF


def count_states(expression: Expression, known: dict[int, int] | None = None) -> int:
    """Number of states that an expression takes before it is made deterministic.

    Args:
      expression: the expression.
      known: numbers of parts by their identity, which occur several times as a rule.
    """
    known = {} if known is None else known
    if id(expression) not in known:
        known[id(expression)] = sum_states(expression, known)
    return known[id(expression)]


def sum_states(expression: Expression, known: dict[int, int]) -> int:
    """Returns `count_states` of an expression whose parts may be known."""
    if isinstance(expression, Literal):
        return len(expression.text)
    if isinstance(expression, Characters):
        return len(characters_automaton(expression.ranges).following)
    if isinstance(expression, RuleReference):
        return 1
    if isinstance(expression, Repeat):
        once = count_states(expression.part, known) + count_states(expression.between, known)
        return once * max(expression.least, expression.most or 1)
    return sum(count_states(part, known) for part in expression.parts)


def compile_expression(expression: Expression, name: str) -> ByteAutomaton:
    """Returns the automaton of an expression.

    Args:
      expression: the expression.
      name: what it is called in messages.

    Raises:
      ValueError: it needs too many states.
    """
    return run_machine(Machine(), expression, name)


def run_machine(machine: "Machine", expression: Expression, name: str) -> ByteAutomaton:
    """Returns the automaton that a machine makes of an expression.

    Args:
      machine: an empty machine.
      expression: the expression.
      name: what it is called in messages.

    Raises:
      ValueError: it needs too many states.
    """
    size = count_states(expression)
    if size > MOST_REPEATED:
        raise ValueError(f"{name} repeats parts to {size:,} states: make it smaller")
    start, end = machine.add_state(), machine.add_state()
    machine.connect(expression, start, end)
    return minimize(determinize(machine, start, end, name))


class Machine:
    """Automaton over bytes that is in several states at once (Thompson, 1968,
    doi 10.1145/363347.363387).

    Attributes:
      moves: (first byte, last byte, state after them) of each state.
      jumps: states that each state is in at the same time.
    """

    def __init__(self):
        self.moves: list[list[tuple[int, int, int]]] = []
        self.jumps: list[list[int]] = []
        self.closures: dict[int, frozenset[int]] = {}

    def add_state(self) -> int:
        """Returns a new state."""
        self.moves.append([])
        self.jumps.append([])
        return len(self.moves) - 1

    def connect(self, expression: Expression, start: int, end: int) -> None:
        """Leads from one state to another by the texts of an expression.

        Nothing that is added leads into `start` or out of `end`.

        Args:
          expression: the expression.
          start: the one state.
          end: the other one.
        """
        if isinstance(expression, Literal):
            for byte in expression.text[:-1]:
                after = self.add_state()
                self.moves[start].append((byte, byte, after))
                start = after
            if expression.text:
                self.moves[start].append((expression.text[-1], expression.text[-1], end))
            else:
                self.jumps[start].append(end)
        elif isinstance(expression, Characters) and expression.ranges:
            self.connect_automaton(characters_automaton(expression.ranges), start, end)
        elif isinstance(expression, Chain):
            for part in expression.parts[:-1]:
                after = self.add_state()
                self.connect(part, start, after)
                start = after
            self.connect(expression.parts[-1] if expression.parts else Literal(b""), start, end)
        elif isinstance(expression, OneOf):
            for part in expression.parts:
                self.connect(part, start, end)
        elif isinstance(expression, Repeat):
            self.connect_repeat(expression, start, end)
        elif isinstance(expression, AllOf):
            self.connect_automaton(intersect_expressions(expression), start, end)

    def connect_automaton(self, automaton: ByteAutomaton, start: int, end: int) -> None:
        """Leads from one state to another by the texts of an automaton.

        Args:
          automaton: the automaton.
          start: the one state.
          end: the other one.
        """
        first = len(self.moves)
        self.moves += [[] for _ in automaton.following]
        self.jumps += [[end] if final else [] for final in automaton.final.tolist()]
        self.jumps[start].append(first + automaton.start)
        for state, lowest, highest, after in byte_ranges(automaton).tolist():
            self.moves[first + state].append((lowest, highest, first + after))

    def connect_repeat(self, repeat: Repeat, start: int, end: int) -> None:
        """Leads from one state to another by the texts of a Repeat.

        Args:
          repeat: the Repeat.
          start: the one state.
          end: the other one.
        """
        if repeat.most == 0:
            self.jumps[start].append(end)
            return
        if not repeat.least:
            self.jumps[start].append(end)
        if repeat.most == 1:
            self.connect(repeat.part, start, end)
            return
        before = self.add_state()
        self.jumps[start].append(before)
        for count in range(1, max(repeat.least, repeat.most or 1) + 1):
            after = self.add_state()
            self.connect(repeat.part, before, after)
            if count >= repeat.least:
                self.jumps[after].append(end)
            last = count == repeat.most or (repeat.most is None and count >= repeat.least)
            if last and repeat.most is None:
                self.connect(repeat.between, after, before)
            elif not last:
                before = self.add_state()
                self.connect(repeat.between, after, before)

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """Returns the states with moves that the machine is in with these, and END states."""
        return frozenset().union(*map(self.closure_of, states))

    def closure_of(self, state: int) -> frozenset[int]:
        """Returns `closure` of one state."""
        if state not in self.closures:
            reached, stack = {state}, [state]
            while stack:
                for each in self.jumps[stack.pop()]:
                    if each not in reached:
                        reached.add(each)
                        stack.append(each)
            self.closures[state] = frozenset(
                each for each in reached if self.moves[each] or not self.jumps[each]
            )
        return self.closures[state]


def determinize(machine: Machine, start: int, end: int, name: str) -> ByteAutomaton:
    """Returns the automaton whose states are sets of a machine's (Rabin and Scott, 1959).

    Args:
      machine: the machine.
      start: its first state.
      end: its state in which a text may end.
      name: what it is called in messages.

    Raises:
      ValueError: it needs too many states.
    """
    first = machine.closure([start])
    numbers, queue = {first: 0}, [first]
    # State, first and last byte, state after it: of each byte alone they would take a gigabyte.
    edges: list[tuple[int, int, int, int]] = []
    for number, states in enumerate(queue):
        moves = [move for state in states for move in machine.moves[state]]
        for lowest, highest, targets in split_moves(moves):
            after = machine.closure(targets)
            if after not in numbers:
                numbers[after] = len(queue)
                queue.append(after)
                if len(queue) > MOST_STATES:
                    raise ValueError(
                        f"{name} needs more than {MOST_STATES:,} states: make it smaller"
                    )
            edges.append((number, lowest, highest, numbers[after]))
    following = np.full((len(queue), END), -1, np.int32)
    for number, lowest, highest, after in edges:
        following[number, lowest : highest + 1] = after
    return ByteAutomaton(following, np.array([end in states for states in queue]), 0)


def byte_ranges(automaton: ByteAutomaton) -> np.ndarray:
    """Returns the transitions [n 4] of an automaton: state, first and last byte, state after it."""
    following = np.pad(automaton.following, ((0, 0), (1, 1)), constant_values=-2)
    changes = following[:, 1:] != following[:, :-1]
    state, begin = np.nonzero(changes)  # a row of s bytes has at least the changes at both ends
    same = state[1:] == state[:-1]
    state, lowest, beyond = state[:-1][same], begin[:-1][same], begin[1:][same]
    after = automaton.following[state, lowest]
    return np.stack([state, lowest, beyond - 1, after], axis=1)[after >= 0]


def split_moves(
    moves: Sequence[tuple[int, int, int]],
) -> Iterator[tuple[int, int, frozenset[int]]]:
    """Yields ranges of bytes with the same states after them."""
    if len(moves) == 1:
        yield moves[0][0], moves[0][1], frozenset(moves[0][2:])
        return
    points = sorted({lowest for lowest, _, _ in moves} | {highest + 1 for _, highest, _ in moves})
    for lowest, beyond in itertools.pairwise(points):
        targets = frozenset(to for first, last, to in moves if first <= lowest <= last)
        if targets:
            yield lowest, beyond - 1, targets


@functools.lru_cache(maxsize=256)
def characters_automaton(ranges: Ranges) -> ByteAutomaton:
    """Returns the automaton of one character of some ranges, in UTF-8."""
    machine = Machine()
    start, end = machine.add_state(), machine.add_state()
    for first, last in ranges:
        for sequence in utf8_sequences(first, last):
            here = start
            for place, (lowest, highest) in enumerate(sequence):
                after = end if place == len(sequence) - 1 else machine.add_state()
                machine.moves[here].append((lowest, highest, after))
                here = after
    return minimize(determinize(machine, start, end, "a set of characters"))


@functools.lru_cache(maxsize=256)
def intersect_expressions(expression: AllOf) -> ByteAutomaton:
    """Returns the automaton of the texts of all parts of an expression.

    Raises:
      ValueError: it needs too many states.
    """
    name = "what several rules of one text have in common"
    parts = [compile_expression(part, name) for part in expression.parts]
    return functools.reduce(functools.partial(intersect, most=MOST_STATES, name=name), parts)


def utf8_sequences(first: int, last: int) -> Iterator[list[tuple[int, int]]]:
    """Yields sequences of byte ranges that together write a range of code points.

    Args:
      first: first code point.
      last: last one.
    """
    if first > last:
        return
    if first <= SURROGATES[1] and last >= SURROGATES[0]:
        yield from utf8_sequences(first, SURROGATES[0] - 1)
        yield from utf8_sequences(SURROGATES[1] + 1, last)
        return
    for limit in LAST_OF_LENGTH[:3]:
        if first <= limit < last:
            yield from utf8_sequences(first, limit)
            yield from utf8_sequences(limit + 1, last)
            return
    # Ranges whose bytes after the first differ must fill these: cut what does not.
    for bits in (6, 12, 18):
        mask = (1 << bits) - 1
        if first & ~mask != last & ~mask:
            if first & mask:
                yield from utf8_sequences(first, first | mask)
                yield from utf8_sequences((first | mask) + 1, last)
                return
            if last & mask != mask:
                yield from utf8_sequences(first, (last & ~mask) - 1)
                yield from utf8_sequences(last & ~mask, last)
                return
    lowest, highest = chr(first).encode(), chr(last).encode()
    yield [*zip(lowest, highest, strict=True)]
