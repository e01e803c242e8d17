# SPDX-License-Identifier: Apache-2.0
"""Compatibility of vocabularies: the same ids stand for the same text."""

import warnings

from t5x_lite import config
from t5x_lite.checkpoints.text_settings import read_text_settings
from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.vocabularies import fingerprint
from t5x_lite.tokenizers.vocabulary import TextVocabulary

# Vocabularies with the same tokens may still split texts differently.
SAMPLES = (
    "The quick brown fox, 1984 times: naïve café.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n",
    "  two  spaces\tand a tab\n\n",
)


def describe_difference(smaller: TextVocabulary, larger: TextVocabulary) -> str | None:
    """Describes the first id or text of `smaller` that `larger` treats differently; None if equal.

    `larger` may have more ids, and begin and end its sequences differently.
    """
    insides = [larger]
    while isinstance(insides[-1], ExtendedVocabulary):
        insides.append(insides[-1].inner)
    if fingerprint(smaller) in map(fingerprint, insides):
        return None
    if larger.size < smaller.size:
        return f"there are {smaller.size:,} ids there and {larger.size:,} here"
    for token in range(smaller.size):
        texts = smaller.decode([token]), larger.decode([token])
        if texts[0] != texts[1]:
            return f"id {token} is {texts[0]!r} there and {texts[1]!r} here"
    for text in SAMPLES:
        ids = smaller.encode(text), larger.encode(text)
        if ids[0] != ids[1]:
            return f"{text!r} is cut otherwise: {ids[0]} there, {ids[1]} here"
    return None


def describe_pair_difference(
    there: tuple[TextVocabulary, TextVocabulary], here: tuple[TextVocabulary, TextVocabulary]
) -> str | None:
    """Describes the first difference of two pairs (inputs, targets), one of which may have more
    ids; None if there is none."""
    for pair in zip(there, here, strict=True):
        difference = describe_difference(*sorted(pair, key=lambda each: each.size))
        if difference is not None:
            return difference
    return None


def warn_of_difference(path: str, here: tuple[TextVocabulary, TextVocabulary]) -> None:
    """Warns if an id stands for another text in Checkpoint.initial than in the data.

    Args:
      path: value of Checkpoint.initial; one without a vocabulary is not compared.
      here: vocabularies of the data.
    """
    try:
        there = read_text_settings(path).vocabularies
    except ValueError:
        return
    difference = describe_pair_difference(there, here)
    if difference is not None:
        warnings.warn(
            f"Checkpoint.initial ({path}) has another vocabulary than the data: {difference}. Its "
            "embeddings are of those ids: bind the vocabulary of the data to one of "
            f'Vocabulary.kind = "checkpoint", Vocabulary.path = {path!r}',
            stacklevel=2,
        )


def check_vocabularies(
    adaptation: config.Adaptation, inputs: TextVocabulary, targets: TextVocabulary
) -> None:
    """Checks that the data use the vocabularies of Adaptation's checkpoints.

    Warns about a checkpoint whose vocabulary cannot be read.

    Args:
      adaptation: config of the adaptation.
      inputs: vocabulary of the data's inputs.
      targets: vocabulary of the data's targets.

    Raises:
      ValueError: an id stands for another text in the data.
    """
    for field, here in (("source", targets), ("encoder_source", inputs)):
        path = getattr(adaptation, field)
        if path is None:
            continue
        try:
            there = read_text_settings(path).vocabularies[0 if field == "encoder_source" else 1]
        except ValueError as error:
            warnings.warn(
                f"Cannot check that Adaptation.{field} uses the data's vocabulary: {error}",
                stacklevel=2,
            )
            continue
        difference = describe_difference(there, here)
        config.require(
            difference is None,
            f"Adaptation.{field} ({path}) has another vocabulary than the data: {difference}. Bind "
            f'Data.vocabulary to one of Vocabulary.kind = "checkpoint", Vocabulary.path = {path!r}',
        )
