# SPDX-License-Identifier: Apache-2.0
"""Languages of a translation, as models read them: ids that begin inputs and targets."""

import copy
import json

from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.renumbered import language_names, language_token
from t5x_lite.tokenizers.vocabulary import TextVocabulary


def set_languages(
    pair: tuple[TextVocabulary, TextVocabulary], source: str | None, target: str | None
) -> tuple[TextVocabulary, TextVocabulary]:
    """The vocabularies whose texts begin with the ids of languages.

    M2M100, NLLB and mBART-50 read a text after the id of its language and write the other one's
    first (the targets' `bos`); Marian reads the id of the language to write.

    Args:
      pair: vocabularies of inputs and targets.
      source: code of the language of inputs; None for the tokenizer's own.
      target: code of the language to write; None leaves it to the model.

    Raises:
      ValueError: a code is no language of the vocabulary.
    """
    inputs, targets = pair
    marian = target is not None and f">>{target}<<" in special_tokens(inputs)
    if source is not None:
        if marian:
            raise ValueError(
                f"the tokenizer reads {target} before a text, and nothing of the source language: "
                "leave it out"
            )
        inputs = begin_with(inputs, language_token(special_tokens(inputs), source))
    if target is None:
        return inputs, targets
    if marian:
        return begin_with(inputs, language_token(special_tokens(inputs), target)), targets
    return inputs, begin_with(targets, language_token(special_tokens(targets), target))


def find_languages(
    pair: tuple[TextVocabulary, TextVocabulary], source: str, target: str
) -> tuple[str | None, str | None]:
    """The codes of a source and a target language that vocabularies know, for `set_languages`; None
    for each that they do not.

    Args:
      pair: vocabularies of inputs and targets.
      source: code of the language of inputs.
      target: code of the language to write.
    """
    inputs, targets = map(special_tokens, pair)
    if f">>{target}<<" in inputs:
        return None, target
    known = [
        any(name in special for name in language_names(code))
        for special, code in ((inputs, source), (targets, target))
    ]
    return (source, target) if all(known) else (None, None)


def first_token(targets: TextVocabulary) -> int | None:
    """The id of a language that every target begins with; None where it is none."""
    return targets.bos if targets.bos in special_tokens(targets).values() else None


def without_language(vocabulary: TextVocabulary) -> TextVocabulary:
    """The vocabulary whose texts begin with no id of a language."""
    return vocabulary if first_token(vocabulary) is None else begin_with(vocabulary, None)


def special_tokens(vocabulary: TextVocabulary) -> dict[str, int]:
    """Ids by name of the special tokens of a vocabulary; {} where it has none."""
    if isinstance(vocabulary, ExtendedVocabulary):
        return special_tokens(vocabulary.inner)
    return getattr(vocabulary, "special", {})


def begin_with(vocabulary: TextVocabulary, token: int | None) -> TextVocabulary:
    """The vocabulary whose texts begin with an id; None for no id."""
    if isinstance(vocabulary, ExtendedVocabulary):
        extended = copy.copy(vocabulary)
        extended.inner = begin_with(vocabulary.inner, token)
        return extended
    description = vocabulary.description() | {"bos": token}
    text = json.dumps(description, ensure_ascii=False)
    return vocabularies.build_vocabulary(text, vocabulary.model_bytes())
