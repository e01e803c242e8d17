# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that a .gguf file carries, as the bytes of a tokenizer.json.

A file has the tokens, their merges or scores, and the name of a pre-tokenizer whose expression is
in llama.cpp's source (llama-vocab.cpp). Where models were trained with what Hugging Face's own
tokenizer.json says, that is followed: SmolLM's digits one by one, Qwen's NFC, Llama 3's words that
are tokens as they stand.
"""

import json
from typing import Any

from t5x_lite.conversion.gguf_file import GgufError

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5

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


def split(expression: str) -> list[dict]:
    """Words by an expression, then bytes."""
    words = {"pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [{"type": "Split", **words}, BYTES | {"use_regex": False}]


# tokenizer.ggml.pre -> the steps before BPE. Without one, GPT-2's.
STEPS = (
    dict.fromkeys((None, "default", "gpt-2", "gpt2", "mpt", "olmo", "jais"), [BYTES])
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), [DIGITS, BYTES])
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), split(LLAMA3))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), split(QWEN2))
    | {"tekken": split(TEKKEN)}
)
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def tokenizer_json(metadata: dict[str, Any], path: Any = "the file") -> bytes:
    """The tokenizer.json of the file's tokenizer.

    Raises:
      GgufError: the file has none, or one of a kind that is not known here.
    """
    read = Read(metadata, path)
    kind = read("model")
    if kind not in ("gpt2", "llama"):
        raise GgufError(f"{path}: tokenizer.ggml.model is {kind!r}; those known are gpt2, llama")
    steps = byte_level(read) if kind == "gpt2" else sentencepiece(read)
    whole = {"version": "1.0", "truncation": None, "padding": None}
    whole |= {"added_tokens": added(read, steps["model"]["vocab"]), "post_processor": None}
    return json.dumps(whole | steps, ensure_ascii=False).encode()


class Read:
    """The fields tokenizer.ggml.* of a file."""

    def __init__(self, metadata: dict[str, Any], path: Any):
        self.metadata, self.path = metadata, path
        self.tokens = self("tokens")
        self.types = self("token_type", [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise GgufError(
                f"{path} is broken: {len(self.tokens)} tokens, {len(self.types)} of token_type"
            )

    def __call__(self, name: str, *default: Any) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in self.metadata and not default:
            raise GgufError(f"{self.path} has no {key}: the file carries no whole tokenizer")
        return self.metadata.get(key, *default)

    def token(self, name: str) -> int | None:
        """The id of a special token, such as eos."""
        found = self(f"{name}_token_id", None)
        if found is not None and found >= len(self.tokens):
            raise GgufError(
                f"{self.path} is broken: {name}_token_id is {found}, of {len(self.tokens)} tokens"
            )
        return found


def byte_level(read: Read) -> dict:
    """BPE over bytes, as GPT-2 began it."""
    pre = read("pre", None)
    if pre not in STEPS:
        raise GgufError(
            f"{read.path}: tokenizer.ggml.pre is {pre!r}, which is not known here; those known "
            f"are {', '.join(name for name in STEPS if name)}"
        )
    vocab = {token: number for number, token in enumerate(read.tokens)}
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
        "merges": known_merges(read, vocab),
    }
    steps = STEPS[pre]
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTES | {"add_prefix_space": True},
        "model": model,
    }


def known_merges(read: Read, vocab: dict[str, int]) -> list[str]:
    """The file's merges, "left right"; GgufError names one that makes no token."""
    found = read("merges")
    for merge in found:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise GgufError(f"{read.path} is broken: the merge {merge!r} makes no token")
    return found


def sentencepiece(read: Read) -> dict:
    """SentencePiece's BPE: the merges follow from the scores, other characters are bytes."""
    gemma = str(read.metadata.get("general.architecture")).startswith("gemma")
    tokens = [spelt(token, kind) for token, kind in zip(read.tokens, read.types, strict=True)]
    # Gemma's scores do not follow its merges, but the order of its tokens does.
    scores = [-number for number in range(len(tokens))] if gemma else read("scores")
    if len(scores) != len(tokens):
        raise GgufError(f"{read.path} is broken: {len(tokens)} tokens, {len(scores)} scores")
    unknown = read.token("unknown")
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
        "merges": merges(tokens, read.types, scores),
    }
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps, back = [blanks], [words, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if read("add_space_prefix", True) and not gemma:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model,
    }


def spelt(token: str, kind: int) -> str:
    """A run of blanks as SentencePiece writes it; llama.cpp keeps those of USER kind as blanks."""
    return "▁" * len(token) if kind == USER and token and not token.strip(" ") else token


def merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every pair of tokens that make a token, best first."""
    known = set(tokens)
    found = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind not in (NORMAL, USER, UNUSED):
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                found.append((-score, -cut, left, right))
    found.sort(key=lambda pair: pair[:2])
    return [[left, right] for _, _, left, right in found]


def added(read: Read, vocab: dict[str, int]) -> list[dict]:
    """Tokens that are found in a text before it is split into words."""
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
        for number, (token, kind) in enumerate(zip(read.tokens, read.types, strict=True))
        if kind in (CONTROL, USER) and vocab.get(token) == number and token
    ]


def begins(metadata: dict[str, Any]) -> bool:
    """Whether a text begins with bos; where the file does not say so, what llama.cpp does."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    default = model == "llama" or pre in WHOLE_WORDS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def stops(read: Read) -> tuple[int, ...]:
    """The ids that end a text: the end of the sequence first, then of a turn and of a message."""
    found = (read.token(name) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))
