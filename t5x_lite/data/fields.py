# SPDX-License-Identifier: Apache-2.0
"""Fields of a record by their names, alone or in templates."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite import config

# A field in a template: "translate English to German: {translation.en}".
PLACE = re.compile(r"\{([^{}]+)\}")


class FieldError(ValueError):
    """A record has no such field, or it is not what it should be; the message says why."""


def fields_of(side: str) -> list[str]:
    """Names of the fields of a side: those in its template, or the side itself."""
    return PLACE.findall(side) or [side]


def fields_read(cfg: config.TextSource) -> list[str]:
    """Names of the fields that are read, each once."""
    sides = filter(None, (cfg.inputs, cfg.targets, cfg.negatives, cfg.rejected))
    scores = cfg.reference or () if isinstance(cfg, config.Files) else ()
    return list(dict.fromkeys([*(name for side in sides for name in fields_of(side)), *scores]))


def column_of(name: str, columns: Sequence[str] | Mapping[str, Any]) -> str:
    """The column that holds a field: of its whole name, else of its part before the first dot."""
    return name if name in columns else name.partition(".")[0]


def find_field(fields: Mapping[str, Any], name: str) -> Any:
    """Value of a field; "translation.en" is the field "en" of the field "translation".

    Raises FieldError if it is not there.
    """
    if name in fields:
        return fields[name]
    first, _, rest = name.partition(".")
    if rest and isinstance(fields.get(first), Mapping):
        try:
            return find_field(fields[first], rest)
        except FieldError as error:
            raise FieldError(f"field {first!r} has {error}") from None
    raise FieldError(f"no field {name!r}; there are {', '.join(map(repr, fields))}")
