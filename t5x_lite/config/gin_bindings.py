# SPDX-License-Identifier: Apache-2.0
"""Bindings of .gin text: what a run reads of them, and where the value of a field comes from.

gin accepts a binding that nothing reads: a macro in another spelling, a scope that no reference
enters, a field of a dataclass that the run does not hold. Here the text is followed from
`config.Run` as gin follows it, without making anything.
"""

import collections
import re
import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.config import decoding, gin_check
from t5x_lite.config.checked import WRITE, field_types
from t5x_lite.utils.nearest import suggest

# Macros of T5X's gin files that are fields here.
FIELDS_OF_T5X = {
    "CHECKPOINT_PERIOD": "config.Checkpoint.every",
    "DROPOUT_RATE": "config.Model.dropout",
    "EVAL_PERIOD": "config.Evaluate.every",
    "EVAL_STEPS": "config.Evaluate.batches",
    "EVAL_BATCH_SIZE": "config.Evaluate.batch_size",
    "JAX_RANDOM_SEED": "config.Run.seed",
    "LABEL_SMOOTHING": "config.Train.label_smoothing",
    "LEARNING_RATE": "config.Schedule.peak",
    "RANDOM_SEED": "config.Run.seed",
    "SAVE_PERIOD": "config.Checkpoint.every",
    "WARMUP_STEPS": "config.Schedule.warmup",
    "Z_LOSS": "config.Train.z_loss",
}
# Most places that a message lists.
MOST_PLACES = 5


class Binding(NamedTuple):
    """A statement that binds a field or a macro.

    Attributes:
      scope: "a/b" of a/b/config.Train.steps, "" without one.
      owner: the class; "" for a macro.
      name: the field, or the macro with its scope: "a/NAME".
      value: as gin's parser reads it, with `gin_check.Macro` and `gin_check.Reference`.
      row: its line in the text, from 1.
    """

    scope: str
    owner: str
    name: str
    value: Any
    row: int

    def __str__(self) -> str:
        dotted = f"config.{self.owner}.{self.name}" if self.owner else self.name
        return f"{self.scope}/{dotted}" if self.owner and self.scope else dotted


def read_bindings(statements: Iterable[Any]) -> list[Binding]:
    """Bindings among the statements of gin's parser."""
    bindings = []
    for statement in statements:
        if not hasattr(statement, "arg_name"):
            continue
        scope, selector, field = statement.scope, statement.selector, statement.arg_name
        owner = selector.removeprefix("config.") if field else ""
        name = field or "/".join(filter(None, (scope, selector)))
        bindings.append(Binding(scope, owner, name, statement.value, statement.location.line_num))
    return bindings


def is_within(outer: str, inner: str) -> bool:
    """True if gin applies bindings of scope `outer` in scope `inner`."""
    return not outer or inner == outer or inner.startswith(f"{outer}/")


class Walk:
    """The bindings that `config.Run` reads.

    Attributes:
      bindings: all of them, in order.
      overridden: follows values that another binding replaces, too.
      read: rows of the bindings that are read.
      visited: scopes in which each class is made.
      macros: names of the macros that are referred to.
    """

    def __init__(self, bindings: list[Binding], overridden: bool):
        self.bindings, self.overridden = bindings, overridden
        self.read: set[int] = set()
        self.visited: dict[str, set[str]] = collections.defaultdict(set)
        self.macros: set[str] = set()
        self.visit("Run", "")

    def visit(self, owner: str, scope: str) -> None:
        """Reads the fields of a class that is made in a scope."""
        if scope in self.visited[owner]:
            return
        self.visited[owner].add(scope)
        fields = collections.defaultdict(list)
        for each in self.bindings:
            if each.owner == owner and is_within(each.scope, scope):
                fields[each.name].append(each)
        for bound in fields.values():
            self.follow_bindings(bound, scope)

    def follow_bindings(self, bound: list[Binding], scope: str) -> None:
        """Reads all bindings of a field or a macro, and follows the value that it has."""
        self.read |= {each.row for each in bound}
        # As in gin: the longest scope wins, and of those the last.
        last = max(reversed(bound), key=lambda each: len(each.scope))
        for each in bound if self.overridden else [last]:
            self.follow_value(each.value, scope)

    def follow_value(self, value: Any, scope: str) -> None:
        """Reads what a value refers to."""
        match value:
            case gin_check.Macro(name):
                if name not in self.macros:
                    self.macros.add(name)
                    bound = [e for e in self.bindings if not e.owner and is_within(e.name, name)]
                    if bound:
                        self.follow_bindings(bound, name)
            case gin_check.Reference(name):
                inner, _, selector = name.rpartition("/")
                self.visit(selector.removeprefix("config."), inner or scope)
            case dict():
                for pair in value.items():
                    self.follow_value(pair, scope)
            case list() | tuple():
                for each in value:
                    self.follow_value(each, scope)


