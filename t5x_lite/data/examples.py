# SPDX-License-Identifier: Apache-2.0
"""From a record to an example of text: fields, templates, numbers and label names."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.data.corpora import TextExample
from t5x_lite.utils.text_lines import TextError, check_unicode

# A field in a template: "translate English to German: {translation.en}".
PLACE = re.compile(r"\{([^{}]+)\}")
# A split without labels has this number in their place.
UNLABELED = -1


class FieldError(ValueError):
    """A record has no such field, or it is no text; the message says why."""


def fields_of(side: str) -> list[str]:
    """Names of the fields of a side: those in its template, or the side itself."""
    return PLACE.findall(side) or [side]


def fields_read(cfg: config.TextSource) -> list[str]:
    """Names of the fields that are read, each once."""
    sides = [side for side in (cfg.inputs, cfg.targets, cfg.negatives) if side is not None]
    return list(dict.fromkeys(name for side in sides for name in fields_of(side)))


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


def text_of(cfg: config.TextSource, name: str, value: Any, labels: Sequence[str]) -> str:
    """A value of a field as text.

    Args:
      cfg: the files or the data set.
      name: of the field, for messages.
      value: the value.
      labels: names of labels by number; none for a field that has no labels.

    Raises:
      FieldError: it is no text.
    """
    if labels and isinstance(value, int):
        if value == UNLABELED:
            raise FieldError(f"{name} is {UNLABELED}: it has no label")
        if not 0 <= value < len(labels):
            raise FieldError(f"{name} is {value}, and there are {len(labels)} names of labels")
        return labels[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if cfg.numbers and math.isfinite(value):
            return str(value)
        kind = type(cfg).__name__
        raise FieldError(
            f"{name} is {type(value).__name__}, not text ({kind}.numbers = True reads numbers as "
            f"text, {kind}.labels names them)"
        )
    if not isinstance(value, str):
        raise FieldError(f"{name} is {type(value).__name__}, not text")
    try:
        check_unicode(value)
    except TextError as error:
        raise FieldError(f"{name} is {error}") from None
    return value


class ExampleBuilder:
    """Examples of records."""

    def __init__(
        self,
        cfg: config.TextSource,
        label_names: Mapping[str, Sequence[str]] | None = None,
    ):
        """Creates the builder.

        Args:
          cfg: the files or the data set.
          label_names: names of labels by field, where the data have them.
        """
        self.cfg = cfg
        self.label_names = dict(label_names or {})
        if cfg.labels:
            self.label_names |= dict.fromkeys(fields_of(cfg.targets), cfg.labels)

    def build(self, fields: Mapping[str, Any]) -> TextExample:
        """Example of a record.

        Raises FieldError if it has none.
        """
        targets = self.side(fields, self.cfg.targets, several=True)
        inputs = None if self.cfg.inputs is None else self.side(fields, self.cfg.inputs)[0]
        hard = self.cfg.negatives
        negative = None if hard is None else self.side(fields, hard)[0]
        return TextExample(inputs, targets[0], tuple(targets), negative)

    def side(self, fields: Mapping[str, Any], side: str, several: bool = False) -> list[str]:
        """Texts of one side of a record: one, or a list of right answers.

        Args:
          fields: of the record.
          side: a field, or a template.
          several: a side of one field may be a list of texts; the first is trained on.

        Raises:
          FieldError: a field is not there, or is no text.
        """
        names = fields_of(side)
        values = {name: find_field(fields, name) for name in names}
        only = values[names[0]]
        if several and len(values) == 1 and isinstance(only, list) and only:
            answers = [{names[0]: answer} for answer in only]
        else:
            answers = [values]
        texts = []
        for number, answer in enumerate(answers, 1):
            item = f"item {number} of " if len(answers) > 1 else ""
            known = {
                name: text_of(
                    self.cfg, f"{item}field {name!r}", value, self.label_names.get(name, ())
                )
                for name, value in answer.items()
            }
            template = side if PLACE.search(side) else f"{{{side}}}"
            texts.append(PLACE.sub(lambda place, known=known: known[place[1]], template))
        return texts
