# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of all kinds, and their files: bytes, SentencePiece, tokenizer.json, symbols.

Id 0 is padding and 1 the end of the sequence (a tokenizer.json may have others). The last ids of a
vocabulary are its sentinels, the k-th being size - 1 - k and written <extra_id_k>; an extended one
may have others. A run keeps its pair by `save_pair`. Nothing here imports TensorFlow or seqio.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.config.checked import MOST_SENTINELS, WrongType, coerce, type_in_words
from t5x_lite.tokenizers.errors import describe_error, panics_as_errors
from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.fast_tokenizers import MAX_IDS
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.tokenizers.special_tokens import sentinel_name
from t5x_lite.tokenizers.subwords import SentencePieceVocabulary, TokenizerJsonVocabulary
from t5x_lite.tokenizers.symbols import ByteVocabulary, IntegerVocabulary, SymbolVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import parse_path


def encode_with_ends(vocabulary: TextVocabulary, text: str) -> list[int]:
    """The ids as a model reads them: beginning and end in their places, as in training."""
    return encode_texts(vocabulary, [text])[0].tolist()


def encode_texts(
    vocabulary: TextVocabulary, texts: Sequence[str], ended: bool = True
) -> list[np.ndarray]:
    """The ids [n] of each text as a model reads it, in training and afterwards.

    Args:
      vocabulary: of the texts.
      texts: the texts.
      ended: the end of the sequence follows where the vocabulary has one; False for a text that is
        to be continued.
    """
    start, end = (np.array(ids, np.int32) for ids in end_ids(vocabulary))
    if ended:
        texts = [drop_typed_end(vocabulary, text) for text in texts]
    parts = vocabulary.encode_all(texts)
    return [np.concatenate([start, ids, end[: len(end) * ended]]) for ids in parts]


def drop_typed_end(vocabulary: TextVocabulary, text: str) -> str:
    """A text without the end of its sequence written out, "</s>", where the vocabulary adds one:
    both would be the same id, and no prediction has two."""
    name = end_text(vocabulary) if vocabulary.ends else None
    shorter = text.rstrip()
    return shorter.removesuffix(name).rstrip() if name and shorter.endswith(name) else text


@functools.lru_cache(maxsize=64)
def end_text(vocabulary: TextVocabulary) -> str | None:
    """The text that becomes the id of the end; None where no text does."""
    if isinstance(vocabulary, ExtendedVocabulary):
        return end_text(vocabulary.inner)
    name = None
    if isinstance(vocabulary, TokenizerJsonVocabulary) and vocabulary.eos >= 0:
        name = vocabulary.tokenizer.id_to_token(vocabulary.eos)
    elif isinstance(vocabulary, ByteVocabulary | SentencePieceVocabulary):
        name = vocabulary.named.names.get(vocabulary.eos)
    return name if name and vocabulary.encode(name)[-1:] == [vocabulary.eos] else None


def end_ids(vocabulary: TextVocabulary) -> tuple[list[int], list[int]]:
    """The ids before and after those of an input's text."""
    start = [] if vocabulary.bos is None else [vocabulary.bos]
    return start, [vocabulary.eos] if vocabulary.ends else []


def sentinel_text(vocabulary: TextVocabulary, token: int) -> str:
    """The name of a sentinel, as texts have it."""
    return vocabulary.decode([token]).strip() or sentinel_name(vocabulary.size, token)


def extended_vocabulary(model: bytes | None = None, *, inner: dict, **options) -> TextVocabulary:
    """A vocabulary that extends the one of the description `inner`.

    Args:
      model: content of the inner vocabulary's model file; None without one.
      inner: its description.
      options: arguments of `ExtendedVocabulary`.
    """
    return ExtendedVocabulary(
        build_vocabulary(json.dumps(inner, ensure_ascii=False), model), **options
    )


KINDS: dict[str, Callable[..., Any]] = {
    "bytes": ByteVocabulary,
    "symbols": SymbolVocabulary,
    "sentencepiece": SentencePieceVocabulary,
    "tokenizer_json": TokenizerJsonVocabulary,
    "numbers": IntegerVocabulary,
    "labels": LabelVocabulary,
    "grown": extended_vocabulary,
}