def unread_binding(
    bindings: list[Binding], rows: set[int], overridden: bool
) -> tuple[int, str] | None:
    """Row and description of the first binding in `rows` that the run does not read, if any.

    Args:
      bindings: all bindings of a config.
      rows: those in question.
      overridden: a binding that only a replaced value leads to is read too.
    """
    walk = Walk(bindings, overridden)
    for each in bindings:
        if each.row in rows and each.row not in walk.read:
            return each.row, f"{each} changes nothing: {explain_unread(each, walk)}"
    return None


def explain_unread(binding: Binding, walk: Walk) -> str:
    """The reason why a binding is not read, and the name that may have been meant."""
    if not binding.owner:
        if field := FIELDS_OF_T5X.get(binding.name):
            return f"bind {field}"
        near = suggest(binding.name, sorted(walk.macros))
        return f"nothing in the config reads %{binding.name}: {near}"
    if binding.owner not in walk.visited:
        return (
            f"the run takes no config.{binding.owner} from the config. Bind the field of its owner "
            f"to @config.{binding.owner}(), as configs/runs/common.gin does"
        )
    scopes = sorted(filter(None, walk.visited[binding.owner]))
    known = suggest(binding.scope, scopes) if scopes else "bind it without a scope"
    return f"the config has no @{binding.scope}/config.{binding.owner}(): {known}"


def rows_of(bindings: list[Binding], message: str) -> list[int]:
    """Rows of the bindings that gave the fields named in a message ("Train.steps") their values.

    A macro's row stands for the field that it is the value of.
    """
    rows = []
    for owner, name in dict.fromkeys(re.findall(r"\b([A-Z]\w+)\.(\w+)", message)):
        if hasattr(config, owner) and name in field_types(getattr(config, owner)):
            fields = [each for each in bindings if (each.owner, each.name) == (owner, name)]
            last = {each.scope: each for each in fields}
            rows += [row for each in last.values() for row in value_rows(bindings, each)]
    return list(dict.fromkeys(rows))


def rows_that_name(bindings: list[Binding], macro: str) -> list[int]:
    """Rows of the bindings whose value has the macro (%NAME) in it."""

    def names(value: Any) -> bool:
        match value:
            case gin_check.Macro(name):
                return name == macro
            case dict():
                return any(names(each) for pair in value.items() for each in pair)
            case list() | tuple():
                return any(map(names, value))
        return False

    return [each.row for each in bindings if names(each.value)]


def value_rows(bindings: list[Binding], binding: Binding) -> list[int]:
    """Row of the binding that holds the value: its own, or that of the macro that it names."""
    for _ in bindings:
        if not isinstance(binding.value, gin_check.Macro):
            break
        name = binding.value.name
        bound = [each for each in bindings if not each.owner and is_within(each.name, name)]
        if not bound:
            break
        binding = bound[-1]
    return [binding.row]


def drop_idle_filters(saved: str) -> list[str]:
    """Bindings on top of a saved config that take out the filters of a greedy config.Decode.

    They never had an effect, and are refused since.

    Args:
      saved: the text of a resolved config.
    """
    greedy = re.findall(r"^(.*config\.Decode)\.temperature = 0(?:\.0)?$", saved, re.MULTILINE)
    unused = {name: getattr(config.Decode, name) for name in decoding.FILTERS}
    return [f"{owner}.{name} = {value}" for owner in greedy for name, value in unused.items()]


def blame(message: str, places: list[str]) -> str:
    """A message about a value, with where it was bound: on the command line, else in files.

    Args:
      message: of a dataclass: "Train.steps must be ...".
      places: origins of the fields that it names.
    """
    flags = [place for place in places if place.startswith("--gin.")]
    shown = ", ".join(list(dict.fromkeys(flags or places))[:MOST_PLACES])
    message, wrong, remedy = message.partition(WRITE)
    if flags:
        name, _, value = flags[0].partition("=")
        if re.search(r"must be a string( or None)?; got [-+\d.]", message):
            wrong, remedy = WRITE, f'"{value}"'  # a number that is meant as text
        remedy = remedy and f"{name}={shlex.quote(remedy)}"
    return f"{message} ({shown}{wrong}{remedy})" if shown else f"{message}{wrong}{remedy}"


def quote_value(binding: str) -> str:
    """Writes NAME=VALUE as a line of gin; VALUE is a string unless it is a complete literal, a
    %MACRO or a @config.Class().

    Raises:
      ValueError: VALUE is missing, or NAME is not a name.
    """
    name, equals, value = binding.partition("=")
    name, value = name.strip(), value.strip()
    if not equals:
        raise ValueError(f"--gin.{binding} needs a value: --gin.{name}=VALUE")
    if not re.fullmatch(r"(\w+/)*(\w+\.)*\w+", name):
        raise ValueError(
            f"--gin.{binding}: {name!r} is not a name: write --gin.MACRO=VALUE or "
            "--gin.config.Train.steps=VALUE"
        )
    return f"{name} = {value if gin_check.is_value(value) else repr(value)}"
