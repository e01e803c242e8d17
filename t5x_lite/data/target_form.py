# SPDX-License-Identifier: Apache-2.0
"""Form of a task's examples: text, or labels and numbers for a model with Model.readout."""

import json
from collections.abc import Callable
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.data.corpora import TextExample
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class TargetForm(NamedTuple):
    """Form of a task's examples for a model with Model.readout.

    Attributes:
      readout: what the targets are; None for text.
      start: id that begins the inputs; None for none.
    """

    readout: config.Readout | None = None
    start: int | None = None

    def label_targets(
        self, pair: tuple[TextVocabulary, TextVocabulary]
    ) -> tuple[TextVocabulary, TextVocabulary]:
        """The vocabularies (inputs, targets), that of targets for labels instead of text."""
        if self.readout is None:
            return pair
        if self.readout.kind != "number":
            _ = self.readout.size  # raises ValueError where the labels are not known
        return pair[0], LabelVocabulary(self.readout.kind, self.readout.labels)

    def extend_source(self, source: Callable[[str], str]) -> Callable[[str], str]:
        """A digest of how a split is read that has this form in it, where there is one."""
        if self == TEXT:
            return source
        form = [self.readout and self.readout.kind, self.start]
        return lambda split: f"{source(split)} {json.dumps(form)}"


TEXT = TargetForm()


def describe_label(inputs: TextVocabulary, labels: LabelVocabulary, row: TextExample) -> str:
    """The reason why the target of an example is none of the labels, "" if it is.

    Args:
      inputs: vocabulary of the inputs.
      labels: vocabulary of the targets.
      row: the example.
    """
    try:
        if labels.outputs == "tags":
            labels.encode_tags(row.inputs or "", row.targets, inputs)
        else:
            labels.encode(row.targets)
    except ValueError as error:
        return str(error)
    return ""
