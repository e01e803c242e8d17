# SPDX-License-Identifier: Apache-2.0
"""Vocabularies as the contents of a tokenizer.json: dicts, in the tokenizers library's terms."""

import base64
import json
from collections.abc import Sequence
from typing import Any

from t5x_lite.tokenizers.special_tokens import sentinel_name
from t5x_lite.tokenizers.subwords import parse_proto
from t5x_lite.tokenizers.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    SymbolVocabulary,
)

SPECIAL = ("<pad>", "</s>", "<unk>")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER, UNUSED = 3, 4, 5  # SentencePiece.Type


def tokenizer_content(model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    """A tokenizer.json with this model; `steps` are normalizer, pre_tokenizer, decoder."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    later = dict.fromkeys(("post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], **later, "model": model} | steps


def add_tokens(
    content: dict[str, Any], tokens: Sequence[tuple[int, str]], special: bool = True
) -> None:
    """Marks tokens as ones that a text may name, and adds them where they are new.

    Args:
      content: the tokenizer.json, which is changed.
      tokens: ids and names.
      special: they are special tokens, which decoding may skip.
    """
    known = {each["id"] for each in content["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [
        {"id": token, "content": name, **plain, "special": special}
        for token, name in tokens
        if token not in known
    ]
    content["added_tokens"].sort(key=lambda each: each["id"])


def token_names(content: dict[str, Any]) -> dict[int, str]:
    """The name of every id of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    pairs = (
        vocab.items() if isinstance(vocab, dict) else ((each[0], k) for k, each in enumerate(vocab))
    )
    return {token: name for name, token in pairs} | {
        each["id"]: each["content"] for each in content["added_tokens"]
    }


def surround_texts(content: dict[str, Any], bos: int | None, eos: int | None) -> None:
    """Makes a tokenizer put these ids before and after a text, and nothing else.

    A post-processor that does so already stays as it is.

    Args:
      content: the tokenizer.json, which is changed.
      bos: id before a text; None for none.
      eos: id after a text; None for none.

    Raises:
      ValueError: the tokenizer has no token for an id.
    """
    import tokenizers

    wanted = [[] if token is None else [token] for token in (bos, eos)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    if tokenizer.encode("a").ids == [*wanted[0], *plain, *wanted[1]]:
        return
    known = token_names(content)
    for token in (*wanted[0], *wanted[1]):
        if token not in known:
            raise ValueError(
                f"Texts begin or end with id {token}, which the tokenizer has no token for"
            )
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around = [
        [{"SpecialToken": {"id": known[token], "type_id": 0}} for token in side] for side in wanted
    ]
    single = [*around[0], text, *around[1]]
    second = {"Sequence": {"id": "B", "type_id": 1}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second],
        "special_tokens": {
            known[token]: {"id": known[token], "ids": [token], "tokens": [known[token]]}
            for token in [*wanted[0], *wanted[1]]
        },
    }


def bytes_content(vocabulary: ByteVocabulary) -> dict[str, Any]:
    """Bytes as tokens <0x00> ...: a BPE that has nothing to merge."""
    vocab = dict(zip(SPECIAL, range(3), strict=True))
    vocab |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    content = tokenizer_content(
        bpe_model(vocab, [], "<unk>"), decoder={"type": "Sequence", "decoders": BYTES}
    )
    add_tokens(content, list(enumerate(SPECIAL)))
    names = vocabulary.named.names
    tops = range(259, vocabulary.size)
    add_tokens(content, [(k, names.get(k) or sentinel_name(vocabulary.size, k)) for k in tops])
    return content


BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]
SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def bpe_model(vocab: dict[str, int], merges: list[list[str]], unknown: str) -> dict[str, Any]:
    """SentencePiece's BPE: characters without a token are bytes if there are such tokens.

    Args:
      vocab: id of every token.
      merges: pairs of tokens, best first.
      unknown: token for characters without one.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": "<0x00>" in vocab,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def symbols_content(vocabulary: SymbolVocabulary, joined: str | None = None) -> dict[str, Any]:
    """A tokenizer.json of words from a list: texts between separators, or single characters.

    Args:
      vocabulary: the vocabulary.
      joined: text between symbols in decoded text; None for the vocabulary's own separator.

    Raises:
      ValueError: such a tokenizer cannot have these symbols or the separator.
    """
    joined = vocabulary.separator if joined is None else joined
    if joined not in ("", " "):
        raise ValueError(
            f"Symbols joined by {joined!r}: a tokenizer.json writes symbols between spaces or "
            "without anything between them"
        )
    reserved = [*SPECIAL, *(sentinel_name(k, 0) for k in range(1, vocabulary.sentinels + 1))]
    taken = sorted(set(reserved) & set(vocabulary.symbols))
    if taken:
        raise ValueError(f"Symbols named {', '.join(taken)} are special tokens of a tokenizer.json")
    vocab = {name: token for token, name in enumerate([*SPECIAL, *vocabulary.symbols])}
    separator = vocabulary.separator
    # Without a separator, every character, the end of a line too.
    pattern = {"String": separator} if separator else {"Regex": "[\\s\\S]"}
    behavior = "Removed" if separator else "Isolated"
    split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    # The library joins with spaces unless there is a decoder.
    content = tokenizer_content(
        model, pre_tokenizer=split, decoder=None if joined else {"type": "Fuse"}
    )
    add_tokens(content, list(enumerate(SPECIAL)))
    size, count = vocabulary.size, vocabulary.sentinels
    add_tokens(
        content, [(token, sentinel_name(size, token)) for token in range(size - count, size)]
    )
    return content


def is_t5_tokenizer(vocabulary: SentencePieceVocabulary) -> bool:
    """True if transformers' T5Tokenizer, which has its own steps, gives the model's ids."""
    proto = parse_proto(vocabulary.model)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    return (
        trainer.model_type == UNIGRAM
        and not any(piece.type == 6 for piece in proto.pieces)  # bytes
        and normalizer.add_dummy_prefix
        and normalizer.remove_extra_whitespaces
        and "nmt" in normalizer.name
        and [piece.piece for piece in proto.pieces[:3]] == list(SPECIAL)
        and not vocabulary.prefix_once
    )


def sentencepiece_content(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """A SentencePiece model as a tokenizer.json.

    Raises:
      ValueError: it is a model of words or characters, which the tokenizers library does not have.
    """
    proto = parse_proto(vocabulary.model)
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE):
        raise ValueError(
            "The SentencePiece model is of words or characters; a tokenizer.json has unigram and "
            "bpe only"
        )
    size = vocabulary.base
    extra = range(size - vocabulary.extra_ids, size)
    tokens = [(piece.piece, piece.score) for piece in proto.pieces]
    tokens += [(sentinel_name(size, token), 0.0) for token in extra]
    tokens = [(plain_name(name), score) for name, score in tokens]
    if kind == UNIGRAM:
        model = {
            "type": "Unigram",
            "unk_id": proto.trainer_spec.unk_id,
            "vocab": [list(token) for token in tokens],
            "byte_fallback": proto.trainer_spec.byte_fallback,
        }
    else:
        unknown = tokens[proto.trainer_spec.unk_id][0]
        vocab = {name: token for token, (name, _) in enumerate(tokens)}
        model = bpe_model(vocab, sentencepiece_merges(proto), unknown)
    content = tokenizer_content(model, **text_steps(proto.normalizer_spec, vocabulary.prefix_once))
    for token, piece in enumerate(proto.pieces):
        if piece.type in (CONTROL, USER):
            add_tokens(content, [(token, tokens[token][0])], special=piece.type == CONTROL)
    add_tokens(content, [(token, sentinel_name(size, token)) for token in extra])
    add_tokens(content, sorted((token, name) for name, token in vocabulary.named.ids.items()))
    return content


def plain_name(name: str) -> str:
    """A sentinel's name without the space that SentencePiece models may put before it."""
    return name.removeprefix("▁") if name.startswith("▁<extra_id_") else name


