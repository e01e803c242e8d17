# SPDX-License-Identifier: Apache-2.0
"""Names of companions and of rules that combine their logits with the model's."""

from typing import Any, NamedTuple

from t5x_lite.config.checked import Range, require
from t5x_lite.utils import hub_names
from t5x_lite.utils.nearest import suggest

# Sources of the second logits, with the form of each.
COMPANIONS = {
    "model": "model:PATH",
    "prompt": "prompt:TEXT",
    "unconditional": "unconditional",
    "layers": "layers:N,N",
}
# The layers that "layers:low" and "layers:high" stand for, as dola_layers in transformers.
LAYER_GROUPS = ("low", "high")
# Stands for the input in prompt:TEXT.
INPUT = "{input}"


class CombinationForm(NamedTuple):
    """Numbers that a rule takes.

    Attributes:
      names: of its numbers, as --help writes them.
      ranges: of its numbers.
      defaults: of the last numbers; the ones before must be given.
      layers: combines any number of layers; False for one companion.
    """

    names: tuple[str, ...]
    ranges: tuple[Range, ...]
    defaults: tuple[float, ...]
    layers: bool = False

    def usage(self, rule: str) -> str:
        """The form in which a rule is written."""
        required = len(self.names) - len(self.defaults)
        parts = [f":{name}" for name in self.names]
        return rule + "".join(parts[:required]) + "".join(f"[{part}]" for part in parts[required:])


ABOVE_ZERO = Range(0, 100, open="least")
SHARE = Range(0, 1, open="least")
COMBINATIONS = {
    "guidance": CombinationForm(("SCALE",), (Range(0, 100),), (1.5,)),
    "contrast": CombinationForm(("ALPHA", "BETA"), (SHARE, ABOVE_ZERO), (0.1, 0.0)),
    "instructive": CombinationForm(("EPSILON",), (SHARE,), (0.3,)),
    "dola": CombinationForm(("ALPHA",), (SHARE,), (0.1,), layers=True),
    "deco": CombinationForm(("WEIGHT", "P"), (ABOVE_ZERO, SHARE), (0.6, 0.9), layers=True),
    "switch": CombinationForm(("NATS", "TOKENS"), (ABOVE_ZERO, Range(1, 64)), (1.0,)),
}
# The rule of each companion if none is named.
USUAL = {
    "model": "contrast",
    "prompt": "guidance",
    "unconditional": "guidance",
    "layers": "dola",
}


class Combination(NamedTuple):
    """A rule by name, with its numbers."""

    rule: str
    numbers: tuple[float, ...]


def check_companion(decode: Any) -> None:
    """Checks the companion of a Decode, and its rule.

    Raises:
      ValueError: one is unknown, or a rule has nothing to combine.
    """
    if decode.companion:
        parse_combination(decode.combine, decode.companion)
    require(
        bool(decode.companion) or not decode.combine,
        f"Decode.combine {decode.combine} has nothing to combine: set Decode.companion",
    )


def parse_companion(text: str) -> tuple[str, str]:
    """Returns the kind of a companion and what follows it after a colon.

    Raises:
      ValueError: the kind is unknown, or lacks what it needs.
    """
    kind, colon, argument = text.partition(":")
    require(
        kind in COMPANIONS,
        f"Decode.companion {text!r} is not one of {', '.join(COMPANIONS.values())}: "
        f"{suggest(kind, COMPANIONS)}",
    )
    if kind == "unconditional":
        require(not colon, f"Decode.companion {text!r}: unconditional takes nothing after a colon")
        return kind, argument
    require(
        bool(argument.strip()),
        f"Decode.companion {text!r} is empty: write {COMPANIONS[kind]}"
        + (", or unconditional for no prompt" if kind == "prompt" else ""),
    )
    if kind == "model":
        try:
            hub_names.check_source(argument)
        except ValueError as error:
            raise ValueError(f"Decode.companion: {error}") from None
    if kind == "layers":
        parse_layers(argument)
    return kind, argument


def parse_layers(argument: str) -> tuple[int, ...]:
    """Returns the layers of "2,4,6"; none for a group of LAYER_GROUPS.

    Raises:
      ValueError: it is neither.
    """
    if argument in LAYER_GROUPS:
        return ()
    parts = argument.split(",")
    require(
        all(part.isdecimal() for part in parts) and len(set(parts)) == len(parts),
        f"Decode.companion layers:{argument} needs different numbers of layers, such as "
        "layers:2,4, or layers:low or layers:high",
    )
    return tuple(sorted(map(int, parts)))


def parse_combination(text: str, companion: str) -> Combination:
    """Returns the rule of a name and its numbers, such as "guidance:1.5" or "contrast:0.1:0.5".

    Args:
      text: the rule; empty for the usual one of the companion.
      companion: Decode.companion.

    Raises:
      ValueError: the rule is unknown, takes other numbers, or is for another companion.
    """
    kind, argument = parse_companion(companion)
    rule, *parts = (text or USUAL[kind]).split(":")
    usages = [form.usage(name) for name, form in COMBINATIONS.items()]
    require(
        rule in COMBINATIONS,
        f"Decode.combine {text!r} is not one of {', '.join(usages)}: {suggest(rule, COMBINATIONS)}",
    )
    form = COMBINATIONS[rule]
    required = len(form.names) - len(form.defaults)
    require(
        required <= len(parts) <= len(form.names),
        f"Decode.combine {text} takes other numbers: write {form.usage(rule)}",
    )
    numbers = []
    for name, part, limits in zip(form.names, parts, form.ranges, strict=False):
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"Decode.combine {text}: {name} is not a number: {part!r}") from None
        require(number in limits, f"Decode.combine {text}: {name} must be {limits}; got {part}")
        require(
            name != "TOKENS" or number.is_integer(),
            f"Decode.combine {text}: {name} must be an integer; got {part}",
        )
        numbers.append(number)
    require(
        not form.layers or kind == "layers",
        f"Decode.combine {rule} contrasts layers: it needs Decode.companion layers:..., not {kind}",
    )
    several = kind == "layers" and len(parse_layers(argument)) != 1
    require(
        form.layers or not several,
        f"Decode.combine {rule} takes one companion, and Decode.companion {companion} has several "
        "layers: name one",
    )
    numbers += form.defaults[len(numbers) - required :] if len(numbers) >= required else ()
    return Combination(rule, tuple(numbers))
