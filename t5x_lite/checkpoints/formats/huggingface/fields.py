# SPDX-License-Identifier: Apache-2.0
"""Reading and writing single fields of config.json, with a refusal where one side lacks them."""

import math
import warnings
from typing import Any

from t5x_lite import config
from t5x_lite.config.canvas import check_left_to_right


def choose_value(values: dict, name: str, allowed: dict[Any, Any], default: Any = None) -> Any:
    """The value of ours that a field of config.json stands for.

    Args:
      values: the file.
      name: name of the field.
      allowed: value of ours for each value that is implemented.
      default: value of the field where it is missing.

    Raises:
      ValueError: its value is not implemented; lists those that are.
    """
    value = values.get(name, default)
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"config.json: {name} = {value!r} is not implemented; known: {known}")
    return allowed[value]


def warn_ignored(name: str, reason: str) -> None:
    """Warns that a field of config.json is not computed, here as in transformers."""
    warnings.warn(f"config.json: {name} changes nothing: {reason}", stacklevel=3)


def warn_softcap(values: dict, family: str) -> None:
    """Warns of an attn_logit_softcapping, which transformers has in a family and does not compute.

    Args:
      values: the file, or the part of it for one tower.
      family: name of the family.
    """
    if values.get("attn_logit_softcapping") is not None:
        warn_ignored("attn_logit_softcapping", f"transformers computes none in a {family}")


def require_values(owner: config.Stack | config.Model, family: str, **wanted: Any) -> None:
    """Checks fields of ours that a family's config.json cannot say.

    Args:
      owner: config of a model or of one tower.
      family: name of the family, for the message.
      wanted: the value that each field must have, or a tuple of values to choose from.

    Raises:
      ValueError: a field has another value.
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


def require_usual_causality(cfg: config.Model, library: str) -> None:
    """Raises ValueError unless encoders read in both directions and decoders are causal and write
    from left to right.

    Args:
      cfg: config of the model.
      library: library that reads the export, for the message.
    """
    check_left_to_right(cfg, f"A checkpoint of {library}")
    for name, both_sides in (("encoder", True), ("decoder", False)):
        stack = getattr(cfg, name)
        if stack is not None and set(stack.causal_layers(both_sides)) != {not both_sides}:
            usual = "attends in both directions" if both_sides else "is causal"
            raise ValueError(
                f"{library} cannot express Stack.causal = {stack.causal!r} of the {name}: there "
                f"every layer of {'an encoder' if both_sides else 'a decoder'} {usual}"
            )


def require_equal(one: config.Stack, other: config.Stack, family: str, *names: str) -> None:
    """Checks fields that config.json has once for encoder and decoder.

    Args:
      one: config of the encoder.
      other: config of the decoder.
      family: name of the family, for the message.
      names: the fields.

    Raises:
      ValueError: a field differs.
    """
    for name in names:
        if getattr(one, name) != getattr(other, name):
            raise ValueError(
                f"{family} has one {name} for encoder and decoder; here they are "
                f"{getattr(one, name)!r} and {getattr(other, name)!r}"
            )


def shortest_pattern(kinds: list[str]) -> tuple[str, ...]:
    """The shortest Stack.pattern that gives these layer_types, one per layer."""
    names = {"full_attention": "full", "sliding_attention": "sliding"}
    layers = [choose_value({"layer_types": kind}, "layer_types", names) for kind in kinds]
    for cycle in range(1, len(layers) + 1):
        if all(kind == layers[layer % cycle] for layer, kind in enumerate(layers)):
            return tuple(layers[:cycle])
    raise ValueError("config.json: layer_types is empty")


def alternate_layer_types(layers: int, cycle: int) -> list[str]:
    """layer_types of which every cycle-th is full and the others slide, one per layer."""
    return [
        "sliding_attention" if (layer + 1) % cycle else "full_attention" for layer in range(layers)
    ]


def list_layer_types(stack: config.Stack) -> list[str]:
    """Hugging Face's layer_types, one per layer."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in stack.sliding]


def pre_attention_scalar(stack: config.Stack, family: str) -> int:
    """The integer n for which n ** -0.5 is the stack's query_scale."""
    scalar = round(stack.query_scale**-2)
    if scalar < 1 or not math.isclose(scalar**-0.5, stack.query_scale, rel_tol=1e-9):
        raise ValueError(
            f"{family} cannot express Stack.query_scale = {stack.query_scale}: it must be the "
            "inverse square root of an integer"
        )
    return scalar
