# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and vocabularies that a config names, wherever it does: one walk over its fields."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from t5x_lite.config.checked import SourcePath, field_types

# Begins a drafter that is a checkpoint: "draft:runs/small".
DRAFT = "draft:"


def map_sources(value: Any, replace: Callable[[str, str], str], place: str = "") -> Any:
    """A config with other sources.

    Args:
      value: a dataclass of the config, or a value in one.
      replace: returns the new source, by the place of a source ("data.task.vocabulary.path") and
        the source.
      place: the place of `value`.
    """
    if isinstance(value, tuple):
        return tuple(map_sources(e, replace, f"{place}.{n}") for n, e in enumerate(value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for name, hint in field_types(type(value)).items():
        before, inner = getattr(value, name), f"{place}.{name}".lstrip(".")
        if before is None:
            continue
        if is_source(hint):
            after = map_texts(before, replace, inner)
        elif name == "drafter":
            after = "+".join(replace_draft(part, replace, inner) for part in before.split("+"))
        else:
            after = map_sources(before, replace, inner)
        if after != before:
            changes[name] = after
    return dataclasses.replace(value, **changes) if changes else value


def is_source(hint: Any) -> bool:
    """True for the annotation of a field that holds sources, as they are or inside others."""
    return hint is SourcePath or hint == SourcePath or any(map(is_source, typing.get_args(hint)))


def map_texts(value: Any, replace: Callable[[str, str], str], place: str) -> Any:
    """A field of sources: one, or several in tuples or a dict, by `map_sources`.

    Args:
      value: the field.
      replace: as of `map_sources`.
      place: its place.
    """
    if isinstance(value, str):
        return replace(place, value)
    if isinstance(value, dict):
        return {key: map_texts(each, replace, f"{place}.{key}") for key, each in value.items()}
    return tuple(map_texts(each, replace, f"{place}.{n}") for n, each in enumerate(value))


def replace_draft(part: str, replace: Callable[[str, str], str], place: str) -> str:
    """One of the drafters of Decode.drafter, with another checkpoint if it is one.

    Args:
      part: the drafter.
      replace: as of `map_sources`.
      place: the place of Decode.drafter.
    """
    source = part.removeprefix(DRAFT)
    return DRAFT + replace(place, source) if part.startswith(DRAFT) and source else part


def list_sources(value: Any) -> dict[str, str]:
    """The sources of a config by their places."""
    sources: dict[str, str] = {}

    def note(place: str, source: str) -> str:
        sources[place] = source
        return source

    map_sources(value, note)
    return sources
