# SPDX-License-Identifier: Apache-2.0
"""Text settings of a checkpoint, read without its weights: vocabularies, ends and chat template."""

from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.checkpoints import sources
from t5x_lite.checkpoints.formats import gguf
from t5x_lite.checkpoints.kinds import CheckpointKind, detect_located
from t5x_lite.checkpoints.step_folders import VOCABULARY_FOLDER
from t5x_lite.tokenizers import (
    chat,
    errors,
    gguf_tokenizer,
    huggingface_tokenizer,
    vocabularies,
)
from t5x_lite.tokenizers.chat import ChatTemplate
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.tokenizers.extended import ExtendedVocabulary, missing_sentinels
from t5x_lite.tokenizers.huggingface_tokenizer import SequenceEnds
from t5x_lite.tokenizers.tokenizer_files import TARGETS
from t5x_lite.tokenizers.vocabularies import SentencePieceVocabulary, TokenizerJsonVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary

# Among the vocabularies of a run folder.
CHAT_FILE = "chat_template.jinja"


class TextSettings(NamedTuple):
    """Conversion of a checkpoint's texts to ids, and of conversations to texts.

    Attributes:
      vocabularies: those of inputs and of targets.
      chat: the template of conversations; None for a model without one.
      ends: where sequences begin and end, as the tokenizer of another library has them; None for a
        run folder, whose config.Model says it.
    """

    vocabularies: tuple[TextVocabulary, TextVocabulary]
    chat: ChatTemplate | None = None
    ends: SequenceEnds | None = None


def read_text_settings(path: str | Path) -> TextSettings:
    """Text settings of a checkpoint: a run folder, a Hugging Face folder, a .gguf file, or a model
    of the hub by name.

    Raises:
      ValueError: nothing lies there, or it has no tokenizer that can be read.
    """
    source = sources.locate_source(path, weights=False)
    path, kind = source.path, detect_located(source)
    if kind == CheckpointKind.GGUF:
        return read_gguf(gguf.GgufTensors(path, source.repository))
    if kind == CheckpointKind.HUGGING_FACE:
        return read_hugging_face(path)
    if kind == CheckpointKind.T5X:
        raise SourceError(f"{path} is a T5X checkpoint, which does not have its vocabulary")
    return read_vocabulary_folder(path / VOCABULARY_FOLDER)


def read_vocabulary_folder(folder: Path) -> TextSettings:
    """Text settings that a training run or a conversion wrote."""
    pair = vocabularies.load_pair(folder)
    template = folder / CHAT_FILE
    if not template.is_file():
        return TextSettings(pair)
    with errors.naming_path(template, "the chat template"):
        content = template.read_text(encoding="utf-8")
    return TextSettings(pair, ChatTemplate(content, role_tokens(pair[1])))


def write_vocabulary_folder(text: TextSettings, folder: Path) -> None:
    """Writes what `read_vocabulary_folder` reads."""
    vocabularies.save_pair(folder, *text.vocabularies)
    if text.chat is not None:
        (folder / CHAT_FILE).write_text(text.chat.template, encoding="utf-8")


def read_hugging_face(folder: Path) -> TextSettings:
    """Text settings of a Hugging Face folder; one that we wrote may have a tokenizer of targets."""
    vocabulary, ends = huggingface_tokenizer.read_tokenizer(folder)
    pair = huggingface_tokenizer.vocabulary_pair(vocabulary)
    if (folder / "target.spm").is_file():
        targets, _ = huggingface_tokenizer.read_tokenizer(folder, targets=True)
        pair = pair[0], huggingface_tokenizer.vocabulary_pair(targets)[1]
    if (folder / TARGETS / "tokenizer.json").is_file():
        targets, _ = huggingface_tokenizer.read_tokenizer(folder / TARGETS)
        pair = pair[0], huggingface_tokenizer.vocabulary_pair(targets)[1]
    return TextSettings(pair, chat.read_chat_template(folder), ends)


def read_gguf(source: gguf.GgufTensors) -> TextSettings:
    """Text settings of a .gguf file."""
    with errors.naming_path(source.path, "its tokenizer"):
        return parse_gguf(source)


