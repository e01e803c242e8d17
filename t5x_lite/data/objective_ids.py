# SPDX-License-Identifier: Apache-2.0
"""Ids that objectives take from a vocabulary: the mask, the marks of infilling, a newline."""

import numpy as np

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.config.objectives import Objective
from t5x_lite.config.windows import LengthLimits
from t5x_lite.tokenizers.vocabulary import TextVocabulary


def mask_id(objective: Objective, lengths: LengthLimits, vocabulary: TextVocabulary) -> np.ndarray:
    """Ids of the sentinels [k], or of SpanCorruption.mask [1] in a masked language model.

    Args:
      objective: its config.
      lengths: limits of the rows.
      vocabulary: of the text.

    Raises:
      ValueError: the mask is no single id, or the objective is not masked language modeling.
    """
    name = getattr(objective, "mask", None)
    if name is None:
        return vocabulary.sentinel_ids
    if lengths.layout != "encoder_only":
        raise ValueError(
            "SpanCorruption.mask is for an encoder alone, or a decoder whose layers are not "
            "causal: leave it out, and the spans get sentinels"
        )
    ids = vocabulary.encode(name)
    if len(ids) != 1:
        raise ValueError(
            f"SpanCorruption.mask: {name!r} is {len(ids)} ids, not one: name one piece of the "
            "vocabulary, or add it by Vocabulary.names"
        )
    return np.array(ids, np.int32)


def newline_ids(vocabulary: TextVocabulary) -> list[int]:
    """The ids of a newline after a text; none where the vocabulary drops it or has none."""
    try:
        before, after = vocabulary.encode("a"), vocabulary.encode("a\n")
    except ValueError:
        return []  # texts of integers
    known = vocabulary.decode(after) == vocabulary.decode(before) + "\n"
    return after[len(before) :] if known and after[: len(before)] == before else []


def marks_of(objective: Objective, vocabulary: TextVocabulary) -> np.ndarray:
    """Ids of fill-in-the-middle's marks [3]: before the prefix, before the suffix, after both.

    Raises ValueError for a mark that is not one id.
    """
    if not isinstance(objective, config.FillInTheMiddle) or objective.marks is None:
        return vocabulary.sentinel_ids[: windows.MARKS]
    coded = [vocabulary.encode(name) for name in objective.marks]
    for name, ids in zip(objective.marks, coded, strict=True):
        if len(ids) != 1:
            raise ValueError(
                f"FillInTheMiddle.marks: {name!r} is {len(ids)} ids, not one: add it to "
                "Vocabulary.names, or leave marks out and sentinels are used"
            )
    return np.array(coded, np.int32).reshape(-1)
