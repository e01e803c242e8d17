# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a Hugging Face folder as one of our vocabularies, and what its models begin and
end with. `tokenizer_files` writes one."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.conversion.sources import naming
from t5x_lite.conversion.tokenizer_files import Start as Start
from t5x_lite.conversion.tokenizer_files import write as write
from t5x_lite.conversion.tokenizer_files import write_pair as write_pair
from t5x_lite.conversion.tokenizer_settings import ENCODER_DECODERS, NAMES, Settings, read_settings
from t5x_lite.conversion.tokenizer_settings import read_json as read_json
from t5x_lite.data import vocabularies
from t5x_lite.data.special_tokens import count_sentinels, size_of
from t5x_lite.data.vocabularies import Bytes, SentencePiece, TokenizerJson, Vocabulary

PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.model")


class Ends(NamedTuple):
    """Where a model's sequences begin and end.

    `start` begins a decoder's input, or is what a lone decoder's text may begin with (then
    `starts_prompts` says whether the tokenizer puts it there). Any of `stops` ends what is written.
    """

    start: int | None
    starts_prompts: bool
    stops: tuple[int, ...]
    pad: int | None


def read(folder: str | Path) -> tuple[Vocabulary, Ends]:
    """The vocabulary of a Hugging Face folder, and the ends of its model's sequences.

    tokenizer.json is preferred, then a SentencePiece model, then vocab.json with merges.txt; ByT5
    has no file. The vocabulary `ends` where the tokenizer itself puts eos after a text.

    Raises:
      ValueError: the folder has no tokenizer, or one that is not understood.
    """
    settings = read_settings(Path(folder))
    with naming(settings.folder, "its tokenizer"):
        return understood(settings)


def understood(settings: Settings) -> tuple[Vocabulary, Ends]:
    vocabulary, lookup, adds = opened(settings)
    named = {role: settings.name(role) for role in NAMES}
    ids = {role: None if name is None else lookup(name) for role, name in named.items()}
    stops = all_stops(settings, ids["eos_token"])
    roles = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
    check(settings, vocabulary, {role: settings.tokens(role) for role in roles})
    check(settings, vocabulary, {"eos_token_id": stops})
    if ids["eos_token"] is None and not stops:
        raise ValueError(
            f"{settings.folder} does not say what ends a text: put eos_token into "
            "tokenizer_config.json or eos_token_id into generation_config.json"
        )
    vocabulary.eos = stops[0] if ids["eos_token"] is None else ids["eos_token"]
    vocabulary.stops = stops
    pad = first(ids["pad_token"], settings.token("pad_token_id"))
    vocabulary.pad = vocabulary.eos if pad is None else pad
    bos = first(ids["bos_token"], settings.token("bos_token_id"))
    starts, vocabulary.ends = adds(bos, vocabulary.eos)
    if not settings.encodes:
        return vocabulary, Ends(bos, starts, stops, pad)
    vocabulary.bos = bos if starts else None
    start = first(settings.token("decoder_start_token_id"), bos, pad)
    return vocabulary, Ends(start, True, stops, pad)


def pair(vocabulary: Vocabulary) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) of a run: targets end with eos, whatever inputs do."""
    if vocabulary.ends and vocabulary.bos is None:
        return vocabulary, vocabulary
    options = vocabulary.description() | {"ends": True}
    options.pop("bos", None)
    made = vocabularies.make(json.dumps(options, ensure_ascii=False), vocabulary.model())
    return vocabulary, made


def first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def all_stops(settings: Settings, eos: int | None) -> tuple[int, ...]:
    """Every id that ends a text, the tokenizer's own eos first."""
    own = [] if eos is None else [eos]
    return tuple(dict.fromkeys([*own, *settings.tokens("eos_token_id")]))


