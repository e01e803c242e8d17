# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: bytes, SentencePiece, tokenizer.json and listed symbols.

Id 0 is padding and 1 the end of the sequence (unless a tokenizer.json says otherwise). The last
ids of a vocabulary are its sentinels, the k-th being size - 1 - k and written <extra_id_k>. A pair
is kept with a run by `save_pair`. Nothing here imports TensorFlow or seqio.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

SPECIAL = 3  # padding, end, unknown


class Vocabulary(Protocol):
    """What every vocabulary has. `ends` says whether its sequences finish with `eos`."""

    size: int
    sentinels: int
    eos: int
    pad: int
    ends: bool

    def encode(self, text: str) -> list[int]: ...

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def description(self) -> dict: ...

    def model(self) -> bytes | None: ...


def encode_ended(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids as a model reads them: with the end in its place, as in training."""
    ids = vocabulary.encode(text)
    return [*ids, vocabulary.eos] if vocabulary.ends else ids


def until_end(ids: Sequence[int], eos: int, pad: int) -> list[int]:
    """The ids before the first eos, without padding."""
    ids = [int(token) for token in ids]
    if eos in ids:
        ids = ids[: ids.index(eos)]
    return [token for token in ids if token != pad]


def sentinel_name(vocabulary: Vocabulary, token: int) -> str:
    return f"<extra_id_{vocabulary.size - 1 - token}>"


class Bytes:
    """UTF-8 bytes, byte b as id b + 3, as ByT5 and seqio.ByteVocabulary have them."""

    def __init__(self, extra_ids: int = 0, ends: bool = True):
        self.eos, self.pad, self.ends = 1, 0, ends
        self.sentinels = extra_ids
        self.size = SPECIAL + 256 + extra_ids

    def encode(self, text: str) -> list[int]:
        return [byte + SPECIAL for byte in text.encode("utf-8", "replace")]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        coded = [text.encode("utf-8", "replace") for text in texts]
        ids = np.frombuffer(b"".join(coded), np.uint8).astype(np.int32) + SPECIAL
        return np.split(ids, np.cumsum([len(text) for text in coded])[:-1]) if coded else []

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 are left out; sentinels appear by name."""
        coded = bytearray()
        for token in until_end(ids, self.eos, self.pad):
            if SPECIAL <= token < SPECIAL + 256:
                coded.append(token - SPECIAL)
            elif SPECIAL + 256 <= token < self.size:
                coded += sentinel_name(self, token).encode()
        return coded.decode("utf-8", "ignore")

    def description(self) -> dict:
        return {"kind": "bytes", "extra_ids": self.sentinels, "ends": self.ends}

    def model(self) -> bytes | None:
        return None


class Symbols:
    """A listed alphabet: ids from 3 in the order of the list; 2 is any other symbol.

    `separator` stands between symbols in text; without one every character is a symbol.
    """

    def __init__(
        self, symbols: Sequence[str], separator: str = "", extra_ids: int = 0, ends: bool = True
    ):
        self.eos, self.pad, self.ends = 1, 0, ends
        self.symbols, self.separator, self.sentinels = list(symbols), separator, extra_ids
        self.size = SPECIAL + len(self.symbols) + extra_ids
        self.ids = {symbol: token for token, symbol in enumerate(self.symbols, SPECIAL)}

    def encode(self, text: str) -> list[int]:
        parts = text.split(self.separator) if self.separator else text
        return [self.ids.get(part, 2) for part in parts if part]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        tokens = until_end(ids, self.eos, self.pad)
        return self.separator.join(self.name(token) for token in tokens)

    def name(self, token: int) -> str:
        if SPECIAL <= token < SPECIAL + len(self.symbols):
            return self.symbols[token - SPECIAL]
        return sentinel_name(self, token) if 2 < token < self.size else "?"

    def description(self) -> dict:
        return {
            "kind": "symbols",
            "symbols": self.symbols,
            "separator": self.separator,
            "extra_ids": self.sentinels,
            "ends": self.ends,
        }

    def model(self) -> bytes | None:
        return None


class SentencePiece:
    """A SentencePiece model with sentinels on top, as seqio.SentencePieceVocabulary has them."""

    def __init__(self, model: bytes, extra_ids: int = 0, ends: bool = True):
        import sentencepiece

        self.pieces, self.extra_ids, self.ends = model, extra_ids, ends
        whole = with_sentinels(model, extra_ids) if extra_ids else model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=whole)
        self.size = self.processor.get_piece_size()
        self.sentinels = extra_ids or count_sentinels(self.size, self.processor.id_to_piece)
        self.eos, self.pad = self.processor.eos_id(), 0
        if self.eos < 0:
            raise ValueError(
                "The SentencePiece model has no end-of-sequence piece; train it with eos_id >= 0"
            )

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        coded = self.processor.encode(list(texts), num_threads=2)
        return [np.array(ids, np.int32) for ids in coded]

    def decode(self, ids: Sequence[int]) -> str:
        tokens = until_end(ids, self.eos, self.pad)
        unknown = self.processor.unk_id()
        return self.processor.decode([token if token < self.size else unknown for token in tokens])

    def description(self) -> dict:
        return {"kind": "sentencepiece", "extra_ids": self.extra_ids, "ends": self.ends}

    def model(self) -> bytes | None:
        return self.pieces


