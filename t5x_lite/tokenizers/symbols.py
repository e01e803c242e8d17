# SPDX-License-Identifier: Apache-2.0
"""Vocabularies that need no model: bytes, listed symbols, and ids that are ids already."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_lite.tokenizers.special_tokens import (
    NamedTokens,
    find_sentinels,
    sentinel_name,
    sentinel_names,
    top_ids,
    until_end,
)
from t5x_lite.utils.text_lines import check_unicode

SPECIAL = 3  # padding, end, unknown
# A text of an id, shorter than what Python refuses to read as a number.
DECIMAL = re.compile("[0-9]{1,20}")


class ByteVocabulary:
    """UTF-8 bytes, byte b as id b + 3, as ByT5 and seqio.ByteVocabulary have them.

    Sentinels among `named`, as transformers' ByT5 has them, count upward; those of `extra_ids`, as
    seqio has them, downward from the last id. Their names in a text are one id each.
    """

    bos = None

    def __init__(
        self, extra_ids: int = 0, ends: bool = True, named: Mapping[str, int] | None = None
    ):
        """Creates the vocabulary.

        Args:
          extra_ids: number of sentinels.
          ends: sequences finish with eos.
          named: ids by their names in a text.
        """
        self.eos, self.stops, self.pad, self.ends = 1, (1,), 0, ends
        self.extra_ids, self.described = extra_ids, dict(named or {})
        self.size = SPECIAL + 256 + extra_ids
        self.size = max([self.size, *(token + 1 for token in self.described.values())])
        self.sentinel_ids = (
            top_ids(self.size, extra_ids) if extra_ids else find_sentinels(self.described.get)
        )
        self.sentinels = len(self.sentinel_ids)
        names = self.described | sentinel_names(self.sentinel_ids)
        self.named = NamedTokens(names, bare=("<pad>", "</s>", "<unk>"))

    def token(self, name: str) -> int | None:
        return self.named.ids.get(name)

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            check_unicode(text)
        if any(map(self.named.occurs_in, texts)):
            return [self.encode_pieces(text) for text in texts]
        coded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(coded), np.uint8).astype(np.int32) + SPECIAL
        return np.split(ids, np.cumsum([len(text) for text in coded])[:-1]) if coded else []

    def encode_pieces(self, text: str) -> np.ndarray:
        """The ids [n] of a text in which names occur."""
        parts = [
            np.frombuffer(piece.encode(), np.uint8).astype(np.int32) + SPECIAL
            if token is None
            else np.array([token], np.int32)
            for piece, token in self.named.split(text)
        ]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; bytes that are not UTF-8 are left out, sentinels appear by name."""
        coded = bytearray()
        for token in until_end(ids, self.stops, self.pad):
            if SPECIAL <= token < SPECIAL + 256:
                coded.append(token - SPECIAL)
            elif SPECIAL + 256 <= token < self.size:
                coded += (self.named.names.get(token) or sentinel_name(self.size, token)).encode()
        return coded.decode("utf-8", "ignore")

    def description(self) -> dict:
        named = {"named": self.described} if self.described else {}
        return {"kind": "bytes", "extra_ids": self.extra_ids, "ends": self.ends} | named

    def model_bytes(self) -> bytes | None:
        return None


class SymbolVocabulary:
    """A listed alphabet: ids from 3 in the order of the list; 2 is any other symbol.

    `separator` stands between symbols in text; without one every character is a symbol.
    """

    bos = None

    def __init__(
        self, symbols: Sequence[str], separator: str = "", extra_ids: int = 0, ends: bool = True
    ):
        """Creates the vocabulary.

        Args:
          symbols: the alphabet, in the order of its ids.
          separator: text between symbols.
          extra_ids: number of sentinels.
          ends: sequences finish with eos.
        """
        self.eos, self.stops, self.pad, self.ends = 1, (1,), 0, ends
        self.symbols, self.separator, self.sentinels = list(symbols), separator, extra_ids
        self.size = SPECIAL + len(self.symbols) + extra_ids
        self.sentinel_ids = top_ids(self.size, extra_ids)
        self.ids = {symbol: token for token, symbol in enumerate(self.symbols, SPECIAL)}
        self.named = NamedTokens(sentinel_names(self.sentinel_ids))

    def token(self, name: str) -> int | None:
        return self.ids.get(name, self.named.ids.get(name))

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        ids = []
        for piece, token in self.named.split(text):
            parts = piece.split(self.separator) if self.separator else piece
            ids += [self.ids.get(part, 2) for part in parts if part] if token is None else [token]
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        tokens = until_end(ids, self.stops, self.pad)
        return self.separator.join(self.name(token) for token in tokens)

    def name(self, token: int) -> str:
        if SPECIAL <= token < SPECIAL + len(self.symbols):
            return self.symbols[token - SPECIAL]
        return sentinel_name(self.size, token) if 2 < token < self.size else "?"

    def description(self) -> dict:
        return {
            "kind": "symbols",
            "symbols": self.symbols,
            "separator": self.separator,
            "extra_ids": self.sentinels,
            "ends": self.ends,
        }

    def model_bytes(self) -> bytes | None:
        return None


class IntegerVocabulary:
    """Texts that are ids already, decimal integers between spaces. eos -1 is none."""

    bos = None

    def __init__(self, size: int, eos: int = 1, ends: bool = True):
        self.eos, self.stops, self.pad, self.ends = eos, (eos,), 0, ends
        self.size, self.sentinels, self.sentinel_ids = size, 0, top_ids(size, 0)

    def token(self, name: str) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        """The ids; raises ValueError for a word that is not one of them."""
        return [self.parse_id(word) for word in text.split()]

    def parse_id(self, word: str) -> int:
        token = int(word) if DECIMAL.fullmatch(word) else -1
        if not 0 <= token < self.size:
            raise ValueError(
                f"{word[:40]!r} is no id of this vocabulary: a text is numbers from 0 to "
                f"{self.size - 1} between spaces"
            )
        return token

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(map(str, until_end(ids, self.stops, self.pad)))

    def description(self) -> dict:
        return {"kind": "numbers", "size": self.size, "eos": self.eos, "ends": self.ends}

    def model_bytes(self) -> bytes | None:
        return None
