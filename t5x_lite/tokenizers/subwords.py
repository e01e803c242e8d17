# SPDX-License-Identifier: Apache-2.0
"""Vocabularies with a trained model: SentencePiece, and Hugging Face's tokenizer.json."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.tokenizers.special_tokens import (
    NamedTokens,
    SentencePieceIds,
    SpecialIds,
    count_sentinels,
    sentinel_name,
    tokenizer_size,
    top_ids,
    until_end,
)


class SentencePieceVocabulary:
    """A SentencePiece model with sentinels on top, as seqio.SentencePieceVocabulary has them.

    Raises:
      ValueError: the model has no end-of-sequence piece.
    """

    def __init__(self, model: bytes, extra_ids: int = 0, ends: bool = True, **special: Any):
        """Loads the model.

        Args:
          model: content of a .model file.
          extra_ids: number of sentinels.
          ends: sequences finish with eos.
          special: fields of `SentencePieceIds`; eos is the model's own by default, pad 0.
        """
        import sentencepiece

        ids = SentencePieceIds(**special)
        self.model, self.extra_ids, self.ends, self.bos = model, extra_ids, ends, ids.bos
        self.prefix_once, self.named = ids.prefix_once, NamedTokens(ids.named)
        extended = with_sentinels(model, extra_ids) if extra_ids else model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=extended)
        self.inner = self.processor
        if ids.prefix_once:
            bare = without_prefix(extended)
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=bare)
        self.base = self.processor.get_piece_size()
        self.size = max([self.base, *(token + 1 for token in self.named.names)])
        self.sentinels = extra_ids or count_sentinels(self.base, self.processor.id_to_piece)
        self.sentinel_ids = top_ids(self.base, self.sentinels)
        self.eos = self.processor.eos_id() if ids.eos is None else ids.eos
        self.pad = ids.pad or 0
        self.stops = tuple(ids.stops) or (self.eos,)
        if self.eos < 0:
            raise ValueError(
                "The SentencePiece model has no end-of-sequence piece; train it with eos_id >= 0"
            )

    def token(self, name: str) -> int | None:
        token = self.named.ids.get(name, self.processor.piece_to_id(name))
        unknown = token == self.processor.unk_id()
        return None if unknown and self.processor.id_to_piece(token) != name else token

    def encode(self, text: str) -> list[int]:
        if not self.named.ids:
            return self.processor.encode(text)
        ids = []
        for number, (piece, token) in enumerate(self.named.split(text)):
            if token is not None:
                ids.append(token)
            else:
                ids += (self.inner if number else self.processor).encode(piece)
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.named.ids:
            return [np.array(self.encode(text), np.int32) for text in texts]
        coded = self.processor.encode(list(texts), num_threads=2)
        return [np.array(ids, np.int32) for ids in coded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces; control tokens are left out, sentinels appear by name."""
        unknown, known = self.processor.unk_id(), self.named.names
        tokens = [
            token
            for token in until_end(ids, self.stops, self.pad)
            if token < self.base or token not in known
        ]
        return self.processor.decode([token if token < self.base else unknown for token in tokens])

    def description(self) -> dict:
        described = {"kind": "sentencepiece", "extra_ids": self.extra_ids, "ends": self.ends}
        # Left out where they are the model's own: a run's vocabulary stays what it was.
        defaults = {"eos": self.processor.eos_id(), "pad": 0, "bos": None, "prefix_once": False}
        values = {name: getattr(self, name) for name in defaults}
        described |= {name: value for name, value in values.items() if value != defaults[name]}
        described |= describe_stops(self)
        return described | ({"named": self.named.ids} if self.named.ids else {})

    def model_bytes(self) -> bytes | None:
        return self.model


def with_sentinels(model: bytes, extra_ids: int) -> bytes:
    """The model with pieces <extra_id_k> on top, highest k first, spelled as seqio spells them."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto.FromString(model)
    for k in reversed(range(extra_ids)):
        kind = schema.ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"▁<extra_id_{k}>", score=0.0, type=kind)
    return proto.SerializeToString()


def without_prefix(model: bytes) -> bytes:
    """The model without the space that it puts before a text."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString()


def describe_stops(vocabulary: "SentencePieceVocabulary | TokenizerJsonVocabulary") -> dict:
    """Field "stops" of a description; nothing where eos alone ends a text."""
    stops = vocabulary.stops
    return {} if stops == (vocabulary.eos,) else {"stops": list(stops)}


# Usual names of the end and the padding in a bare tokenizer.json, which does not say them.
ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PADS = ("<pad>", "[PAD]", "<|pad|>")


class TokenizerJsonVocabulary:
    """A Hugging Face tokenizer.json, read by the tokenizers library; no special tokens added.

    Raises:
      ValueError: it has no end-of-sequence token, or a special id is none of its ids.
    """

    def __init__(self, model: bytes, extra_ids: int = 0, ends: bool = True, **special: Any):
        """Loads the tokenizer.

        Args:
          model: content of the tokenizer.json.
          extra_ids: number of sentinels on top.
          ends: sequences finish with eos.
          special: fields of `SpecialIds`, eos -1 for none; without them, eos and pad are the tokens
            with their usual names, and pad is eos where it has no token of its own.
        """
        import tokenizers

        ids = SpecialIds(**special)
        self.json, self.extra_ids, self.ends, self.bos = model, extra_ids, ends, ids.bos
        self.tokenizer = tokenizers.Tokenizer.from_buffer(model)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.base = tokenizer_size(self.tokenizer)
        self.size = self.base + extra_ids
        self.sentinels = extra_ids or count_sentinels(self.size, self.tokenizer.id_to_token)
        self.sentinel_ids = top_ids(self.size, self.sentinels)
        self.eos = self.first(ENDS) if ids.eos is None else ids.eos
        if self.eos is None:
            raise ValueError(f"tokenizer.json has no end-of-sequence token: none of {ENDS}")
        pad = self.first(PADS) if ids.pad is None else ids.pad
        self.pad = self.eos if pad is None else pad
        self.stops = tuple(ids.stops) or (self.eos,)
        for name, token in (("eos", self.eos), ("pad", self.pad), ("bos", self.bos)):
            if token is not None and not -1 <= token < self.size:
                raise ValueError(
                    f"{name} = {token} is none of the {self.size} ids of the tokenizer"
                )
        added = self.tokenizer.get_added_tokens_decoder().items()
        lowest = self.size - self.sentinels
        self.hidden = {token for token, each in added if each.special and token < lowest}

    def token(self, name: str) -> int | None:
        return self.tokenizer.token_to_id(name)

    def first(self, names: Sequence[str]) -> int | None:
        tokens = (self.tokenizer.token_to_id(name) for name in names)
        return next((token for token in tokens if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        coded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in coded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens; special ones are left out, sentinels appear by name."""
        parts, run = [], []
        for token in until_end(ids, self.stops, self.pad):
            if token < self.base:
                run += [] if token in self.hidden else [token]
                continue
            parts += [self.plain(run), sentinel_name(self.size, token)]
            run = []
        return "".join([*parts, self.plain(run)])

    def plain(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def description(self) -> dict:
        described = {
            "kind": "tokenizer_json",
            "extra_ids": self.extra_ids,
            "ends": self.ends,
            "eos": self.eos,
            "pad": self.pad,
        }
        described |= describe_stops(self)
        return described if self.bos is None else described | {"bos": self.bos}

    def model_bytes(self) -> bytes | None:
        return self.json
