# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a Hugging Face folder as a vocabulary of ours, and the ends of its sequences.

`tokenizer_files` writes such a tokenizer.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.tokenizers import renumbered, vocabularies
from t5x_lite.tokenizers.errors import naming_path
from t5x_lite.tokenizers.fast_tokenizers import (
    drop_tokens_from,
    load_fast_tokenizer,
    tokenizer_size,
)
from t5x_lite.tokenizers.special_tokens import (
    find_piece,
    find_sentinels,
    sentinel_names,
    top_ids,
)
from t5x_lite.tokenizers.tokenizer_files import StartToken as StartToken
from t5x_lite.tokenizers.tokenizer_files import write_tokenizer as write_tokenizer
from t5x_lite.tokenizers.tokenizer_files import write_tokenizers as write_tokenizers
from t5x_lite.tokenizers.tokenizer_settings import (
    ENCODER_DECODERS,
    NAMES,
    TokenizerSettings,
    read_tokenizer_settings,
)
from t5x_lite.tokenizers.tokenizer_settings import read_optional_json as read_optional_json
from t5x_lite.tokenizers.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerJsonVocabulary,
)
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.bounded_files import check_regular

# Fields of tokenizer_config.json that a vocabulary or another file holds, or that name files.
NOT_KEPT = (
    "add_bos_token",
    "add_eos_token",
    "added_tokens_decoder",
    "auto_map",
    "chat_template",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
)
# Of a tokenizer's file; the largest that are published have 35 MB.
MOST_BYTES = 2**28
BARTS = ("BartTokenizer", "RobertaTokenizer")
BYTE_LEVEL = ("", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizer", *BARTS)
PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.model")


class SequenceEnds(NamedTuple):
    """Tokens that begin and end a model's sequences.

    Attributes:
      start: id that begins a decoder's input; of a decoder-only model, that may begin a text.
      add_bos: the tokenizer puts `start` before a text.
      stops: ids of which any ends what a model writes.
      pad: id of padding; None without one.
    """

    start: int | None
    add_bos: bool
    stops: tuple[int, ...]
    pad: int | None


def read_tokenizer(
    folder: str | Path, targets: bool = False
) -> tuple[TextVocabulary, SequenceEnds]:
    """Reads the vocabulary of a Hugging Face folder, and the ends of its model's sequences.

    `targets` takes that of the targets where the folder has two (Marian).
    tokenizer.json is preferred, then SentencePiece, then vocab.json with merges.txt; ByT5 has no
    file. The vocabulary `ends` where the tokenizer itself puts eos after a text.

    Raises:
      ValueError: the folder has no tokenizer, or one that is not understood.
    """
    settings = read_tokenizer_settings(Path(folder))._replace(targets=targets)
    with naming_path(settings.folder, "its tokenizer"):
        return interpret_settings(settings)


def interpret_settings(settings: TokenizerSettings) -> tuple[TextVocabulary, SequenceEnds]:
    """`read_tokenizer`, with errors of any class for broken files."""
    vocabulary: Any
    vocabulary, lookup, added_ends = open_tokenizer(settings)
    named = {role: settings.name(role) for role in NAMES}
    ids = {role: None if name is None else lookup(name) for role, name in named.items()}
    stops = all_stop_tokens(settings, ids["eos_token"])
    roles = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "eos_token_id")
    check_special_ids(settings, vocabulary, {role: settings.tokens(role) for role in roles})
    if ids["eos_token"] is None and not stops:
        raise ValueError(
            f"{settings.folder} does not say what ends a text: put eos_token into "
            "tokenizer_config.json or eos_token_id into generation_config.json"
        )
    vocabulary.eos = stops[0] if ids["eos_token"] is None else ids["eos_token"]
    vocabulary.stops = stops
    pad = first_known(ids["pad_token"], settings.token("pad_token_id"))
    vocabulary.pad = vocabulary.eos if pad is None else pad
    bos = first_known(ids["bos_token"], settings.token("bos_token_id"))
    before, vocabulary.ends = added_ends(bos, vocabulary.eos)
    if isinstance(vocabulary, TokenizerJsonVocabulary):
        kept = {k: v for k, v in settings.tokenizer.items() if k not in NOT_KEPT}
        vocabulary.origin = kept
    if not settings.encodes:
        return vocabulary, SequenceEnds(bos, before is not None, stops, pad)
    vocabulary.bos = before
    start = first_known(settings.token("decoder_start_token_id"), bos, pad)
    return vocabulary, SequenceEnds(start, True, stops, pad)


def vocabulary_pair(vocabulary: TextVocabulary) -> tuple[TextVocabulary, TextVocabulary]:
    """The vocabularies (inputs, targets) of a run: targets end with eos, whatever inputs do."""
    if vocabulary.ends and vocabulary.bos is None:
        return vocabulary, vocabulary
    options = vocabulary.description() | {"ends": True}
    options.pop("bos", None)
    targets = vocabularies.build_vocabulary(
        json.dumps(options, ensure_ascii=False), vocabulary.model_bytes()
    )
    return vocabulary, targets


