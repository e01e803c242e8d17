# SPDX-License-Identifier: Apache-2.0
"""Vocabularies with a trained model: SentencePiece, and Hugging Face's tokenizer.json."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.tokenizers.errors import panics_as_errors
from t5x_lite.tokenizers.fast_tokenizers import load_fast_tokenizer, tokenizer_size
from t5x_lite.tokenizers.special_tokens import (
    SENTINEL,
    NamedTokens,
    SentencePieceIds,
    SpecialIds,
    find_piece,
    find_sentinels,
    sentinel_name,
    sentinel_names,
    top_ids,
    until_end,
)
from t5x_lite.utils.text_lines import check_unicode


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
        self.prefix_once, self.described = ids.prefix_once, dict(ids.named)
        extended = with_sentinels(model, extra_ids) if extra_ids else model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=extended)
        self.known = ids.known
        pieces = self.processor.get_piece_size()
        self.base = pieces if ids.known is None else min(ids.known, pieces)
        names = map(self.processor.id_to_piece, range(self.base if ids.known else 0))
        self.pieces = {name: token for token, name in enumerate(names)}
        self.size = max([self.base, *(token + 1 for token in self.described.values())])
        self.sentinel_ids = (
            top_ids(self.base, extra_ids) if extra_ids else find_sentinels(self.token)
        )
        self.sentinels = len(self.sentinel_ids)
        self.eos = self.processor.eos_id() if ids.eos is None else ids.eos
        self.pad = ids.pad or 0
        self.stops = tuple(ids.stops) or (self.eos,)
        if self.eos < 0:
            raise ValueError(
                "The SentencePiece model has no end-of-sequence piece; train it with eos_id >= 0"
            )
        spelled = {} if ids.named else self.respelled_sentinels()
        # Where spaces are kept, the model's own stands before the first run alone, and a sentinel
        # whose piece has one takes that before it.
        keeps = bool(spelled) and not spaces_of(model).remove_extra_whitespaces
        spaced = [name for name in spelled if keeps and self.begins_with_space(spelled[name])]
        self.named = NamedTokens(self.described | spelled, spaced=spaced)
        self.prefixes_once = ids.prefix_once or keeps
        self.inner = self.processor
        if self.prefixes_once:
            bare = without_prefix(extended)
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=bare)

    def respelled_sentinels(self) -> dict[str, int]:
        """Ids by name of the sentinels that the model itself would not find in every text: their
        pieces begin with its sign of a space, or follow the space that it puts before a text."""
        names = sentinel_names(self.sentinel_ids)
        if not names:
            return {}
        exact = all(self.processor.id_to_piece(token) == name for name, token in names.items())
        return {} if exact and not spaces_of(self.model).add_dummy_prefix else names

    def begins_with_space(self, token: int) -> bool:
        return self.processor.id_to_piece(token).startswith("▁")

    @property
    def special(self) -> dict[str, int]:
        """Ids by name of special tokens that a text may contain."""
        return self.named.ids

    def token(self, name: str) -> int | None:
        token = self.described.get(name)
        return find_piece(self.processor, name) if token is None else token

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        ids = []
        for number, (piece, token) in enumerate(self.named.split(text)):
            if token is not None:
                ids.append(token)
            else:
                ids += self.encode_run(self.inner if number else self.processor, piece)
        return ids

    def encode_run(self, processor: Any, text: str) -> list[int]:
        """The ids of a text without names."""
        if self.known is None:
            return processor.encode(text)
        return self.look_up(processor.encode(text, out_type=str))

    def look_up(self, pieces: Sequence[str]) -> list[int]:
        """The ids of pieces, as a vocab.json has them: one that the model does not know may be
        among them, as a piece of the other side's model."""
        unknown = self.processor.unk_id()
        return [self.pieces.get(piece, unknown) for piece in pieces]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            check_unicode(text)
        named = [self.named.occurs_in(text) for text in texts]
        plain = [text for text, has_name in zip(texts, named, strict=True) if not has_name]
        if self.known is None:
            coded = iter(self.processor.encode(plain, num_threads=2))
        else:
            coded = map(self.look_up, self.processor.encode(plain, out_type=str, num_threads=2))
        return [
            np.array(self.encode(text) if has_name else next(coded), np.int32)
            for text, has_name in zip(texts, named, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the pieces; control tokens are left out, sentinels appear by name."""
        unknown, known = self.processor.unk_id(), set(self.described.values())
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
        defaults["known"] = None
        values = {name: getattr(self, name) for name in defaults}
        described |= {name: value for name, value in values.items() if value != defaults[name]}
        described |= describe_stops(self)
        return described | ({"named": self.described} if self.described else {})

    def model_bytes(self) -> bytes | None:
        return self.model


def parse_proto(model: bytes) -> Any:
    """The ModelProto in a SentencePiece .model file."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    return schema.ModelProto.FromString(model)


def with_sentinels(model: bytes, extra_ids: int) -> bytes:
    """The model with pieces of the sentinels on top, highest k first.

    They are spelled ▁<extra_id_k>, as seqio has them, where the model drops a space before one
    and writes it again. A model that keeps the spaces of a text has them apart: <extra_id_k>.
    """
    proto = parse_proto(model)
    spec = proto.normalizer_spec
    space = "▁" if spec.add_dummy_prefix and spec.remove_extra_whitespaces else ""
    for k in reversed(range(extra_ids)):
        kind = proto.SentencePiece.USER_DEFINED
        name = SENTINEL.replace("{}", str(k))
        proto.pieces.add(piece=space + name, score=0.0, type=kind)
    return proto.SerializeToString()


def spaces_of(model: bytes) -> Any:
    """The normalizer of a model (NormalizerSpec), which says how it treats spaces."""
    return parse_proto(model).normalizer_spec


def without_prefix(model: bytes) -> bytes:
    """The model without the space that it puts before a text."""
    proto = parse_proto(model)
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

    def __init__(
        self,
        model: bytes,
        extra_ids: int = 0,
        ends: bool = True,
        origin: dict[str, Any] | None = None,
        **special: Any,
    ):
        """Loads the tokenizer.

        Args:
          model: content of the tokenizer.json.
          extra_ids: number of sentinels on top.
          ends: sequences finish with eos.
          origin: fields of the tokenizer_config.json that it came with, for one to go with.
          special: fields of `SpecialIds`, eos -1 for none; without them, eos and pad are the tokens
            with their usual names, and pad is eos where it has no token of its own.
        """
        ids = SpecialIds(**special)
        self.json, self.extra_ids, self.ends, self.bos = model, extra_ids, ends, ids.bos
        self.origin = origin or {}
        self.tokenizer = load_fast_tokenizer(model)
        self.named = NamedTokens({})
        self.base = tokenizer_size(self.tokenizer)
        self.size = self.base + extra_ids
        self.sentinel_ids = (
            top_ids(self.size, extra_ids) if extra_ids else find_sentinels(self.token)
        )
        self.sentinels = len(self.sentinel_ids)
        eos = self.first(ENDS) if ids.eos is None else ids.eos
        if eos is None:
            raise ValueError(f"tokenizer.json has no end-of-sequence token: none of {ENDS}")
        self.eos: int = eos
        pad = self.first(PADS) if ids.pad is None else ids.pad
        self.pad = self.eos if pad is None else pad
        self.stops = tuple(ids.stops) or (self.eos,)
        for name, token in (("eos", self.eos), ("pad", self.pad), ("bos", self.bos)):
            if token is not None and not -1 <= token < self.size:
                raise ValueError(
                    f"{name} = {token} is none of the {self.size} ids of the tokenizer"
                )
        added, sentinels = self.tokenizer.get_added_tokens_decoder(), set(self.sentinel_ids)
        self.hidden = {token for token, each in added.items() if each.special} - sentinels
        self.special = {added[token].content: token for token in sorted(self.hidden)}
        if extra_ids:
            self.add_sentinels()

    def add_sentinels(self) -> None:
        """Makes the tokenizer find the names of sentinels in a text."""
        import tokenizers

        names = sentinel_names(self.sentinel_ids)
        if self.tokenizer.get_vocab_size() < self.base:
            # The library gives an added token the next id that is free, of which there are lower
            # ones here: names are found before the tokenizer reads a text.
            self.named = NamedTokens(names)
            return
        tokens = sorted(names, key=lambda name: names[name])
        self.tokenizer.add_tokens(
            [tokenizers.AddedToken(each, normalized=False) for each in tokens]
        )

    def token(self, name: str) -> int | None:
        token = self.tokenizer.token_to_id(name)
        if token is None and name.startswith("<extra_id_"):
            return self.named.ids.get(name, self.tokenizer.token_to_id(f"▁{name}"))
        return token

    def first(self, names: Sequence[str]) -> int | None:
        tokens = (self.tokenizer.token_to_id(name) for name in names)
        return next((token for token in tokens if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            check_unicode(text)
        if any(map(self.named.occurs_in, texts)):
            return [self.encode_pieces(text) for text in texts]
        with panics_as_errors():
            coded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in coded]

    def encode_pieces(self, text: str) -> np.ndarray:
        """The ids [n] of a text in which names occur that the tokenizer does not know."""
        parts = [
            self.encode_all([piece])[0] if token is None else np.array([token], np.int32)
            for piece, token in self.named.split(text)
        ]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens; special ones are left out, sentinels appear by name."""
        parts, run = [], []
        for token in until_end(ids, self.stops, self.pad):
            if token < self.base:
                run += [] if token in self.hidden else [token]
            elif token < self.size:  # ids beyond, which a model may have, have no text
                parts += [self.plain(run), sentinel_name(self.size, token)]
                run = []
        return "".join([*parts, self.plain(run)])

    def plain(self, ids: Sequence[int]) -> str:
        with panics_as_errors():
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def description(self) -> dict:
        described: dict[str, Any] = {
            "kind": "tokenizer_json",
            "extra_ids": self.extra_ids,
            "ends": self.ends,
            "eos": self.eos,
            "pad": self.pad,
        }
        described |= describe_stops(self)
        described |= {"origin": self.origin} if self.origin else {}
        return described if self.bos is None else described | {"bos": self.bos}

    def model_bytes(self) -> bytes | None:
        return self.json