def sentencepiece_merges(proto: Any) -> list[list[str]]:
    """Every pair of pieces whose concatenation is a piece, best first."""
    usable = [piece for piece in proto.pieces if piece.type not in (CONTROL, USER, UNUSED)]
    known = {piece.piece for piece in usable}
    pairs = []
    for piece in usable:
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in known and right in known:
                pairs.append((-piece.score, left, right))
    pairs.sort(key=lambda pair: pair[0])
    return [[left, right] for _, left, right in pairs]


def text_steps(normalizer: Any, prefix_once: bool) -> dict[str, Any]:
    """Steps of a SentencePiece model before a text is split, and from pieces back to a text.

    Args:
      normalizer: its normalizer_spec.
      prefix_once: only the first of several runs begins with a space.
    """
    before: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode()
        before.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer.remove_extra_whitespaces:
        several = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        before += [several, {"type": "Strip", "strip_left": True, "strip_right": True}]
    if normalizer.add_dummy_prefix and not prefix_once:
        before.append({"type": "Prepend", "prepend": "▁"})
    before.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    after = [SPACES, *BYTES]
    if normalizer.add_dummy_prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps: dict[str, Any] = {
        "normalizer": {"type": "Sequence", "normalizers": before},
        "decoder": {"type": "Sequence", "decoders": after},
    }
    if prefix_once:
        metaspace = {"replacement": "▁", "prepend_scheme": "first", "split": False}
        steps["pre_tokenizer"] = {"type": "Metaspace", **metaspace}
    return steps
