# SPDX-License-Identifier: Apache-2.0
"""Reading and writing single fields of config.json, with a refusal where one side lacks them."""

import math
from typing import Any

from t5x_lite import config


def one_of(values: dict, name: str, allowed: dict[Any, Any], default: Any = None) -> Any:
    """What the value of a field stands for; ValueError names the field and what is known of it."""
    value = values.get(name, default)
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"config.json: {name} = {value!r} is not implemented; known: {known}")
    return allowed[value]


def demand(owner: config.Stack | config.Model, family: str, **wanted: Any) -> None:
    """ValueError if a field of ours has a value that this family's config.json cannot say.

    A wanted tuple is a choice of values; anything else must be met exactly.
    """
    for name, choice in wanted.items():
        value = getattr(owner, name)
        choices = choice if isinstance(choice, tuple) else (choice,)
        if value not in choices:
            kind = type(owner).__name__
            known = " or ".join(repr(value) for value in choices)
            raise ValueError(
                f"{family} cannot express {kind}.{name} = {value!r} (only {known}); choose another "
                f"family to export to, or leave {kind}.{name} as it is there"
            )


def demand_same(one: config.Stack, other: config.Stack, family: str, *names: str) -> None:
    """ValueError if encoder and decoder differ in a field that config.json has only once."""
    for name in names:
        if getattr(one, name) != getattr(other, name):
            raise ValueError(
                f"{family} has one {name} for encoder and decoder; here they are "
                f"{getattr(one, name)!r} and {getattr(other, name)!r}"
            )


def repeated(kinds: list[str]) -> tuple[str, ...]:
    """The shortest Stack.pattern that gives these layer_types, one per layer."""
    names = {"full_attention": "full", "sliding_attention": "sliding"}
    layers = [one_of({"layer_types": kind}, "layer_types", names) for kind in kinds]
    for cycle in range(1, len(layers) + 1):
        if all(kind == layers[layer % cycle] for layer, kind in enumerate(layers)):
            return tuple(layers[:cycle])
    raise ValueError("config.json: layer_types is empty")


def layer_types(stack: config.Stack) -> list[str]:
    """Hugging Face's layer_types, one per layer."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in stack.sliding]


def pre_attention_scalar(stack: config.Stack, family: str) -> int:
    """The whole number n whose n ** -0.5 is the stack's query_scale."""
    whole = round(stack.query_scale**-2)
    if whole < 1 or not math.isclose(whole**-0.5, stack.query_scale, rel_tol=1e-9):
        raise ValueError(
            f"{family} cannot express Stack.query_scale = {stack.query_scale}: it must be the "
            "inverse square root of a whole number"
        )
    return whole