# Fields of a description, and their types.
OPTIONS = {
    "extra_ids": int,
    "ends": bool,
    "named": dict[str, int],
    "symbols": tuple[str, ...],
    "separator": str,
    "size": int,
    "eos": int,
    "pad": int | None,
    "bos": int | None,
    "stops": tuple[int, ...],
    "prefix_once": bool,
    "known": int | None,
    "inner": dict,
    "names": tuple[str, ...],
    "outputs": str,
    "pattern": str | None,
    "origin": dict,
}


def fingerprint(vocabulary: TextVocabulary) -> str:
    """A digest that two vocabularies share only if they give the same ids."""
    text = json.dumps(without_origin(vocabulary.description()), sort_keys=True).encode()
    return hashlib.sha256(text + b"\0" + (vocabulary.model_bytes() or b"")).hexdigest()


def without_origin(described: dict[str, Any]) -> dict[str, Any]:
    """A description without the field "origin", also in an extended one: it decides no ids."""
    kept = {name: value for name, value in described.items() if name != "origin"}
    return kept | ({"inner": without_origin(kept["inner"])} if "inner" in kept else {})


def save_vocabulary(vocabulary: TextVocabulary, folder: str | Path) -> None:
    """Writes vocabulary.json, and the model beside it where there is one."""
    folder = parse_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = vocabulary.model_bytes()
    if model is not None:
        write_atomically(folder / "model", model)
    description = json.dumps(vocabulary.description(), ensure_ascii=False, indent=1)
    write_atomically(folder / "vocabulary.json", description + "\n")


def load_vocabulary(folder: str | Path) -> TextVocabulary:
    """Reads the vocabulary that `save_vocabulary` wrote; one object per folder content.

    Raises:
      ValueError: there is none, or it is of a kind that this version does not know.
    """
    folder = parse_path(folder)
    path = folder / "vocabulary.json"
    if not path.exists():
        raise ValueError(f"No vocabulary in {folder}: {path.name} is missing")
    model = folder / "model"
    try:
        content = model.read_bytes() if model.exists() else None
        with panics_as_errors():
            return build_vocabulary(path.read_text(encoding="utf-8"), content)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # sentencepiece, protobuf and tokenizers raise many kinds
        reason = str(error)[:200] if isinstance(error, ValueError) else describe_error(error)
        raise ValueError(
            f"{folder} holds no vocabulary that can be read ({reason}): copy it again from where "
            "the run was trained"
        ) from error


@functools.lru_cache(maxsize=16)
def build_vocabulary(description: str, model: bytes | None) -> TextVocabulary:
    """A vocabulary from its description (JSON) and model."""
    options = bounded_files.parse_json(description)
    if not isinstance(options, dict):
        raise ValueError("vocabulary.json should hold an object of JSON")
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"Vocabulary kind {kind!r} is not one of {', '.join(KINDS)}")
    for name, value in options.items():
        check_option(name, value)
    return KINDS[kind](**options) if model is None else KINDS[kind](model, **options)


def check_option(name: str, value: Any) -> None:
    """Raises ValueError where a field of a description is unknown or has another type."""
    hint = OPTIONS.get(name)
    if hint is None:
        raise ValueError(f"{name} is not an option of a vocabulary; there are {', '.join(OPTIONS)}")
    try:
        coerce(value, hint)
    except WrongType:
        raise ValueError(f"{name} must be {type_in_words(hint)}; got {value!r:.80}") from None
    most = MOST_SENTINELS if name == "extra_ids" else MAX_IDS - 1
    if type(value) is int and not -1 <= value <= most:
        raise ValueError(f"{name} is {value:,}; it is at most {most:,} in any vocabulary")


def save_pair(folder: str | Path, inputs: TextVocabulary, targets: TextVocabulary) -> None:
    """Writes both vocabularies of a run.

    Args:
      folder: folder whose subfolders inputs and targets are written.
      inputs: vocabulary of the inputs.
      targets: vocabulary of the targets.
    """
    folder = parse_path(folder)
    save_vocabulary(inputs, folder / "inputs")
    save_vocabulary(targets, folder / "targets")


def load_pair(folder: str | Path) -> tuple[TextVocabulary, TextVocabulary]:
    """The vocabularies (inputs, targets) that `save_pair` wrote."""
    folder = parse_path(folder)
    return load_vocabulary(folder / "inputs"), load_vocabulary(folder / "targets")
