# SPDX-License-Identifier: Apache-2.0
"""Our vocabularies as the tokenizer files of a Hugging Face folder, which AutoTokenizer loads."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.tokenizers import tokenizer_json, vocabularies
from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.tokenizer_settings import NAMES
from t5x_lite.tokenizers.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    SymbolVocabulary,
    TokenizerJsonVocabulary,
)
from t5x_lite.tokenizers.vocabulary import TextVocabulary

TARGETS = "targets"  # subfolder of the targets' tokenizer, where it is another one
GENERAL = "PreTrainedTokenizerFast"
# Names of the list of further special tokens, before and since transformers 5.
EXTRA = ("additional_special_tokens", "extra_special_tokens")
# Classes that put the id of src_lang before a text, whatever their tokenizer.json does.
SPEAKING = ("NllbTokenizer", "NllbTokenizerFast")


class StartToken(NamedTuple):
    """Token that decoders begin with.

    Attributes:
      token: its id; None for none.
      written: the tokenizer puts it before a text.
    """

    token: int | None = None
    written: bool = False

    def before(self, vocabulary: TextVocabulary) -> int | None:
        """The id before a text: the vocabulary's own, or that of a decoder-only model."""
        return vocabulary.bos if vocabulary.bos is not None or not self.written else self.token

    def named(self, vocabulary: TextVocabulary) -> int | None:
        """The id of bos_token; None where decoders begin with padding, which has a name already."""
        if vocabulary.bos is not None:
            return vocabulary.bos
        return None if self.token == vocabulary.pad and not self.written else self.token


NOTHING = StartToken()


def write_tokenizers(
    inputs: TextVocabulary, targets: TextVocabulary, folder: str | Path, start: StartToken = NOTHING
) -> None:
    """Writes the tokenizer of a run's inputs, and in a subfolder that of its targets if it differs.

    Symbols of one list have one tokenizer, which reads them as inputs and writes them as targets
    are joined: it splits a word into letters and joins phonemes.

    Args:
      inputs: vocabulary of the inputs.
      targets: vocabulary of the targets.
      folder: the folder, which is created.
      start: token that decoders begin with.

    Raises:
      ValueError: as `write_tokenizer` does.
    """
    if isinstance(inputs, SentencePieceVocabulary) and inputs.known is not None:
        write_listed_pieces(inputs, targets, Path(folder))
        return
    same = isinstance(inputs, SymbolVocabulary) and isinstance(targets, SymbolVocabulary)
    if same and inputs.symbols == targets.symbols:
        write_tokenizer(inputs, folder, start, joined=targets.separator)
    else:
        write_tokenizer(inputs, folder, start)
    if ids_description(inputs) != ids_description(targets):
        write_tokenizer(targets, Path(folder) / TARGETS)


