# SPDX-License-Identifier: Apache-2.0
"""Whether two models mean the same text by the same ids."""

import warnings

from t5x_lite import config
from t5x_lite.conversion import checkpoint
from t5x_lite.data.grown import Grown
from t5x_lite.data.vocabularies import Vocabulary, fingerprint

# Vocabularies of the same pieces may still cut texts otherwise.
SAMPLES = (
    "The quick brown fox, 1984 times: naïve café.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n",
    "  two  spaces\tand a tab\n\n",
)


def difference(known: Vocabulary, larger: Vocabulary) -> str | None:
    """Where `larger` gives ids of `known` another meaning, in words; None where it nowhere does.

    It may have more ids, and begin and end its sequences otherwise.
    """
    insides = [larger]
    while isinstance(insides[-1], Grown):
        insides.append(insides[-1].inner)
    if fingerprint(known) in map(fingerprint, insides):
        return None
    if larger.size < known.size:
        return f"there are {known.size:,} ids there and {larger.size:,} here"
    for token in range(known.size):
        texts = known.decode([token]), larger.decode([token])
        if texts[0] != texts[1]:
            return f"id {token} is {texts[0]!r} there and {texts[1]!r} here"
    for text in SAMPLES:
        ids = known.encode(text), larger.encode(text)
        if ids[0] != ids[1]:
            return f"{text!r} is cut otherwise: {ids[0]} there, {ids[1]} here"
    return None


def check(how: config.Adaptation, inputs: Vocabulary, targets: Vocabulary) -> None:
    """Raises ValueError where the data are not in the ids of the checkpoints of Adaptation.

    Warns of a checkpoint whose vocabulary cannot be read.
    """
    for field, here in (("source", targets), ("encoder_source", inputs)):
        path = getattr(how, field)
        if path is None:
            continue
        try:
            there = checkpoint.vocabularies(path)[0 if field == "encoder_source" else 1]
        except ValueError as error:
            warnings.warn(
                f"Nobody knows whether Adaptation.{field} has the ids of the data: {error}",
                stacklevel=2,
            )
            continue
        told = difference(there, here)
        config.require(
            told is None,
            f"Adaptation.{field} ({path}) has another vocabulary than the data: {told}. Bind "
            f'Data.vocabulary to one of Vocabulary.kind = "checkpoint", Vocabulary.path = {path!r}',
        )
