# SPDX-License-Identifier: Apache-2.0
"""Our vocabularies as the tokenizer files of a Hugging Face folder, which AutoTokenizer loads."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.conversion import tokenizer_json
from t5x_lite.data import vocabularies
from t5x_lite.data.grown import Grown
from t5x_lite.data.vocabularies import Bytes, SentencePiece, Symbols, TokenizerJson, Vocabulary

TARGETS = "targets"  # the subfolder of the outputs' tokenizer, where it is another one
GENERAL = "PreTrainedTokenizerFast"


class Start(NamedTuple):
    """What decoders begin with, `token`, and whether the tokenizer puts it before a text."""

    token: int | None = None
    written: bool = False

    def before(self, vocabulary: Vocabulary) -> int | None:
        """The id before a text: the vocabulary's own, or that of a lone decoder."""
        return vocabulary.bos if vocabulary.bos is not None or not self.written else self.token

    def named(self, vocabulary: Vocabulary) -> int | None:
        """The id of bos_token."""
        return self.token if vocabulary.bos is None else vocabulary.bos


NOTHING = Start()


def write_pair(
    inputs: Vocabulary, targets: Vocabulary, folder: str | Path, start: Start = NOTHING
) -> None:
    """Writes the tokenizer of a run's inputs, and in a subfolder that of its targets if it differs.

    Symbols of one list are read as inputs are and written as targets are by one and the same
    tokenizer: it spells letters and joins phonemes.

    Raises:
      ValueError: as `write` does.
    """
    same = isinstance(inputs, Symbols) and isinstance(targets, Symbols)
    if same and inputs.symbols == targets.symbols:
        write(inputs, folder, start, joined=targets.separator)
    else:
        write(inputs, folder, start)
    if spelling(inputs) != spelling(targets):
        write(targets, Path(folder) / TARGETS)


def spelling(vocabulary: Vocabulary) -> tuple[str, bytes | None]:
    """What decides the ids of a text, without its beginning and end."""
    kept = {k: v for k, v in vocabulary.description().items() if k not in ("ends", "bos")}
    return json.dumps(kept, sort_keys=True), vocabulary.model()


def write(
    vocabulary: Vocabulary,
    folder: str | Path,
    start: Start = NOTHING,
    joined: str | None = None,
) -> None:
    """Writes tokenizer.json (ByT5 has none), tokenizer_config.json and special_tokens_map.json.

    The tokenizer puts eos after a text if the vocabulary `ends`, and before it the vocabulary's
    bos, or `start` as that says. `joined` is what stands between symbols in decoded text, the
    vocabulary's own separator unless given.

    Raises:
      ValueError: the vocabulary cannot be written as such a tokenizer.
    """
    folder = Path(folder)
    # Padding is what T5's own decoders begin with: its tokenizers have no name for that.
    plain = vocabulary.ends and start.named(vocabulary) in (None, vocabulary.pad)
    plain = plain and start.before(vocabulary) is None
    match vocabulary:
        case Bytes() if plain:
            files = byt5(vocabulary)
        case Bytes():
            files = general(vocabulary, tokenizer_json.of_bytes(vocabulary), start)
        case Symbols():
            made = tokenizer_json.of_symbols(vocabulary, joined)
            files = general(vocabulary, made, start)
        case SentencePiece():
            made = tokenizer_json.of_pieces(vocabulary)
            files = general(vocabulary, made, start)
            if plain and tokenizer_json.like_t5(vocabulary):
                files |= t5(vocabulary, files)
        case TokenizerJson():
            files = general(vocabulary, of_json(vocabulary), start)
        case Grown():
            files = general(vocabulary, of_grown(vocabulary), start)
        case _:
            kind = vocabulary.description()["kind"]
            raise ValueError(
                f"A vocabulary of kind {kind} has no tokenizer: its texts are ids already. "
                "Leave the tokenizer out and feed ids"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def of_json(vocabulary: TokenizerJson) -> dict[str, Any]:
    """The tokenizer.json as it is, but for sentinels on top."""
    made = json.loads(vocabulary.json)
    if vocabulary.extra_ids:
        tokenizer_json.add(made, sentinels(vocabulary))
    return made


def of_grown(vocabulary: Grown) -> dict[str, Any]:
    """The inner vocabulary's tokenizer.json with the new names and sentinels.

    Raises ValueError for an inner one that has no tokenizer.
    """
    match vocabulary.inner:
        case Bytes() as inner:
            made = tokenizer_json.of_bytes(inner)
        case Symbols() as inner:
            made = tokenizer_json.of_symbols(inner)
        case SentencePiece() as inner:
            made = tokenizer_json.of_pieces(inner)
        case TokenizerJson() as inner:
            made = of_json(inner)
        case Grown() as inner:
            made = of_grown(inner)
        case inner:
            kind = inner.description()["kind"]
            raise ValueError(f"A vocabulary grown from {kind} has no tokenizer: leave it out")
    there = inner.size
    names = [(token, name) for name, token in vocabulary.named.ids.items() if token >= there]
    special = set(vocabulary.sentinel_ids.tolist())
    for token, name in sorted(names):
        tokenizer_json.add(made, [(token, name)], special=token in special)
    return made


def t5(vocabulary: SentencePiece, files: dict[str, bytes]) -> dict[str, bytes]:
    """What makes T5's own tokenizer of the files: its name, and the SentencePiece model."""
    settings = json.loads(files["tokenizer_config.json"])
    settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.sentinels}
    settings.pop("bos_token", None)
    return {"tokenizer_config.json": dumped(settings), "spiece.model": vocabulary.pieces}


def byt5(vocabulary: Bytes) -> dict[str, bytes]:
    """ByT5's tokenizer: no model; sentinels are listed from the lowest id up."""
    names = [vocabularies.sentinel(vocabulary, token) for token in range(259, vocabulary.size)]
    settings = {
        "tokenizer_class": "ByT5Tokenizer",
        "extra_ids": len(names),
        "additional_special_tokens": names,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    return {"tokenizer_config.json": dumped(settings)}


def general(vocabulary: Vocabulary, made: dict[str, Any], start: Start) -> dict[str, bytes]:
    """The files of a tokenizer.json that puts bos and eos where the vocabulary wants them."""
    names = tokenizer_json.names(made)
    eos = vocabulary.eos if vocabulary.ends else None
    tokenizer_json.surround(made, start.before(vocabulary), eos)
    roles = {"eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    roles["bos_token"] = start.named(vocabulary)
    special = {role: names[token] for role, token in roles.items() if token in names}
    unknown = made["model"].get("unk_token")
    if unknown is not None:
        special["unk_token"] = unknown
    extra = [name for _, name in sentinels(vocabulary)]
    settings = special | {
        "tokenizer_class": GENERAL,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": extra,
    }
    return {
        "tokenizer.json": dumped(made),
        "tokenizer_config.json": dumped(settings),
        "special_tokens_map.json": dumped(special | {"additional_special_tokens": extra}),
    }


def sentinels(vocabulary: Vocabulary) -> list[tuple[int, str]]:
    """The ids and names of the sentinels, lowest id first."""
    ids = sorted(vocabulary.sentinel_ids.tolist())
    return [(token, vocabularies.sentinel(vocabulary, token)) for token in ids]


def dumped(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
