# SPDX-License-Identifier: Apache-2.0
"""From a record to an example of text: fields, templates, numbers and label names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.fields import PLACE, FieldError, fields_of, find_field
from t5x_lite.data.label_fields import UNLABELED, write_target
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.text_lines import TextError, check_unicode


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
        readout: config.Readout | None = None,
    ):
        """Creates the builder.

        Args:
          cfg: the files or the data set.
          label_names: names of labels by field, where the data have them.
          readout: what the targets are; None for text.
        """
        self.cfg, self.readout = cfg, readout
        self.label_names = dict(label_names or {})
        if cfg.labels:
            self.label_names |= dict.fromkeys(fields_of(cfg.targets), cfg.labels)

    def build(self, fields: Mapping[str, Any]) -> TextExample:
        """Example of a record.

        Raises FieldError if it has none.
        """
        if self.readout is not None:
            return self.build_labeled(fields, self.readout.kind)
        targets = self.side(fields, self.cfg.targets, several=True)
        inputs = None if self.cfg.inputs is None else self.side(fields, self.cfg.inputs)[0]
        hard = self.cfg.negatives
        negative = None if hard is None else self.side(fields, hard)[0]
        return TextExample(inputs, targets[0], tuple(targets), negative)

    def build_labeled(self, fields: Mapping[str, Any], kind: str) -> TextExample:
        """Example whose target is labels, a number or spans.

        Words in a list are a text with single spaces between them, for tags of words.
        """
        name = self.cfg.inputs or ""
        words = find_field(fields, name) if kind == "tags" and name in fields else None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            fields = {**fields, name: " ".join(words)}
        (inputs,) = self.side(fields, name)
        value = find_field(fields, self.cfg.targets)
        try:
            names = self.label_names.get(self.cfg.targets, ())
            target = write_target(kind, value, names, inputs)
        except FieldError as error:
            raise FieldError(f"field {self.cfg.targets!r} {error}") from None
        return TextExample(inputs, target, (target,))

    def build_rejected(self, fields: Mapping[str, Any]) -> TextExample:
        """Example of the text that a record rejects.

        Raises FieldError if it has none.
        """
        chosen = self.build(fields)
        rejected = self.side(fields, not_none(self.cfg.rejected))[0]
        return TextExample(chosen.inputs, rejected, (rejected,))

    def reference_scores(self, fields: Mapping[str, Any]) -> list[float]:
        """Log-probabilities of the chosen and the rejected text of a record under a reference.

        Raises FieldError if they are not there, or no finite numbers that are at most 0.
        """
        assert isinstance(self.cfg, config.Files)
        scores = []
        for name in not_none(self.cfg.reference):
            value = find_field(fields, name)
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not (math.isfinite(number) and number <= 0):
                raise FieldError(f"field {name!r} is {value!r:.40}, not a log-probability")
            scores.append(number)
        return scores

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
