# SPDX-License-Identifier: Apache-2.0
"""Context-free grammars whose rules nest a few times, as automata over bytes.

A rule that is within itself at its beginning or its end alone is regular (Chomsky, 1959) and is
followed without a limit: lists, sums and the like. Only what stands between two parts of itself,
such as a value in brackets, nests up to a depth.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from t5x_lite.decoding.steering.byte_automaton import ByteAutomaton
from t5x_lite.decoding.steering.expressions import (
    AllOf,
    Chain,
    Characters,
    Expression,
    Literal,
    OneOf,
    Repeat,
    RuleReference,
)
from t5x_lite.decoding.steering.machine import MOST_REPEATED, Machine, run_machine


class Grammar(NamedTuple):
    """Rules of a context-free language.

    Attributes:
      rules: expression of each rule, which may refer to rules.
      start: name of the rule that a whole text follows.
    """

    rules: Mapping[str, Expression]
    start: str


class RuleFrame(NamedTuple):
    """One expansion of a rule in a machine.

    Attributes:
      rule: its name.
      start: state where its texts begin.
      end: state where they end.
      before: state that leads to `start`.
      after: state that `end` leads to.
    """

    rule: str
    start: int
    end: int
    before: int
    after: int


def compile_grammar(grammar: Grammar, nesting: int, name: str) -> ByteAutomaton:
    """Returns the automaton of a grammar.

    Args:
      grammar: the grammar.
      nesting: most expansions of a rule within each other, the outermost included.
      name: what it is called in messages.

    Raises:
      ValueError: it needs too many states.
    """
    try:
        return GrammarCompiler(grammar, nesting, name).rule_automaton(grammar.start, Counter())
    except RecursionError:
        raise ValueError(f"{name} nests too deeply: make it smaller") from None


class GrammarCompiler:
    """Compiler of a grammar, a rule at a time.

    Attributes:
      rules: expression of each rule.
      nesting: most expansions of a rule within each other.
      name: what the grammar is called in messages.
      reached: rules that each rule leads to.
      first: rules that the texts of each rule may begin with.
      last: rules that they may end with.
      automata: automaton of each rule, by the expansions around it that still count.
    """

    def __init__(self, grammar: Grammar, nesting: int, name: str):
        self.rules, self.nesting, self.name = grammar.rules, nesting, name
        self.reached, self.first, self.last = (
            find_reached({rule: {*side(body)} for rule, body in grammar.rules.items()})
            for side in (list_references, list_first, list_last)
        )
        self.automata: dict[tuple, ByteAutomaton] = {}

    def rule_automaton(self, rule: str, active: Counter[str]) -> ByteAutomaton:
        """Returns the automaton of a rule, once for all expansions around it that lead to it.

        Args:
          rule: name of the rule.
          active: number of expansions of each rule around it.
        """
        mutual = (each for each in active if active[each] and each in self.reached[rule])
        key = rule, tuple(sorted((each, active[each]) for each in mutual))
        if key not in self.automata:
            machine = GrammarMachine(self, active)
            self.automata[key] = run_machine(machine, RuleReference(rule), self.name)
        return self.automata[key]


class GrammarMachine(Machine):
    """Machine of one rule.

    Attributes:
      compiler: compiler of the grammar.
      active: number of expansions of each rule that are being connected.
      by_start: frames by their `start`.
      by_end: frames by their `end`.
    """

    def __init__(self, compiler: GrammarCompiler, active: Counter[str]):
        super().__init__()
        self.compiler, self.active = compiler, active.copy()
        self.by_start: dict[int, RuleFrame] = {}
        self.by_end: dict[int, RuleFrame] = {}

    def connect(self, expression: Expression, start: int, end: int) -> None:
        """Leads from one state to another by the texts of an expression.

        Args:
          expression: the expression.
          start: the one state.
          end: the other one.

        Raises:
          ValueError: it needs too many states.
        """
        if len(self.moves) > MOST_REPEATED:
            raise ValueError(
                f"{self.compiler.name} expands to more than {MOST_REPEATED:,} states: make it "
                "smaller, or lower Decode.nesting"
            )
        if isinstance(expression, RuleReference):
            self.connect_rule(expression.name, start, end)
        else:
            super().connect(expression, start, end)

    def connect_rule(self, rule: str, start: int, end: int) -> None:
        """Leads from one state to another by the texts of a rule.

        Where it stands at the end of an expansion of itself, its texts go on from the start of
        that one; where it stands at the beginning, they are what has been written since.

        Args:
          rule: name of the rule.
          start: the one state.
          end: the other one.
        """
        compiler = self.compiler
        if outer := self.find_end(rule, end):
            self.jumps[start].append(outer.start)
        elif outer := self.find_start(rule, start):
            self.jumps[outer.end].append(end)
        elif self.active[rule] == compiler.nesting:
            return
        elif self.by_start and start not in self.by_start and end not in self.by_end:
            self.connect_automaton(compiler.rule_automaton(rule, self.active), start, end)
        else:
            frame = RuleFrame(rule, self.add_state(), self.add_state(), start, end)
            self.jumps[start].append(frame.start)
            self.jumps[frame.end].append(end)
            self.by_start[frame.start] = self.by_end[frame.end] = frame
            self.active[rule] += 1
            self.connect(compiler.rules[rule], frame.start, frame.end)
            self.active[rule] -= 1

    def find_end(self, rule: str, end: int) -> RuleFrame | None:
        """Returns the expansion of a rule at whose end a state is; None if there is none.

        Not beyond a rule that may begin with itself, whose texts end where the inner ones do.
        """
        while frame := self.by_end.get(end):
            if frame.rule == rule:
                return frame
            if frame.rule in self.compiler.first[frame.rule]:
                return None
            end = frame.after
        return None

    def find_start(self, rule: str, start: int) -> RuleFrame | None:
        """Returns the expansion of a rule at whose beginning a state is; None if there is none.

        Not beyond a rule that may end with itself, whose texts begin where the inner ones do.
        """
        while frame := self.by_start.get(start):
            if frame.rule == rule:
                return frame
            if frame.rule in self.compiler.last[frame.rule]:
                return None
            start = frame.before
        return None


def list_references(expression: Expression) -> list[str]:
    """Names of the rules that an expression refers to."""
    if isinstance(expression, RuleReference):
        return [expression.name]
    if isinstance(expression, Repeat):
        parts: Iterable[Expression] = (expression.part, expression.between)
    else:
        parts = () if isinstance(expression, Literal | Characters | AllOf) else expression.parts
    return [name for part in parts for name in list_references(part)]


def list_first(expression: Expression) -> list[str]:
    """Names of the rules that an expression begins with."""
    return list_side(expression, 0)


def list_last(expression: Expression) -> list[str]:
    """Names of the rules that an expression ends with."""
    return list_side(expression, -1)


def list_side(expression: Expression, side: int) -> list[str]:
    """Names of the rules at the beginning (0) or the end (-1) of an expression."""
    if isinstance(expression, RuleReference):
        return [expression.name]
    if isinstance(expression, Chain):
        return list_side(expression.parts[side], side) if expression.parts else []
    if isinstance(expression, OneOf):
        return [name for part in expression.parts for name in list_side(part, side)]
    if isinstance(expression, Repeat) and expression.most == 1:
        return list_side(expression.part, side)
    return []


def find_reached(leads: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns the rules that each rule leads to, by way of others too."""
    reached = {}
    for rule in leads:
        known: set[str] = set()
        stack = [*leads[rule]]
        while stack:
            each = stack.pop()
            if each not in known:
                known.add(each)
                stack += leads[each]
        reached[rule] = known
    return reached
