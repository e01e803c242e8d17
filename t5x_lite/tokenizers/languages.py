# SPDX-License-Identifier: Apache-2.0
"""Languages of a translation, as a model is told them: ids that begin its inputs and its texts."""

import json
from typing import Any

from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.renumbered import language_names, language_token
from t5x_lite.tokenizers.vocabulary import TextVocabulary


def set_languages(predictor: Any, source: str | None, target: str | None) -> int | None:
    """Sets the languages that a predictor reads and writes.

    M2M100, NLLB and mBART-50 read a text after the id of its language and write the other one's
    first; Marian reads the id of the language to write.

    Args:
      predictor: `evaluation.predict.Predictor`, whose vocabularies are replaced.
      source: code of the language of inputs; None for the tokenizer's own.
      target: code of the language to write; None leaves it to the model.

    Returns:
      The id that every text begins with (`Decode.forced_bos_token_id`); None for none.

    Raises:
      ValueError: a code is no language of the vocabulary.
    """
    if source is not None:
        if f">>{target}<<" in special_tokens(predictor.inputs):
            raise ValueError(
                f"the tokenizer reads {target} before a text, and nothing of the source language: "
                "leave it out"
            )
        token = language_token(special_tokens(predictor.inputs), source)
        predictor.inputs = begin_with(predictor.inputs, token)
    if target is None:
        return None
    token = language_token(special_tokens(predictor.targets), target)
    if f">>{target}<<" in special_tokens(predictor.inputs):
        predictor.inputs = begin_with(predictor.inputs, token)
        return None
    predictor.targets = begin_with(predictor.targets, token)
    return token


def find_languages(predictor: Any, source: str, target: str) -> tuple[str | None, str | None]:
    """The codes of a source and a target language that a predictor's tokenizers know, for
    `set_languages`; None for each that they do not.

    Args:
      predictor: as of `set_languages`.
      source: code of the language of inputs.
      target: code of the language to write.
    """
    inputs, targets = special_tokens(predictor.inputs), special_tokens(predictor.targets)
    if f">>{target}<<" in inputs:
        return None, target
    known = [
        any(name in special for name in language_names(code))
        for special, code in ((inputs, source), (targets, target))
    ]
    return (source, target) if all(known) else (None, None)


def special_tokens(vocabulary: TextVocabulary) -> dict[str, int]:
    """Ids by name of the special tokens of a vocabulary; {} where it has none."""
    return getattr(vocabulary, "special", {})


def begin_with(vocabulary: TextVocabulary, token: int) -> TextVocabulary:
    """The vocabulary whose texts begin with an id."""
    description = vocabulary.description() | {"bos": token}
    text = json.dumps(description, ensure_ascii=False)
    return vocabularies.build_vocabulary(text, vocabulary.model_bytes())
