# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: bytes, SentencePiece, tokenizer.json and listed symbols.

Id 0 is padding and 1 the end of the sequence (unless a tokenizer.json says otherwise). The last
ids of a vocabulary are its sentinels, the k-th being size - 1 - k and written <extra_id_k>, unless
`grown` says that other pieces are. A pair is kept with a run by `save_pair`. Nothing here imports
TensorFlow or seqio.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from t5x_lite.data.special_tokens import MOST_IDS, MOST_SENTINELS, panics_told, sentinel_name
from t5x_lite.data.subwords import SentencePiece, TokenizerJson
from t5x_lite.data.symbols import Bytes, Numbers, Symbols
from t5x_lite.typed import WrongType, described, typed


class Vocabulary(Protocol):
    """What every vocabulary has.

    `ends` says whether its sequences finish with `eos`, `bos` what an encoder's inputs begin with.
    Any of `stops` (eos, as a rule) ends what a model writes. `sentinel_ids` [sentinels] are int32,
    the k-th sentinel's id at k. `token` gives the id of a piece by its name, None if there is none.
    """

    size: int
    sentinels: int
    sentinel_ids: np.ndarray
    eos: int
    stops: tuple[int, ...]
    pad: int
    bos: int | None
    ends: bool

    def token(self, name: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def description(self) -> dict: ...

    def model(self) -> bytes | None: ...


def encode_ended(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids as a model reads them: beginning and end in their places, as in training."""
    start, end = edges(vocabulary)
    return [*start, *vocabulary.encode(text), *end]


def edges(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids before and after those of an input's text."""
    start = [] if vocabulary.bos is None else [vocabulary.bos]
    return start, [vocabulary.eos] if vocabulary.ends else []


def sentinel(vocabulary: Vocabulary, token: int) -> str:
    """The name of a sentinel, as texts have it."""
    return vocabulary.decode([token]).strip() or sentinel_name(vocabulary.size, token)


def grown(model: bytes | None = None, *, inner: dict, **options) -> Vocabulary:
    """A vocabulary grown from the one that `inner` describes."""
    from t5x_lite.data.grown import Grown

    return Grown(make(json.dumps(inner, ensure_ascii=False), model), **options)


KINDS = {
    "bytes": Bytes,
    "symbols": Symbols,
    "sentencepiece": SentencePiece,
    "tokenizer_json": TokenizerJson,
    "numbers": Numbers,
    "grown": grown,
}


# What a description may say, and how it is said.
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
    "inner": dict,
    "names": tuple[str, ...],
    "pattern": str | None,
}


def fingerprint(vocabulary: Vocabulary) -> str:
    """A digest that two vocabularies share only if they give the same ids."""
    text = json.dumps(vocabulary.description(), sort_keys=True).encode()
    return hashlib.sha256(text + b"\0" + (vocabulary.model() or b"")).hexdigest()


def save(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Writes vocabulary.json, and the model beside it where there is one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = vocabulary.model()
    if model is not None:
        (folder / "model").write_bytes(model)
    description = json.dumps(vocabulary.description(), ensure_ascii=False, indent=1)
    (folder / "vocabulary.json").write_text(description + "\n", encoding="utf-8")


def load(folder: str | Path) -> Vocabulary:
    """The vocabulary that `save` wrote there; one object per folder content.

    Raises ValueError where there is none, or of a kind that this version does not know.
    """
    folder = Path(folder)
    path = folder / "vocabulary.json"
    if not path.exists():
        raise ValueError(f"No vocabulary in {folder}: {path.name} is missing")
    model = folder / "model"
    try:
        content = model.read_bytes() if model.exists() else None
        with panics_told():
            return make(path.read_text(encoding="utf-8"), content)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # sentencepiece, protobuf and tokenizers raise many kinds
        raise ValueError(
            f"{folder} holds no vocabulary that can be read ({type(error).__name__}: "
            f"{str(error)[:200]}): copy it again from where the run was trained"
        ) from error


@functools.lru_cache(maxsize=16)
def make(description: str, model: bytes | None) -> Vocabulary:
    """A vocabulary from its description (JSON) and model."""
    options = json.loads(description)
    kind = options.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"Vocabulary kind {kind!r} is not one of {', '.join(KINDS)}")
    for name, value in options.items():
        check_option(name, value)
    return KINDS[kind](**options) if model is None else KINDS[kind](model, **options)


def check_option(name: str, value: Any) -> None:
    """Raises ValueError where an option of a description is not what it can be."""
    hint = OPTIONS.get(name)
    if hint is None:
        raise ValueError(f"{name} is no option of a vocabulary; there are {', '.join(OPTIONS)}")
    try:
        typed(value, hint)
    except WrongType:
        raise ValueError(f"{name} must be {described(hint)}; got {value!r:.80}") from None
    most = MOST_SENTINELS if name == "extra_ids" else MOST_IDS
    if type(value) is int and not -1 <= value < most:
        raise ValueError(f"{name} is {value:,}; it is below {most:,} in any vocabulary")


def save_pair(folder: str | Path, inputs: Vocabulary, targets: Vocabulary) -> None:
    """Writes both vocabularies of a run, in subfolders inputs and targets."""
    save(inputs, Path(folder) / "inputs")
    save(targets, Path(folder) / "targets")


def load_pair(folder: str | Path) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) that `save_pair` wrote."""
    return load(Path(folder) / "inputs"), load(Path(folder) / "targets")