def first_known(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def all_stop_tokens(settings: TokenizerSettings, eos: int | None) -> tuple[int, ...]:
    """Every id that ends a text, the tokenizer's own eos first."""
    first = [] if eos is None else [eos]
    return tuple(dict.fromkeys([*first, *settings.tokens("eos_token_id")]))


def check_special_ids(
    settings: TokenizerSettings, vocabulary: TextVocabulary, ids: dict[str, Sequence[int]]
) -> None:
    """Checks that ids of the settings are ids of the vocabulary or of the model.

    Args:
      settings: settings of the folder.
      vocabulary: its vocabulary.
      ids: ids by the name of their field.

    Raises:
      ValueError: an id is too large.
    """
    most = max(vocabulary.size, settings.ids or 0)
    for role, tokens in ids.items():
        for token in tokens:
            if token >= most:
                raise ValueError(
                    f"{settings.folder}: {role} has {token}, which is none of the {most} ids; "
                    "fix generation_config.json or config.json"
                )


# Given ids of bos and eos: the id that goes before a text, and True if eos goes after it.
AddedEnds = Callable[[int | None, int], tuple[int | None, bool]]
# The special ids of the vocabulary are set afterwards.
OpenedTokenizer = tuple[Any, Callable[[str], int | None], AddedEnds]


def open_tokenizer(settings: TokenizerSettings) -> OpenedTokenizer:
    """Opens the tokenizer: the vocabulary, its ids by name, and the ends put around a text."""
    folder = settings.folder
    renumbered.check_languages(settings)
    if settings.kind == "ByT5Tokenizer":
        return open_bytes(settings)
    path = folder / "tokenizer.json"
    if path.exists():
        check_regular(path, MOST_BYTES)
        return open_json(settings, path.read_bytes())
    if renumbered.tokenizer_class(settings):
        return renumbered.open_renumbered(settings)
    for name in PIECES:
        if (folder / name).exists():
            check_regular(folder / name, MOST_BYTES)
            return open_sentencepiece(settings, folder / name)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return open_json(settings, json_from_merges(settings))
    if settings.model.get("model_type") in ("byt5",):
        return open_bytes(settings)
    raise ValueError(
        f"No tokenizer in {folder}: it has neither tokenizer.json nor {', '.join(PIECES)}, nor "
        "vocab.json with merges.txt. Put the one that the model was trained with there"
    )


def end_flags(settings: TokenizerSettings, bos: bool, eos: bool) -> tuple[bool, bool]:
    """The flags add_bos_token and add_eos_token.

    Args:
      settings: settings of the folder.
      bos: default of the tokenizer's class for add_bos_token.
      eos: default of the tokenizer's class for add_eos_token.
    """
    flags = settings.tokenizer
    return bool(flags.get("add_bos_token", bos)), bool(flags.get("add_eos_token", eos))


def open_bytes(settings: TokenizerSettings) -> OpenedTokenizer:
    """Opens ByT5's: bytes, and names of one id each, from 259 up in the order of the list."""
    named = {each["content"]: token for token, each in settings.added_tokens().items()}
    names = [name for name in settings.extra_tokens() if name not in named]
    if not named and not names:
        names = [f"<extra_id_{k}>" for k in range(settings.extra_ids(125))]
    named = {"<pad>": 0, "</s>": 1, "<unk>": 2} | named
    after = max(259, 1 + max(named.values()))
    named |= {name: token for token, name in enumerate(names, after)}
    settings.tokenizer.setdefault("eos_token", "</s>")
    settings.tokenizer.setdefault("pad_token", "<pad>")
    return ByteVocabulary(named=named), named.get, lambda bos, eos: (None, True)


def open_json(settings: TokenizerSettings, text: bytes) -> OpenedTokenizer:
    """Opens a tokenizer.json; tokens that only the settings add are written into it."""
    import tokenizers

    path = settings.folder / "tokenizer.json"
    try:
        tokenizer = load_fast_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer ({error}): download it again") from error
    missing = list(missing_tokens(settings, tokenizer))
    for token, each in missing:
        tokenizer.add_tokens([tokenizers.AddedToken(**each)])
        if tokenizer.token_to_id(each["content"]) != token:
            raise ValueError(
                f"{path} has no id {token} ({each['content']!r}), which tokenizer_config.json "
                "adds, and it is not the next free one: the two files do not belong together"
            )
    text = tokenizer.to_str().encode() if missing else text
    if settings.ids is not None and tokenizer.get_vocab_size() > settings.ids:
        text = drop_tokens_from(text, settings.ids)
    vocabulary = TokenizerJsonVocabulary(text, eos=-1, pad=-1)
    return (
        vocabulary,
        tokenizer.token_to_id,
        lambda bos, eos: ends_around_text(settings, tokenizer, bos, eos),
    )


def missing_tokens(
    settings: TokenizerSettings, tokenizer: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Added tokens that the tokenizer lacks, lowest id first."""
    for token, each in settings.added_tokens().items():
        if tokenizer.token_to_id(each["content"]) is None:
            yield token, each


def ends_around_text(
    settings: TokenizerSettings, tokenizer: Any, bos: int | None, eos: int
) -> tuple[int | None, bool]:
    """Tokens around a text, as transformers puts them there.

    The post-processor of a tokenizer.json decides; the flags add_bos_token and add_eos_token, only
    where the tokenizer is built from vocab.json with merges.txt.

    Args:
      settings: settings of the folder.
      tokenizer: the tokenizers.Tokenizer.
      bos: id of bos; None without one.
      eos: id of eos.

    Returns:
      The id before a text, bos or in an encoder-decoder a language's; True if eos goes after it.

    Raises:
      ValueError: other ids are put around it.
    """
    if settings.kind == "GPTNeoXTokenizer":
        return None, False  # this class of transformers writes a post-processor of its own
    if settings.kind == "NllbTokenizer":  # and so does this one, whatever an older file has
        language = settings.tokenizer.get("src_lang") or "eng_Latn"
        return renumbered.language_token(tokenizer.get_vocab(), language), True
    if not (settings.folder / "tokenizer.json").exists():
        before, after = end_flags(settings, settings.kind in BARTS, settings.kind in BARTS)
        return bos if before else None, after
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    begin = next(k for k in range(len(ids) + 1) if ids[k : k + len(plain)] == plain)
    before, after = ids[:begin], ids[begin + len(plain) :]
    language = settings.encodes and len(before) == 1
    if (before not in ([], [bos]) and not language) or after not in ([], [eos]):
        raise ValueError(
            f"{settings.folder}: the tokenizer puts ids {before} before a text and {after} after "
            f"it, but bos is {bos} and eos {eos}; anything else is not supported"
        )
    return before[0] if before else None, bool(after)


def open_sentencepiece(settings: TokenizerSettings, path: Path) -> OpenedTokenizer:
    """Opens a SentencePiece model, with T5's sentinels on top and the settings' named tokens."""
    import sentencepiece

    model = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model: download it again") from error
    kind = settings.kind
    t5 = kind == "T5Tokenizer" or (
        not kind and settings.model.get("model_type") in ENCODER_DECODERS
    )
    has_sentinels = find_piece(processor, "<extra_id_0>") is not None
    extra = settings.extra_ids(100) if t5 and not has_sentinels else 0
    roles = ("bos", "eos", "pad", "unk")
    for role in roles:
        token = getattr(processor, f"{role}_id")()
        if token >= 0:
            settings.tokenizer.setdefault(f"{role}_token", processor.id_to_piece(token))
    named = named_tokens(settings, processor, extra)
    vocabulary = SentencePieceVocabulary(
        model,
        extra_ids=extra,
        eos=max(processor.eos_id(), 0),
        named=named,
        prefix_once=kind == "LlamaTokenizer" and not settings.tokenizer.get("legacy", False),
    )
    before, after = end_flags(settings, bos=not t5, eos=t5)
    return vocabulary, named.get, lambda bos, eos: (bos if before else None, after)


def named_tokens(settings: TokenizerSettings, processor: Any, extra: int) -> dict[str, int]:
    """Ids of names that a text may contain: special tokens, added ones and sentinels.

    Args:
      settings: settings of the folder.
      processor: the SentencePiece model.
      extra: number of sentinels on top of it.
    """
    named = sentinel_names(top_ids(processor.get_piece_size() + extra, extra))
    named |= sentinel_names(find_sentinels(functools.partial(find_piece, processor)))
    for name in [*map(settings.name, NAMES), *settings.extra_tokens()]:
        if name is not None and name not in named:
            token = processor.piece_to_id(name)
            if processor.id_to_piece(token) == name:
                named[name] = token
    named |= {each["content"]: token for token, each in settings.added_tokens().items()}
    return named


def json_from_merges(settings: TokenizerSettings) -> bytes:
    """GPT-2's vocab.json and merges.txt as a tokenizer.json: BPE over bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    folder = settings.folder
    if settings.kind not in BYTE_LEVEL:
        raise ValueError(
            f"{folder}: vocab.json with merges.txt says too little about a {settings.kind}; get "
            "its tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    prefix_space = bool(settings.tokenizer.get("add_prefix_space", False))
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises its bare Exception for a file it cannot read
        raise ValueError(f"{folder}: vocab.json and merges.txt: {error}") from error
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer_size(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if settings.kind == "Qwen2Tokenizer":
        from t5x_lite.tokenizers.gguf_tokenizer import QWEN2

        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    gpt2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    for role, name in (renumbered.ROLES if settings.kind in BARTS else gpt2).items():
        settings.tokenizer.setdefault(role, name)
    names = dict.fromkeys([*map(settings.name, NAMES), *settings.extra_tokens()])
    known = [name for name in names if name and tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens(known)
    return tokenizer.to_str().encode()