def parse_gguf(source: gguf.GgufTensors) -> TextSettings:
    """`read_gguf`, with errors of any class for broken metadata."""
    metadata = source.metadata
    fields = gguf_tokenizer.GgufTokenizerFields(metadata, source.path)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fields.token(name) for role, name in names.items()}
    tokens = {role: fields.tokens[token] for role, token in ids.items() if token is not None}
    text = metadata.get("tokenizer.chat_template")
    template = ChatTemplate(text, tokens) if text else None
    stops = gguf_tokenizer.stop_tokens(fields)
    if template is not None:
        # A base model's eos may be left in a chat model's file, whose answers end with a turn.
        turn = gguf_tokenizer.leading_token(fields, chat.end_of_turn(template))
        stops = stops if turn is None or turn in stops else (*stops, turn)
    if not stops:
        raise ValueError(f"{source.path} does not say which token ends a text (eos_token_id)")
    pad = fields.token("padding")
    special: dict[str, Any] = {
        "eos": stops[0],
        "pad": stops[0] if pad is None else pad,
        "stops": stops,
    }
    vocabulary: Any
    if fields("model") == "t5":
        content, extra = gguf_tokenizer.unigram_model(fields)
        ended = bool(fields("add_eos_token", True))
        vocabulary = SentencePieceVocabulary(content, extra, ended, **special)
        start = metadata.get(f"{source.architecture}.decoder_start_token_id", 0)
        ends = SequenceEnds(start, True, stops, pad)
    else:
        content = gguf_tokenizer.tokenizer_json(metadata, source.path)
        vocabulary = TokenizerJsonVocabulary(content, ends=False, **special)
        before = gguf_tokenizer.begins_with_bos(metadata)
        ends = SequenceEnds(fields.token("bos"), before, stops, pad)
    return TextSettings(huggingface_tokenizer.vocabulary_pair(vocabulary), template, ends)


def read_named_vocabulary(name: str, extra_ids: int) -> TextSettings | None:
    """Text settings that a conversion's --vocabulary names; None for "none".

    Args:
      name: "bytes", "none", a SentencePiece .model, a tokenizer.json, a Hugging Face folder, a
        run folder, or one of the hub by name.
      extra_ids: number of sentinels on top of bytes, a .model or a tokenizer.json.

    Raises:
      ValueError: it is none of these, or cannot be read.
    """
    if name == "none":
        return None
    path = Path(name) if name == "bytes" else sources.locate_source(name, weights=False).path
    if name == "bytes":
        vocabulary = vocabularies.ByteVocabulary(extra_ids)
    elif path.suffix in (".model", ".json") and path.is_file():
        kind = vocabularies.KINDS["sentencepiece" if path.suffix == ".model" else "tokenizer_json"]
        bare = kind(path.read_bytes())
        more = missing_sentinels(bare, extra_ids)
        vocabulary = kind(path.read_bytes(), more) if more else bare
    elif (path / VOCABULARY_FOLDER).is_dir():
        return read_vocabulary_folder(path / VOCABULARY_FOLDER)
    elif path.is_dir():
        vocabulary, _ = huggingface_tokenizer.read_tokenizer(path)
        return TextSettings(huggingface_tokenizer.vocabulary_pair(vocabulary))
    else:
        raise SourceError(
            f"--vocabulary={name} is none of: bytes, none, a .model of SentencePiece, a "
            "tokenizer.json, a Hugging Face folder, a run folder"
        )
    return TextSettings((vocabulary, vocabulary))


def role_tokens(vocabulary: TextVocabulary) -> dict[str, str]:
    """Tokens that a chat template names by role (bos_token ...), of a converted vocabulary."""
    if isinstance(vocabulary, ExtendedVocabulary):
        return role_tokens(vocabulary.inner)
    if not isinstance(vocabulary, TokenizerJsonVocabulary):
        return {}
    ids = {"eos_token": vocabulary.eos, "bos_token": vocabulary.bos, "pad_token": vocabulary.pad}
    names = {
        role: vocabulary.tokenizer.id_to_token(token)
        for role, token in ids.items()
        if token is not None and token >= 0
    }
    return {role: name for role, name in names.items() if name}
