# SPDX-License-Identifier: Apache-2.0
"""Bytes that each id adds to a text: what a constraint on the text means for ids."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.subwords import SentencePieceVocabulary, TokenizerJsonVocabulary
from t5x_lite.tokenizers.symbols import SPECIAL, ByteVocabulary, SymbolVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary

SPACE = "▁"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(NamedTuple):
    """Bytes of the ids of a vocabulary.

    Attributes:
      by_id: bytes of each id that writes text; ids that end, pad or hide are left out.
      lead: bytes that decoding drops from the beginning of a text, such as a space.
      always: every token begins with `lead`, as symbols with a separator do.
    """

    by_id: dict[int, bytes]
    lead: bytes = b""
    always: bool = False


def token_bytes(vocabulary: TextVocabulary) -> TokenBytes:
    """Returns the bytes of a vocabulary's ids.

    Raises:
      ValueError: the vocabulary does not say what its ids write.
    """
    if isinstance(vocabulary, ExtendedVocabulary):
        inner = token_bytes(vocabulary.inner)
        names = {token: name.encode() for token, name in vocabulary.named.names.items()}
        return inner._replace(by_id=inner.by_id | names)
    if isinstance(vocabulary, ByteVocabulary):
        spelled = TokenBytes({SPECIAL + byte: bytes([byte]) for byte in range(256)})
    elif isinstance(vocabulary, SymbolVocabulary):
        lead = vocabulary.separator.encode()
        symbols = enumerate(vocabulary.symbols, SPECIAL)
        spelled = TokenBytes(
            {token: lead + symbol.encode() for token, symbol in symbols}, lead, bool(lead)
        )
    elif isinstance(vocabulary, SentencePieceVocabulary):
        spelled = sentencepiece_bytes(vocabulary)
    elif isinstance(vocabulary, TokenizerJsonVocabulary):
        spelled = tokenizer_json_bytes(vocabulary)
    else:
        raise ValueError(
            f"{type(vocabulary).__name__} does not say what each of its ids writes: decoding "
            "cannot be constrained with it"
        )
    silent = {*vocabulary.stops, vocabulary.eos, vocabulary.pad, vocabulary.bos}
    kept = {token: text for token, text in spelled.by_id.items() if token not in silent and text}
    return spelled._replace(by_id=kept)


def sentencepiece_bytes(vocabulary: SentencePieceVocabulary) -> TokenBytes:
    """Bytes of the pieces of a SentencePiece model."""
    processor, by_id = vocabulary.processor, {}
    for token in range(vocabulary.base):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            continue
        by_id[token] = piece_bytes(processor.id_to_piece(token), processor.is_byte(token))
    # The model drops one space where it puts one before a text.
    dropped = processor.decode(processor.encode("a")) == "a" and starts_with_space(processor)
    return TokenBytes(by_id, b" " if dropped else b"")


def starts_with_space(processor: Any) -> bool:
    """True if a SentencePiece model puts a space before a text."""
    return processor.encode("a", out_type=str)[0].startswith(SPACE)


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Bytes of a piece; of <0x0A> one byte if it stands for that."""
    match = BYTE_PIECE.fullmatch(piece) if is_byte else None
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()


def tokenizer_json_bytes(vocabulary: TokenizerJsonVocabulary) -> TokenBytes:
    """Bytes of the tokens of a tokenizer.json, by its decoder.

    Raises:
      ValueError: the decoder is of another kind.
    """
    decoder = json.loads(vocabulary.json).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    tokenizer, added = vocabulary.tokenizer, vocabulary.tokenizer.get_added_tokens_decoder()
    names = tokenizer.get_vocab(with_added_tokens=True)
    pieces = {token: name for name, token in names.items() if token not in vocabulary.hidden}
    literal = {token: added[token].content.encode() for token in pieces if token in added}
    if "ByteLevel" in kinds:
        table = byte_of_character()
        by_id = {
            token: bytes(table[character] for character in name)
            for token, name in pieces.items()
            if token not in literal and all(character in table for character in name)
        }
        return TokenBytes(by_id | literal)
    if not {"Metaspace", "Replace", "ByteFallback"} & {*kinds}:
        raise ValueError(
            f"tokenizer.json decodes by {kinds}: decoding cannot be constrained with it, for only "
            "ByteLevel, Metaspace, Replace and ByteFallback say what each token writes"
        )
    fallback = "ByteFallback" in kinds
    by_id = {
        token: piece_bytes(name, fallback) for token, name in pieces.items() if token not in literal
    }
    return TokenBytes(by_id | literal, b" " if drops_space(steps) else b"")


def drops_space(steps: Iterable[dict[str, Any]]) -> bool:
    """True if the steps of a decoder drop the space before a text."""
    for step in steps:
        strips = step.get("type") == "Strip" and step.get("start", 0) > 0
        prepends = step.get("type") == "Metaspace" and (
            step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        )
        if strips or prepends:
            return True
    return False


def byte_of_character() -> dict[str, int]:
    """Bytes by the characters that byte-level BPE writes them as (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + number): byte for number, byte in enumerate(others)}