def write_listed_pieces(
    inputs: SentencePieceVocabulary, targets: TextVocabulary, folder: Path
) -> None:
    """Writes the tokenizer of a Marian or M2M100: SentencePiece, and a vocab.json with the ids.

    Args:
      inputs: vocabulary of the inputs, whose ids belong to pieces by name.
      targets: vocabulary of the targets; Marian has a model for each.
      folder: the folder, which is created.
    """
    names = list(inputs.pieces)
    languages = [name for name in names if name in inputs.described and name.startswith("__")]
    settings: dict[str, Any] = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    if languages:
        first = names.index(languages[0])
        settings |= {"tokenizer_class": "M2M100Tokenizer", "bos_token": "<s>"}
        settings |= {"additional_special_tokens": languages}
        settings |= {"num_madeup_words": len(names) - first - len(languages)}
        if inputs.bos is not None:
            settings["src_lang"] = names[inputs.bos].strip("_")
        names, files = names[:first], {"sentencepiece.bpe.model": inputs.model}
    else:
        settings["tokenizer_class"] = "MarianTokenizer"
        target = targets if isinstance(targets, SentencePieceVocabulary) else inputs
        files = {"source.spm": inputs.model, "target.spm": target.model}
    vocab = {name: token for token, name in enumerate(names)}
    files |= {"vocab.json": encode_json(vocab), "tokenizer_config.json": encode_json(settings)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def ids_description(vocabulary: TextVocabulary) -> tuple[str, bytes | None]:
    """Description of a vocabulary without its ends: equal ones give a text the same ids."""
    described = vocabularies.without_origin(vocabulary.description())
    kept = {k: v for k, v in described.items() if k not in ("ends", "bos")}
    return json.dumps(kept, sort_keys=True), vocabulary.model_bytes()


def write_tokenizer(
    vocabulary: TextVocabulary,
    folder: str | Path,
    start: StartToken = NOTHING,
    joined: str | None = None,
) -> None:
    """Writes tokenizer.json (ByT5 has none), tokenizer_config.json and special_tokens_map.json.

    The tokenizer puts eos after a text if the vocabulary `ends`, and before it the vocabulary's
    bos, or `start`.

    Args:
      vocabulary: the vocabulary.
      folder: the folder, which is created.
      start: token that decoders begin with.
      joined: text between symbols in decoded text; None for the vocabulary's own separator.

    Raises:
      ValueError: the vocabulary cannot be written as such a tokenizer.
    """
    files = tokenizer_files(vocabulary, start, joined)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def tokenizer_files(
    vocabulary: TextVocabulary, start: StartToken, joined: str | None
) -> dict[str, bytes]:
    """Files of a tokenizer by name.

    Args:
      vocabulary: the vocabulary.
      start: token that decoders begin with.
      joined: text between symbols in decoded text; None for the vocabulary's own separator.
    """
    # T5's own decoders begin with padding: its tokenizers have no name for a start token.
    plain = vocabulary.ends and start.named(vocabulary) is None
    plain = plain and start.before(vocabulary) is None
    match vocabulary:
        case ByteVocabulary() if plain:
            return byt5_files(vocabulary)
        case ByteVocabulary():
            content = tokenizer_json.bytes_content(vocabulary)
        case SymbolVocabulary():
            content = tokenizer_json.symbols_content(vocabulary, joined)
        case SentencePieceVocabulary():
            content = tokenizer_json.sentencepiece_content(vocabulary)
        case TokenizerJsonVocabulary():
            content = json_with_sentinels(vocabulary)
        case ExtendedVocabulary():
            content = extended_json(vocabulary)
        case _:
            kind = vocabulary.description()["kind"]
            raise ValueError(
                f"A vocabulary of kind {kind} has no tokenizer: its texts are ids already. "
                "Leave the tokenizer out and feed ids"
            )
    files = fast_tokenizer_files(vocabulary, content, start)
    is_t5 = isinstance(vocabulary, SentencePieceVocabulary) and plain
    if is_t5 and tokenizer_json.is_t5_tokenizer(vocabulary):
        files |= t5_files(vocabulary, files)
    return files


def json_with_sentinels(vocabulary: TokenizerJsonVocabulary) -> dict[str, Any]:
    """The tokenizer.json as it is, but for sentinels on top."""
    content = json.loads(vocabulary.json)
    if vocabulary.extra_ids:
        tokenizer_json.add_tokens(content, list_sentinels(vocabulary))
    return content


def extended_json(vocabulary: ExtendedVocabulary) -> dict[str, Any]:
    """The inner vocabulary's tokenizer.json with the new names and sentinels.

    Raises:
      ValueError: the inner vocabulary has no tokenizer.
    """
    match vocabulary.inner:
        case ByteVocabulary() as inner:
            content = tokenizer_json.bytes_content(inner)
        case SymbolVocabulary() as inner:
            content = tokenizer_json.symbols_content(inner)
        case SentencePieceVocabulary() as inner:
            content = tokenizer_json.sentencepiece_content(inner)
        case TokenizerJsonVocabulary() as inner:
            content = json_with_sentinels(inner)
        case ExtendedVocabulary() as inner:
            content = extended_json(inner)
        case inner:
            kind = inner.description()["kind"]
            raise ValueError(f"A vocabulary grown from {kind} has no tokenizer: leave it out")
    there = inner.size
    names = [(token, name) for name, token in vocabulary.named.ids.items() if token >= there]
    special = set(vocabulary.sentinel_ids.tolist())
    for token, name in sorted(names):
        tokenizer_json.add_tokens(content, [(token, name)], special=token in special)
    return content


def t5_files(vocabulary: SentencePieceVocabulary, files: dict[str, bytes]) -> dict[str, bytes]:
    """Files of T5's own tokenizer: settings with its name, and the SentencePiece model."""
    settings = json.loads(files["tokenizer_config.json"])
    settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.sentinels}
    settings.pop("bos_token", None)
    return {"tokenizer_config.json": encode_json(settings), "spiece.model": vocabulary.model}


