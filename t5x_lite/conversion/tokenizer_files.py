# SPDX-License-Identifier: Apache-2.0
"""Our vocabularies as the tokenizer files of a Hugging Face folder, which AutoTokenizer loads."""

import json
from pathlib import Path
from typing import Any

from t5x_lite.conversion import tokenizer_json
from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import Bytes, SentencePiece, Symbols, TokenizerJson, Vocabulary

TARGETS = "targets"  # the subfolder of the outputs' tokenizer, where it is another one
GENERAL = "PreTrainedTokenizerFast"


def write_pair(
    inputs: Vocabulary, targets: Vocabulary, folder: str | Path, start: int | None = None
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
    start: int | None = None,
    joined: str | None = None,
) -> None:
    """Writes tokenizer.json (ByT5 has none), tokenizer_config.json and special_tokens_map.json.

    The tokenizer puts eos after a text if the vocabulary `ends`, and `start` (or the vocabulary's
    bos) before it: what a lone decoder's prompts begin with. `joined` is what stands between
    symbols in decoded text, the vocabulary's own separator unless given.

    Raises:
      ValueError: the vocabulary cannot be written as such a tokenizer.
    """
    folder = Path(folder)
    bos = vocabulary.bos if start is None else start
    match vocabulary:
        case Bytes() if vocabulary.ends and bos is None:
            files = byt5(vocabulary)
        case Bytes():
            files = general(vocabulary, tokenizer_json.of_bytes(vocabulary), bos)
        case Symbols():
            made = tokenizer_json.of_symbols(vocabulary, joined)
            files = general(vocabulary, made, bos)
        case SentencePiece():
            files = of_pieces(vocabulary, bos)
        case TokenizerJson():
            files = of_json(vocabulary, bos)
        case _:
            kind = vocabulary.description()["kind"]
            raise ValueError(
                f"A vocabulary of kind {kind} has no tokenizer: its texts are ids already. "
                "Leave the tokenizer out and feed ids"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def of_json(vocabulary: TokenizerJson, bos: int | None) -> dict[str, bytes]:
    """The tokenizer.json as it is, but for sentinels on top and what stands around a text."""
    made = json.loads(vocabulary.json)
    if vocabulary.extra_ids:
        tokenizer_json.add(made, sentinels(vocabulary))
    return general(vocabulary, made, bos)


def of_pieces(vocabulary: SentencePiece, bos: int | None) -> dict[str, bytes]:
    """The SentencePiece model, and the same as a tokenizer.json; of class T5 if it is like T5's."""
    made = tokenizer_json.of_pieces(vocabulary)
    files = general(vocabulary, made, bos)
    if tokenizer_json.like_t5(vocabulary) and vocabulary.ends and bos is None:
        settings = json.loads(files["tokenizer_config.json"])
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.sentinels}
        files["tokenizer_config.json"] = dumped(settings)
        files["spiece.model"] = vocabulary.pieces
    return files


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


def general(vocabulary: Vocabulary, made: dict[str, Any], bos: int | None) -> dict[str, bytes]:
    """The files of a tokenizer.json that puts bos and eos where the vocabulary wants them."""
    names = tokenizer_json.names(made)
    eos = vocabulary.eos if vocabulary.ends else None
    tokenizer_json.surround(made, bos, eos)
    roles = {"bos_token": bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
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
    top = range(vocabulary.size - vocabulary.sentinels, vocabulary.size)
    return [(token, vocabularies.sentinel(vocabulary, token)) for token in top]


def dumped(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
