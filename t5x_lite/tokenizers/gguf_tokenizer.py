# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a .gguf file, as the bytes of a tokenizer.json.

A file has the tokens, their merges or scores, and the name of a pre-tokenizer whose expression is
in llama.cpp's source (llama-vocab.cpp). Where models were trained with Hugging Face's own
tokenizer.json, that is followed: SmolLM's digits one by one, Qwen's NFC, Llama 3's words that are
tokens as they stand.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from t5x_lite.tokenizers.errors import GgufError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5
# Tokens that llama.cpp's converter adds where a model has more ids than its tokenizer.
PADDING = re.compile(r"\[PAD\d+\]")
T5_SENTINELS = 100

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split_steps(expression: str) -> list[dict]:
    """Steps before BPE: words by an expression, then bytes."""
    words = {"pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [{"type": "Split", **words}, BYTES | {"use_regex": False}]


# tokenizer.ggml.pre -> the steps before BPE. Without one, GPT-2's.
STEPS = (
    dict.fromkeys((None, "default", "gpt-2", "gpt2", "mpt", "olmo", "jais"), [BYTES])
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), [DIGITS, BYTES])
    | dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), split_steps(LLAMA3)
    )
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), split_steps(QWEN2))
    | {"tekken": split_steps(TEKKEN)}
)
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def tokenizer_json(metadata: dict[str, Any], path: Any = "the file") -> bytes:
    """The tokenizer.json of the file's tokenizer.

    Raises:
      GgufError: the file has none, or one of a kind that is not known here.
    """
    fields = GgufTokenizerFields(metadata, path)
    kind = fields("model")
    if kind not in ("gpt2", "llama"):
        raise GgufError(
            f"{path}: tokenizer.ggml.model is {kind!r}; those known are gpt2, llama, t5"
        )
    steps = byte_level_steps(fields) if kind == "gpt2" else sentencepiece_steps(fields)
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    tokens = fields.tokens if kind == "gpt2" else spelled_tokens(fields)
    content |= {
        "added_tokens": list_added_tokens(fields, tokens, steps["model"]["vocab"]),
        "post_processor": None,
    }
    return json.dumps(content | steps, ensure_ascii=False).encode()


