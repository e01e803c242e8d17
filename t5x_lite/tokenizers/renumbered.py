# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models whose ids another file says: Marian, M2M100, mBART-50 and Pegasus.

The pieces of a copy of the model are put in the order of those ids. Each keeps its score, so that
texts are cut as before.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.tokenizers.subwords import SentencePieceVocabulary, parse_proto
from t5x_lite.tokenizers.tokenizer_settings import NAMES, TokenizerSettings
from t5x_lite.utils import bounded_files
from t5x_lite.utils.bounded_files import check_regular

# SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
# Of a file; the largest that are published have 5 MB.
MOST_BYTES = 2**28
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
# Language of the inputs where the settings have none, by the tokenizer's class.
SOURCE_LANGUAGES = {
    "M2M100Tokenizer": "en",
    "MBart50Tokenizer": "en_XX",
    "MarianTokenizer": None,
    "PegasusTokenizer": None,
}
# Those whose vocab.json has the ids, of pieces of other models too.
LISTED = ("MarianTokenizer", "M2M100Tokenizer")
# The tokenizer's class where the settings name none, by the model's family.
CLASSES = {"marian": "MarianTokenizer", "m2m_100": "M2M100Tokenizer", "pegasus": "PegasusTokenizer"}
ROLES = dict(zip(NAMES, ("<s>", "</s>", "<pad>", "<unk>"), strict=True))


def renumber_pieces(
    model: bytes, names: Sequence[str], special: Collection[str], unknown: str
) -> bytes:
    """A SentencePiece model whose first ids are those of `names`; its other pieces follow.

    Args:
      model: content of a .model file.
      names: a piece for every id.
      special: names that no text becomes by itself.
      unknown: the name of what the model has no piece for.

    Raises:
      ValueError: a name occurs twice, or the unknown one not at all.
    """
    if len(set(names)) != len(names) or unknown not in names:
        raise ValueError(f"the vocabulary has a piece twice, or no {unknown}")
    proto = parse_proto(model)
    scores = {piece.piece: (piece.score, piece.type) for piece in proto.pieces}
    usable = [piece.piece for piece in proto.pieces if piece.type not in (UNKNOWN, CONTROL, UNUSED)]
    listed = set(names)
    del proto.pieces[:]
    for name in [*names, *(piece for piece in usable if piece not in listed)]:
        score, kind = scores.get(name, (0.0, UNUSED))
        if name == unknown:
            kind = UNKNOWN
        elif name in special or kind in (UNKNOWN, CONTROL):
            kind = CONTROL
        proto.pieces.add(piece=name, score=score, type=kind)
    proto.trainer_spec.unk_piece, proto.trainer_spec.unk_id = unknown, names.index(unknown)
    return proto.SerializeToString()


def tokenizer_class(settings: TokenizerSettings) -> str | None:
    """The class in SOURCE_LANGUAGES that a folder's tokenizer is of; None for another one."""
    kind = settings.kind or CLASSES.get(settings.model.get("model_type") or "", "")
    return kind if kind in SOURCE_LANGUAGES else None


def check_languages(settings: TokenizerSettings) -> None:
    """Raises ValueError, with the remedy, for tokenizers of these families that are not read."""
    folder, kind = settings.folder, settings.kind
    if kind == "MBartTokenizer" or (not kind and settings.model.get("model_type") == "mbart"):
        raise ValueError(
            f"{folder}: mBART-25 puts the id of its language after a text, which is not read here. "
            "Take an mBART-50, such as facebook/mbart-large-50"
        )
    if kind == "NllbTokenizer" and settings.tokenizer.get("legacy_behaviour"):
        raise ValueError(
            f"{folder}: legacy_behaviour puts the id of the language after a text, where NLLB was "
            "trained with it before: set it to false in tokenizer_config.json"
        )
    if settings.tokenizer.get("separate_vocabs") or (folder / "target_vocab.json").exists():
        raise ValueError(
            f"{folder}: a Marian with a vocabulary for each side (separate_vocabs) is not read; "
            "take one whose sides share vocab.json, as most of Helsinki-NLP/opus-mt-* do"
        )