def check(settings: Settings, vocabulary: Vocabulary, found: dict[str, Sequence[int]]) -> None:
    """ValueError for ids that there are not."""
    most = max(vocabulary.size, settings.ids or 0)
    for role, tokens in found.items():
        for token in tokens:
            if token >= most:
                raise ValueError(
                    f"{settings.folder}: {role} has {token}, which is none of the {most} ids; "
                    "mend generation_config.json or config.json"
                )


# What `adds` of an opened tokenizer answers: whether bos goes before a text, and eos after it.
Adds = Callable[[int | None, int], tuple[bool, bool]]
Opened = tuple[Vocabulary, Callable[[str], int | None], Adds]


def opened(settings: Settings) -> Opened:
    """The vocabulary, its ids by name, and what its tokenizer puts around a text."""
    folder = settings.folder
    if settings.kind == "ByT5Tokenizer":
        return open_bytes(settings)
    if (folder / "tokenizer.json").exists():
        return open_json(settings, (folder / "tokenizer.json").read_bytes())
    for name in PIECES:
        if (folder / name).exists():
            return open_pieces(settings, folder / name)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return open_json(settings, from_merges(settings))
    if settings.model.get("model_type") in ("byt5",):
        return open_bytes(settings)
    raise ValueError(
        f"No tokenizer in {folder}: it has neither tokenizer.json nor {', '.join(PIECES)}, nor "
        "vocab.json with merges.txt. Put the one that the model was trained with there"
    )


def flags(settings: Settings, bos: bool, eos: bool) -> tuple[bool, bool]:
    """add_bos_token and add_eos_token, or what the tokenizer's class does without them."""
    told = settings.tokenizer
    return bool(told.get("add_bos_token", bos)), bool(told.get("add_eos_token", eos))


def open_bytes(settings: Settings) -> Opened:
    """ByT5: bytes, and names that its tokenizer reads as one id, from 259 up as they are listed."""
    named = {each["content"]: token for token, each in settings.added_tokens().items()}
    names = [name for name in settings.extra_tokens() if name not in named]
    if not named and not names:
        names = [f"<extra_id_{k}>" for k in range(settings.extra_ids(125))]
    named = {"<pad>": 0, "</s>": 1, "<unk>": 2} | named
    after = max(259, 1 + max(named.values()))
    named |= {name: token for token, name in enumerate(names, after)}
    settings.tokenizer.setdefault("eos_token", "</s>")
    settings.tokenizer.setdefault("pad_token", "<pad>")
    return Bytes(named=named), named.get, lambda bos, eos: (False, True)


def open_json(settings: Settings, text: bytes) -> Opened:
    """A tokenizer.json; tokens that only the settings add are written into it."""
    import tokenizers

    path = settings.folder / "tokenizer.json"
    try:
        made = tokenizers.Tokenizer.from_buffer(text)
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer ({error}): download it again") from error
    size_of(made)
    missing = list(not_there(settings, made))
    for token, each in missing:
        made.add_tokens([tokenizers.AddedToken(**each)])
        if made.token_to_id(each["content"]) != token:
            raise ValueError(
                f"{path} has no id {token} ({each['content']!r}), which tokenizer_config.json "
                "adds, and it is not the next free one: the two files do not belong together"
            )
    text = made.to_str().encode() if missing else text
    if settings.ids is not None and made.get_vocab_size() > settings.ids:
        text = within(text, settings.ids)
    vocabulary = TokenizerJson(text, eos=-1, pad=-1)
    return vocabulary, made.token_to_id, lambda bos, eos: around(settings, made, bos, eos)


def within(text: bytes, ids: int) -> bytes:
    """A tokenizer.json without added tokens from id `ids` on, which the model has no weights for.

    Gemma 3's tokenizer has a token for images that its smallest model, which sees none, lacks.
    """
    told = json.loads(text)
    told["added_tokens"] = [each for each in told["added_tokens"] if each["id"] < ids]
    return json.dumps(told, ensure_ascii=False).encode()


