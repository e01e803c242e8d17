# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and vocabularies that a config names, wherever it does: one walk over its fields."""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite.config.checked import AnyPath, LocalPath, OutputPath, SourcePath, field_types

# Begins a value that names a checkpoint, by the field: drafter = "draft:runs/small".
NAMED = {"drafter": "draft:", "companion": "model:", "choose": "rerank:", "judge": "rerank:"}
# Annotations of fields.
SOURCES = (SourcePath,)
PATHS = (SourcePath, AnyPath, LocalPath, OutputPath)


def map_sources(
    value: Any,
    replace: Callable[[str, str], str],
    place: str = "",
    kinds: Sequence[Any] = SOURCES,
) -> Any:
    """A config with other sources.

    Args:
      value: a dataclass of the config, or a value in one.
      replace: returns the new source, by the place of a source ("data.task.vocabulary.path") and
        the source.
      place: the place of `value`.
      kinds: annotations of the fields; PATHS for all paths.
    """
    if isinstance(value, tuple):
        return tuple(map_sources(e, replace, f"{place}.{n}", kinds) for n, e in enumerate(value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for name, hint in field_types(type(value)).items():
        before, inner = getattr(value, name), f"{place}.{name}".lstrip(".")
        if before is None:
            continue
        if holds_any(hint, kinds):
            after = map_texts(before, replace, inner)
        elif name in NAMED:
            parts = before.split("+") if name == "drafter" else [before]
            begins = NAMED[name]
            after = "+".join(replace_named(part, begins, replace, inner) for part in parts)
        else:
            after = map_sources(before, replace, inner, kinds)
        if after != before:
            changes[name] = after
    return dataclasses.replace(value, **changes) if changes else value


def holds_any(hint: Any, kinds: Sequence[Any]) -> bool:
    """True for the annotation of a field that holds one of others, as it is or inside it."""
    inner = typing.get_args(hint)
    return any(hint == kind for kind in kinds) or any(holds_any(each, kinds) for each in inner)


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


def replace_named(part: str, begins: str, replace: Callable[[str, str], str], place: str) -> str:
    """A value such as "draft:SOURCE" with another checkpoint, if it names one.

    Args:
      part: the value.
      begins: what stands before a checkpoint.
      replace: as of `map_sources`.
      place: the place of the field.
    """
    source = part.removeprefix(begins)
    return begins + replace(place, source) if part.startswith(begins) and source else part


def list_sources(value: Any) -> dict[str, str]:
    """The sources of a config by their places."""
    sources: dict[str, str] = {}

    def note(place: str, source: str) -> str:
        sources[place] = source
        return source

    map_sources(value, note)
    return sources