def with_sentinels(model: bytes, extra_ids: int) -> bytes:
    """The model with pieces <extra_id_k> on top, highest k first, spelt as seqio spells them."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto.FromString(model)
    for k in reversed(range(extra_ids)):
        kind = schema.ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"▁<extra_id_{k}>", score=0.0, type=kind)
    return proto.SerializeToString()


def count_sentinels(size: int, piece) -> int:
    """How many of the last pieces are named <extra_id_0>, <extra_id_1> ... from the top down."""
    count = 0
    while count < size and (piece(size - 1 - count) or "").strip("▁") == f"<extra_id_{count}>":
        count += 1
    return count


# What a bare tokenizer.json may call its end and its padding; it does not say which they are.
ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PADS = ("<pad>", "[PAD]", "<|pad|>")


class TokenizerJson:
    """A Hugging Face tokenizer.json, read by the tokenizers library; no special tokens added.

    eos and pad are ids, eos -1 for none; left out, they are found by their usual names, and
    padding that has no token of its own is eos.
    """

    def __init__(
        self,
        model: bytes,
        extra_ids: int = 0,
        ends: bool = True,
        eos: int | None = None,
        pad: int | None = None,
    ):
        import tokenizers

        self.json, self.extra_ids, self.ends = model, extra_ids, ends
        self.tokenizer = tokenizers.Tokenizer.from_buffer(model)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.base = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.size = self.base + extra_ids
        self.sentinels = extra_ids or count_sentinels(self.size, self.tokenizer.id_to_token)
        self.eos = self.first(ENDS) if eos is None else eos
        if self.eos is None:
            raise ValueError(f"tokenizer.json has no end-of-sequence token: none of {ENDS}")
        found = self.first(PADS) if pad is None else pad
        self.pad = self.eos if found is None else found
        for name, token in (("eos", self.eos), ("pad", self.pad)):
            if not -1 <= token < self.size:
                raise ValueError(
                    f"{name} = {token} is none of the {self.size} ids of the tokenizer"
                )

    def first(self, names: Sequence[str]) -> int | None:
        found = (self.tokenizer.token_to_id(name) for name in names)
        return next((token for token in found if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        coded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in coded]

    def decode(self, ids: Sequence[int]) -> str:
        parts, run = [], []
        for token in until_end(ids, self.eos, self.pad):
            if token < self.base:
                run.append(token)
                continue
            parts += [self.tokenizer.decode(run), sentinel_name(self, token)]
            run = []
        return "".join([*parts, self.tokenizer.decode(run)])

    def description(self) -> dict:
        return {
            "kind": "tokenizer_json",
            "extra_ids": self.extra_ids,
            "ends": self.ends,
            "eos": self.eos,
            "pad": self.pad,
        }

    def model(self) -> bytes | None:
        return self.json


class Numbers:
    """Ids that are already ids: text is their decimal digits between blanks. eos -1 is none."""

    def __init__(self, size: int, eos: int = 1, ends: bool = True):
        self.size, self.eos, self.ends, self.pad, self.sentinels = size, eos, ends, 0, 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, until_end(ids, self.eos, self.pad)))

    def description(self) -> dict:
        return {"kind": "numbers", "size": self.size, "eos": self.eos, "ends": self.ends}

    def model(self) -> bytes | None:
        return None


KINDS = {
    "bytes": Bytes,
    "symbols": Symbols,
    "sentencepiece": SentencePiece,
    "tokenizer_json": TokenizerJson,
    "numbers": Numbers,
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
    return make(path.read_text(encoding="utf-8"), model.read_bytes() if model.exists() else None)


@functools.lru_cache(maxsize=16)
def make(description: str, model: bytes | None) -> Vocabulary:
    """A vocabulary from its description (JSON) and model."""
    options = json.loads(description)
    kind = options.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"Vocabulary kind {kind!r} is not one of {', '.join(KINDS)}")
    return KINDS[kind](**options) if model is None else KINDS[kind](model, **options)


def save_pair(folder: str | Path, inputs: Vocabulary, targets: Vocabulary) -> None:
    """Writes both vocabularies of a run, in subfolders inputs and targets."""
    save(inputs, Path(folder) / "inputs")
    save(targets, Path(folder) / "targets")


def load_pair(folder: str | Path) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) that `save_pair` wrote."""
    return load(Path(folder) / "inputs"), load(Path(folder) / "targets")