def not_there(settings: Settings, tokenizer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Added tokens that the tokenizer lacks, lowest id first."""
    for token, each in settings.added_tokens().items():
        if tokenizer.token_to_id(each["content"]) is None:
            yield token, each


def around(settings: Settings, tokenizer: Any, bos: int | None, eos: int) -> tuple[bool, bool]:
    """Whether bos and eos are put around a text: as the flags tell, else the post-processor."""
    told = settings.tokenizer
    if settings.kind != "T5Tokenizer" and ("add_bos_token" in told or "add_eos_token" in told):
        before, after = flags(settings, False, False)
        return before and bos is not None, after
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    at = next(k for k in range(len(whole) + 1) if whole[k : k + len(plain)] == plain)
    before, after = whole[:at], whole[at + len(plain) :]
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise ValueError(
            f"{settings.folder}: the tokenizer puts ids {before} before a text and {after} after "
            f"it, but bos is {bos} and eos {eos}; anything else is not supported"
        )
    return bool(before), bool(after)


def open_pieces(settings: Settings, path: Path) -> Opened:
    """A SentencePiece model, with T5's sentinels on top and names in a text as the settings say."""
    import sentencepiece

    model = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: download it again") from error
    kind, size = settings.kind, processor.get_piece_size()
    t5 = kind == "T5Tokenizer" or (
        not kind and settings.model.get("model_type") in ENCODER_DECODERS
    )
    own = count_sentinels(size, processor.id_to_piece)
    extra = settings.extra_ids(100) if t5 and not own else 0
    roles = ("bos", "eos", "pad", "unk")
    for role in roles:
        token = getattr(processor, f"{role}_id")()
        if token >= 0:
            settings.tokenizer.setdefault(f"{role}_token", processor.id_to_piece(token))
    named = names_of(settings, processor, extra)
    vocabulary = SentencePiece(
        model,
        extra_ids=extra,
        eos=max(processor.eos_id(), 0),
        named=named,
        prefix_once=kind == "LlamaTokenizer" and not settings.tokenizer.get("legacy", False),
    )
    before, after = flags(settings, bos=not t5, eos=t5)
    return vocabulary, named.get, lambda bos, eos: (before and bos is not None, after)


def names_of(settings: Settings, processor: Any, extra: int) -> dict[str, int]:
    """The names that a text may contain: special tokens, added ones and sentinels."""
    size = processor.get_piece_size()
    named = {f"<extra_id_{k}>": size + extra - 1 - k for k in range(extra)}
    for k in range(count_sentinels(size, processor.id_to_piece)):
        named[f"<extra_id_{k}>"] = size - 1 - k
    for name in [*map(settings.name, NAMES), *settings.extra_tokens()]:
        if name is not None and name not in named:
            token = processor.piece_to_id(name)
            if processor.id_to_piece(token) == name:
                named[name] = token
    named |= {each["content"]: token for token, each in settings.added_tokens().items()}
    return named


def from_merges(settings: Settings) -> bytes:
    """GPT-2's vocab.json and merges.txt as a tokenizer.json: BPE over bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    folder = settings.folder
    if settings.kind not in ("", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizer"):
        raise ValueError(
            f"{folder}: vocab.json with merges.txt says too little about a {settings.kind}; get "
            "its tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    blank = bool(settings.tokenizer.get("add_prefix_space", False))
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises its bare Exception for a file it cannot read
        raise ValueError(f"{folder}: vocab.json and merges.txt: {error}") from error
    made = tokenizers.Tokenizer(bpe)
    size_of(made)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    if settings.kind == "Qwen2Tokenizer":
        from t5x_lite.conversion.gguf_tokenizer import QWEN2

        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    for role in ("bos_token", "eos_token", "unk_token"):
        settings.tokenizer.setdefault(role, "<|endoftext|>")
    names = [*map(settings.name, NAMES), *settings.extra_tokens()]
    known = [name for name in dict.fromkeys(names) if name and made.token_to_id(name) is not None]
    made.add_special_tokens(known)
    return made.to_str().encode()
