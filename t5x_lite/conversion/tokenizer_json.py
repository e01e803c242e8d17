# SPDX-License-Identifier: Apache-2.0
"""Vocabularies as the contents of a tokenizer.json: dicts, in the tokenizers library's terms."""

import base64
import json
from collections.abc import Sequence
from typing import Any

from t5x_lite.data.special_tokens import sentinel_name
from t5x_lite.data.vocabularies import Bytes, SentencePiece, Symbols

SPECIAL = ("<pad>", "</s>", "<unk>")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER, UNUSED = 3, 4, 5  # SentencePiece.Type


def whole(model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    """A tokenizer.json with this model; steps are normalizer, pre_tokenizer, decoder."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    later = dict.fromkeys(("post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], **later, "model": model} | steps


def add(made: dict[str, Any], tokens: Sequence[tuple[int, str]], special: bool = True) -> None:
    """Marks ids and names as tokens that a text may name, adding them where they are new."""
    known = {each["id"] for each in made["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    made["added_tokens"] += [
        {"id": token, "content": name, **plain, "special": special}
        for token, name in tokens
        if token not in known
    ]
    made["added_tokens"].sort(key=lambda each: each["id"])


def names(made: dict[str, Any]) -> dict[int, str]:
    """The name of every id."""
    vocab = made["model"]["vocab"]
    pairs = (
        vocab.items() if isinstance(vocab, dict) else ((each[0], k) for k, each in enumerate(vocab))
    )
    return {token: name for name, token in pairs} | {
        each["id"]: each["content"] for each in made["added_tokens"]
    }


def surround(made: dict[str, Any], bos: int | None, eos: int | None) -> None:
    """Makes the tokenizer put these ids before and after a text, and nothing else.

    A post-processor that does so already stays as it is.

    Raises ValueError for an id that the tokenizer has no token for.
    """

    import tokenizers

    wanted = [[] if token is None else [token] for token in (bos, eos)]
    found = tokenizers.Tokenizer.from_str(json.dumps(made))
    plain = found.encode("a", add_special_tokens=False).ids
    if found.encode("a").ids == [*wanted[0], *plain, *wanted[1]]:
        return
    known = names(made)
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
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second],
        "special_tokens": {
            known[token]: {"id": known[token], "ids": [token], "tokens": [known[token]]}
            for token in [*wanted[0], *wanted[1]]
        },
    }


def of_bytes(vocabulary: Bytes) -> dict[str, Any]:
    """Bytes as tokens <0x00> ...: a BPE that has nothing to merge."""
    vocab = dict(zip(SPECIAL, range(3), strict=True))
    vocab |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    made = whole(bpe(vocab, [], "<unk>"), decoder={"type": "Sequence", "decoders": BYTES})
    add(made, list(enumerate(SPECIAL)))
    names = vocabulary.named.names
    tops = range(259, vocabulary.size)
    add(made, [(k, names.get(k) or sentinel_name(vocabulary.size, k)) for k in tops])
    return made


BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]
BLANKS = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def bpe(vocab: dict[str, int], merges: list[list[str]], unknown: str) -> dict[str, Any]:
    """SentencePiece's BPE: characters without a token are bytes if there are such tokens."""
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


def of_symbols(vocabulary: Symbols, joined: str | None = None) -> dict[str, Any]:
    """Words from a list: what stands between separators, or each character where there is none.

    Raises ValueError for symbols or a separator that such a tokenizer cannot have.
    """
    joined = vocabulary.separator if joined is None else joined
    if joined not in ("", " "):
        raise ValueError(
            f"Symbols joined by {joined!r}: a tokenizer.json writes symbols between blanks or "
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
    # The library joins with blanks unless a decoder says otherwise.
    made = whole(model, pre_tokenizer=split, decoder=None if joined else {"type": "Fuse"})
    add(made, list(enumerate(SPECIAL)))
    size, count = vocabulary.size, vocabulary.sentinels
    add(made, [(token, sentinel_name(size, token)) for token in range(size - count, size)])
    return made


def proto_of(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as schema

    return schema.ModelProto.FromString(model)


def like_t5(vocabulary: SentencePiece) -> bool:
    """Whether transformers' T5Tokenizer, which builds its own steps, gives the model's ids."""
    proto = proto_of(vocabulary.pieces)
    how, kind = proto.normalizer_spec, proto.trainer_spec
    return (
        kind.model_type == UNIGRAM
        and not any(piece.type == 6 for piece in proto.pieces)  # bytes
        and how.add_dummy_prefix
        and how.remove_extra_whitespaces
        and "nmt" in how.name
        and [piece.piece for piece in proto.pieces[:3]] == list(SPECIAL)
        and not vocabulary.prefix_once
    )


def of_pieces(vocabulary: SentencePiece) -> dict[str, Any]:
    """A SentencePiece model in the tokenizers library's terms.

    Raises ValueError for a model of words or characters, which that library does not have.
    """
    proto = proto_of(vocabulary.pieces)
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
    tokens = [(named_plainly(name), score) for name, score in tokens]
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
        model = bpe(vocab, merges(proto), unknown)
    made = whole(model, **steps(proto.normalizer_spec, vocabulary.prefix_once))
    for token, piece in enumerate(proto.pieces):
        if piece.type in (CONTROL, USER):
            add(made, [(token, tokens[token][0])], special=piece.type == CONTROL)
    add(made, [(token, sentinel_name(size, token)) for token in extra])
    add(made, sorted((token, name) for name, token in vocabulary.named.ids.items()))
    return made


def named_plainly(name: str) -> str:
    """A sentinel's name without the blank that SentencePiece models may put before it."""
    return name.removeprefix("▁") if name.startswith("▁<extra_id_") else name


def merges(proto: Any) -> list[list[str]]:
    """Every pair of pieces that make a piece, best first."""
    usable = [piece for piece in proto.pieces if piece.type not in (CONTROL, USER, UNUSED)]
    known = {piece.piece for piece in usable}
    found = []
    for piece in usable:
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in known and right in known:
                found.append((-piece.score, left, right))
    found.sort(key=lambda pair: pair[0])
    return [[left, right] for _, left, right in found]


def steps(how: Any, prefix_once: bool) -> dict[str, Any]:
    """What a SentencePiece model does to a text before it is split, and to pieces after."""
    before = []
    if how.precompiled_charsmap:
        charsmap = base64.b64encode(how.precompiled_charsmap).decode()
        before.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if how.remove_extra_whitespaces:
        several = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        before += [several, {"type": "Strip", "strip_left": True, "strip_right": True}]
    if how.add_dummy_prefix and not prefix_once:
        before.append({"type": "Prepend", "prepend": "▁"})
    before.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    after = [BLANKS, *BYTES]
    if how.add_dummy_prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    made: dict[str, Any] = {
        "normalizer": {"type": "Sequence", "normalizers": before},
        "decoder": {"type": "Sequence", "decoders": after},
    }
    if prefix_once:
        blank = {"replacement": "▁", "prepend_scheme": "first", "split": False}
        made["pre_tokenizer"] = {"type": "Metaspace", **blank}
    return made