class GgufTokenizerFields:
    """Fields tokenizer.ggml.* of a file.

    Attributes:
      tokens: text of every token.
      types: kind of every token, such as CONTROL.
    """

    def __init__(self, metadata: dict[str, Any], path: Any):
        self.metadata, self.path = metadata, path
        self.tokens = self("tokens")
        self.types = self("token_type", [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise GgufError(
                f"{path} is broken: {len(self.tokens)} tokens, {len(self.types)} of token_type"
            )

    def __call__(self, name: str, *default: Any) -> Any:
        """A field, or the default where it is missing; raises GgufError if it has no default."""
        key = f"tokenizer.ggml.{name}"
        if key not in self.metadata and not default:
            raise GgufError(f"{self.path} has no {key}: its tokenizer is incomplete")
        return self.metadata.get(key, *default)

    def token(self, name: str) -> int | None:
        """The id of a special token, such as eos."""
        token = self(f"{name}_token_id", None)
        if token is not None and token >= len(self.tokens):
            raise GgufError(
                f"{self.path} is broken: {name}_token_id is {token}, of {len(self.tokens)} tokens"
            )
        return token


def byte_level_steps(fields: GgufTokenizerFields) -> dict:
    """Parts of a tokenizer.json for BPE over bytes, as GPT-2 has it."""
    pre = fields("pre", None)
    if pre not in STEPS:
        raise GgufError(
            f"{fields.path}: tokenizer.ggml.pre is {pre!r}, which is not known here; those known "
            f"are {', '.join(name for name in STEPS if name)}"
        )
    vocab = {token: number for number, token in enumerate(fields.tokens)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre in WHOLE_WORDS,
        "vocab": vocab,
        "merges": checked_merges(fields, vocab),
    }
    steps = STEPS[pre]
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTES | {"add_prefix_space": True},
        "model": model,
    }


def checked_merges(fields: GgufTokenizerFields, vocab: dict[str, int]) -> list[str]:
    """The file's merges, "left right"; raises GgufError for one whose result is not a token."""
    merges = fields("merges")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise GgufError(f"{fields.path} is broken: the merge {merge!r} makes no token")
    return merges


def sentencepiece_steps(fields: GgufTokenizerFields) -> dict:
    """Parts of a tokenizer.json for SentencePiece's BPE: merges follow from the scores, and
    characters without a token are bytes."""
    gemma = str(fields.metadata.get("general.architecture")).startswith("gemma")
    tokens = spelled_tokens(fields)
    # Gemma's scores do not follow its merges, but the order of its tokens does.
    scores = [-number for number in range(len(tokens))] if gemma else fields("scores")
    if len(scores) != len(tokens):
        raise GgufError(f"{fields.path} is broken: {len(tokens)} tokens, {len(scores)} scores")
    unknown = fields.token("unknown")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges_from_scores(tokens, fields.types, scores),
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps: list[dict[str, Any]] = [spaces]
    back: list[dict[str, Any]] = [words, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if fields("add_space_prefix", True) and not gemma:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model,
    }


def spelled_tokens(fields: GgufTokenizerFields) -> list[str]:
    """Every token as the tokenizer finds it: those of USER kind are matched whole in the text as it
    was written, others after spaces have become ▁. Files write either in either way."""
    return [
        token.replace("▁", " ") if kind == USER else token
        for token, kind in zip(fields.tokens, fields.types, strict=True)
    ]


def merges_from_scores(
    tokens: list[str], types: list[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every pair of tokens that make a token; those of USER kind take part in none.

    Args:
      tokens: text of every token.
      types: kind of every token.
      scores: score of every token.

    Returns:
      Pairs by the score of what they make, best first.
    """
    known = {token for token, kind in zip(tokens, types, strict=True) if kind != USER}
    pairs = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind not in (NORMAL, UNUSED):
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                pairs.append((-score, -cut, left, right))
    pairs.sort(key=lambda pair: pair[:2])
    return [[left, right] for _, _, left, right in pairs]


def list_added_tokens(
    fields: GgufTokenizerFields, tokens: list[str], vocab: dict[str, int]
) -> list[dict]:
    """added_tokens: tokens that are matched in a text, longest first, before it is split.

    Args:
      fields: fields of the file.
      tokens: text of every token.
      vocab: id of every token of the model.
    """
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, fields.types, strict=True))
        if kind in (CONTROL, USER) and vocab.get(token) == number and token
    ]


def unigram_model(fields: GgufTokenizerFields) -> tuple[bytes, int]:
    """The SentencePiece .model that a T5's tokenizer was, and the number of sentinels on top of it.

    Ids that only the model has are left out; where they are enough, they are T5's sentinels, which
    its tokenizer adds.

    Raises:
      GgufError: scores are missing.
    """
    from sentencepiece import sentencepiece_model_pb2

    count = len(fields.tokens)
    while (
        count and fields.types[count - 1] == UNUSED and PADDING.fullmatch(fields.tokens[count - 1])
    ):
        count -= 1
    padding = len(fields.tokens) - count
    scores = fields("scores")
    if len(scores) != len(fields.tokens):
        raise GgufError(
            f"{fields.path} is broken: {len(fields.tokens)} tokens, {len(scores)} scores"
        )
    schema: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = schema.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.trainer_spec.vocab_size = count
    for role, name in (("unk", "unknown"), ("eos", "eos"), ("pad", "padding"), ("bos", "bos")):
        token = fields.token(name)
        if token is not None and token < count:
            setattr(proto.trainer_spec, f"{role}_piece", fields.tokens[token])
    for piece, score, kind in zip(fields.tokens[:count], scores, fields.types, strict=False):
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.normalizer_spec
    spec.add_dummy_prefix = bool(fields("add_space_prefix", True))
    spec.remove_extra_whitespaces = bool(fields("remove_extra_whitespaces", True))
    spec.precompiled_charsmap = bytes(each & 255 for each in fields("precompiled_charsmap", []))
    named = any("<extra_id_0>" in token for token in fields.tokens[:count])
    sentinels = T5_SENTINELS if padding >= T5_SENTINELS and not named else 0
    return proto.SerializeToString(), sentinels


def begins_with_bos(metadata: dict[str, Any]) -> bool:
    """True if a text begins with bos; by llama.cpp's rule where the file does not say."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    default = model == "llama" or pre in WHOLE_WORDS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def stop_tokens(fields: GgufTokenizerFields) -> tuple[int, ...]:
    """The ids that end a text: the end of the sequence first, then of a turn and of a message."""
    tokens = (fields.token(name) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in tokens if token is not None))


def leading_token(fields: GgufTokenizerFields, text: str) -> int | None:
    """The special token that a text begins with, spaces aside; None where it begins otherwise."""
    text, special = text.lstrip(), {}
    for number, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if kind in (CONTROL, USER) and token.strip() and text.startswith(token):
            special[token] = number
    return special[max(special, key=len)] if special else None