def byt5_files(vocabulary: ByteVocabulary) -> dict[str, bytes]:
    """Files of ByT5's tokenizer: no model; sentinels are listed from the lowest id up."""
    names = [vocabularies.sentinel_text(vocabulary, token) for token in range(259, vocabulary.size)]
    settings = {
        "tokenizer_class": "ByT5Tokenizer",
        "extra_ids": len(names),
        "additional_special_tokens": names,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    return {"tokenizer_config.json": encode_json(settings)}


def fast_tokenizer_files(
    vocabulary: TextVocabulary, content: dict[str, Any], start: StartToken
) -> dict[str, bytes]:
    """Files of a tokenizer.json that puts bos and eos where the vocabulary has them.

    Args:
      vocabulary: the vocabulary.
      content: its tokenizer.json, whose post-processor is set.
      start: token that decoders begin with.
    """
    names = tokenizer_json.token_names(content)
    eos = vocabulary.eos if vocabulary.ends else None
    tokenizer_json.surround_texts(content, start.before(vocabulary), eos)
    origin = origin_of(vocabulary)
    special = special_tokens(vocabulary, names, start, origin)
    unknown = content["model"].get("unk_token", names.get(content["model"].get("unk_id")))
    if unknown is not None:
        special.setdefault("unk_token", unknown)
    extra = [name for _, name in list_sentinels(vocabulary)]
    field = next((name for name in EXTRA if name in origin), EXTRA[0])
    before = origin.get(field)
    if isinstance(before, list):
        extra = [*before, *(name for name in extra if name not in map(token_content, before))]
    settings = {"tokenizer_class": GENERAL, "clean_up_tokenization_spaces": False} | origin
    settings |= special | {field: extra}
    if vocabulary.bos in names and origin.get("tokenizer_class") in SPEAKING:
        settings["src_lang"] = names[vocabulary.bos]
    return {
        "tokenizer.json": encode_json(content),
        "tokenizer_config.json": encode_json(settings),
        "special_tokens_map.json": encode_json(special | {field: extra}),
    }


def origin_of(vocabulary: TextVocabulary) -> dict[str, Any]:
    """Fields of the tokenizer_config.json that a vocabulary came with; {} without one."""
    if isinstance(vocabulary, ExtendedVocabulary):
        return origin_of(vocabulary.inner)
    return vocabulary.origin if isinstance(vocabulary, TokenizerJsonVocabulary) else {}


def special_tokens(
    vocabulary: TextVocabulary, names: dict[int, str], start: StartToken, origin: dict[str, Any]
) -> dict[str, Any]:
    """The tokens of the roles bos_token, eos_token and so on, as the origin describes them.

    Args:
      vocabulary: the vocabulary.
      names: name of every id.
      start: token that decoders begin with.
      origin: fields of the tokenizer_config.json that the vocabulary came with.
    """
    special = {role: origin[role] for role in NAMES if origin.get(role) is not None}
    ids: dict[str, int | None] = {"eos_token": vocabulary.eos}
    if not origin:
        ids |= {"pad_token": vocabulary.pad, "bos_token": start.named(vocabulary)}
    for role, token in ids.items():
        if token in names and token_content(special.get(role)) != names[token]:
            special[role] = names[token]
    return special


def token_content(token: Any) -> Any:
    """The name of a token that stands as it is, or in an object that describes it."""
    return token.get("content") if isinstance(token, dict) else token


def list_sentinels(vocabulary: TextVocabulary) -> list[tuple[int, str]]:
    """The ids and names of the sentinels, lowest id first."""
    ids = sorted(vocabulary.sentinel_ids.tolist())
    return [(token, vocabularies.sentinel_text(vocabulary, token)) for token in ids]


def encode_json(value: dict[str, Any]) -> bytes:
    """A .json file with this content."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