def open_renumbered(settings: TokenizerSettings) -> tuple[Any, Callable, Callable]:
    """Opens such a tokenizer: vocabulary, its ids by name, and the ends put around a text.

    Raises:
      ValueError: a file is missing or broken.
    """
    kind = tokenizer_class(settings)
    assert kind is not None
    for role, name in ROLES.items():
        if kind not in ("MarianTokenizer", "PegasusTokenizer") or role != "bos_token":
            settings.tokenizer.setdefault(role, name)
    unknown = settings.name("unk_token") or "<unk>"
    model = read_model(settings, kind)
    names, special = list_pieces(settings, kind, model)
    special |= {name for name in map(settings.name, NAMES) if name in names}
    ids = {name: token for token, name in enumerate(names)}
    vocabulary = SentencePieceVocabulary(
        renumber_pieces(model, names, special, unknown),
        eos=ids[settings.name("eos_token") or "</s>"],
        named={name: ids[name] for name in special},
        known=len(names) if kind in LISTED else None,
    )
    language = settings.tokenizer.get("src_lang") or SOURCE_LANGUAGES[kind]
    before = None if language is None else language_token(vocabulary.special, language)
    return vocabulary, ids.get, lambda bos, eos: (before, True)


def list_pieces(settings: TokenizerSettings, kind: str, model: bytes) -> tuple[list[str], set[str]]:
    """The piece of every id, and those among them that are special.

    Args:
      settings: settings of the folder.
      kind: class of the tokenizer.
      model: content of the SentencePiece model.
    """
    languages = settings.extra_tokens()
    if kind == "PegasusTokenizer":
        offset = settings.check_count("offset", settings.tokenizer.get("offset", 103))
        extra = ["<mask_1>", "<mask_2>", *(f"<unk_{k}>" for k in range(2, offset))]
        pieces = [piece.piece for piece in parse_proto(model).pieces][2:]
        return ["<pad>", "</s>", *extra, *pieces], {*extra[:2]}
    if kind in LISTED:
        names = read_pieces(settings.folder / "vocab.json")
        if kind == "MarianTokenizer":
            codes = {name for name in names if name.startswith(">>") and name.endswith("<<")}
            return names, codes
        languages = [name for name in languages if name not in names]
        spare = settings.check_count("num_madeup_words", settings.tokenizer.get("num_madeup_words"))
        spare = [f"madeupword{k}" for k in range(8 if spare is None else spare)]
        spare = [name for name in spare if name not in names]
        return [*names, *languages, *spare], set(languages)
    pieces = [piece.piece for piece in parse_proto(model).pieces][3:]
    languages = [name for name in languages if name not in (*FAIRSEQ, "<mask>")]
    return [*FAIRSEQ, *pieces, *languages, "<mask>"], {*languages, "<mask>"}


def read_model(settings: TokenizerSettings, kind: str) -> bytes:
    """Content of the SentencePiece model of inputs, or of targets.

    Args:
      settings: settings of the folder.
      kind: class of the tokenizer.

    Raises:
      ValueError: it is missing, or no such model.
    """
    files = {
        "MarianTokenizer": "target.spm" if settings.targets else "source.spm",
        "PegasusTokenizer": "spiece.model",
    }
    path = settings.folder / files.get(kind, "sentencepiece.bpe.model")
    if not path.is_file():
        raise ValueError(f"{settings.folder} has no {path.name}, which a {kind} needs")
    check_regular(path, MOST_BYTES)
    model = path.read_bytes()
    if not is_model(model):
        raise ValueError(f"{path} is not a SentencePiece model: download it again")
    return model


def is_model(model: bytes) -> bool:
    """True if a SentencePiece model can be read."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor().load_from_serialized_proto(model)
    except RuntimeError:
        return False
    return True


def read_pieces(path: Path) -> list[str]:
    """The pieces of a vocab.json, {piece: id}, in the order of ids.

    Raises:
      ValueError: the file is missing or broken, or the ids are not 0, 1, 2 ...
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, which says the id of every piece")
    content = bounded_files.read_json(path)
    ids = list(content.values()) if isinstance(content, dict) else []
    if not ids or any(type(each) is not int for each in ids) or sorted(ids) != [*range(len(ids))]:
        raise ValueError(f"{path} does not have an id from 0 up for every piece: download it again")
    return sorted(content, key=functools.partial(dict.__getitem__, content))


def language_names(code: str) -> tuple[str, str, str]:
    """Names that the token of a language may have: between __ in M2M100, between >> and << in
    Marian."""
    return code, f"__{code}__", f">>{code}<<"


def language_token(special: Mapping[str, int], language: str) -> int:
    """The id of a language, by its code as the checkpoint has it: fr, fr_XX, fra_Latn.

    Args:
      special: ids by name of the special tokens of a vocabulary.
      language: the code.

    Raises:
      ValueError: it is none of the vocabulary's languages; lists some.
    """
    for name in language_names(language):
        if name in special:
            return special[name]
    known = sorted(special)
    raise ValueError(
        f"{language} is no language of the tokenizer; its special tokens are: "
        f"{', '.join(known[:60]) or 'none'}"
    )
