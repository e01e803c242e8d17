# SPDX-License-Identifier: Apache-2.0
"""Bytes that each id adds to a text: what a constraint on the text means for ids."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
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
      first: bytes of ids that write something else at the beginning of a text, where many
        tokenizers drop a space.
      drops_again: the beginning lasts until a token has written something.
    """

    by_id: dict[int, bytes]
    first: Mapping[int, bytes] = MappingProxyType({})
    drops_again: bool = False


def token_bytes(vocabulary: TextVocabulary) -> TokenBytes:
    """Returns the bytes of a vocabulary's ids.

    Raises:
      ValueError: the vocabulary does not say what its ids write.
    """
    if isinstance(vocabulary, ExtendedVocabulary):
        inner = token_bytes(vocabulary.inner)
        names = {token: name.encode() for token, name in vocabulary.named.names.items()}
        first = {token: text for token, text in inner.first.items() if token not in names}
        return inner._replace(by_id=inner.by_id | names, first=first)
    if isinstance(vocabulary, ByteVocabulary):
        spelled = TokenBytes({SPECIAL + byte: bytes([byte]) for byte in range(256)})
    elif isinstance(vocabulary, SymbolVocabulary):
        symbols = {token: each.encode() for token, each in enumerate(vocabulary.symbols, SPECIAL)}
        lead = vocabulary.separator.encode()
        spelled = TokenBytes({token: lead + each for token, each in symbols.items()}, symbols)
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
    first = {token: text for token, text in spelled.first.items() if kept.get(token, text) != text}
    return spelled._replace(by_id=kept, first=first)


def sentencepiece_bytes(vocabulary: SentencePieceVocabulary) -> TokenBytes:
    """Bytes of the pieces of a SentencePiece model."""
    processor, by_id, spaced = vocabulary.processor, {}, {}
    for token in range(vocabulary.base):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            continue
        piece, is_byte = processor.id_to_piece(token), processor.is_byte(token)
        by_id[token] = piece_bytes(piece, is_byte)
        if piece.startswith(SPACE) and not is_byte:
            spaced[token] = by_id[token].removeprefix(b" ")
    sample = next((token for token, text in spaced.items() if text), None)
    if sample is None or processor.decode([sample]) != spaced[sample].decode():
        return TokenBytes(by_id)
    alone = next((token for token, text in spaced.items() if not text), None)
    again = alone is not None and processor.decode([alone, sample]) == spaced[sample].decode()
    return TokenBytes(by_id, spaced, again)


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Bytes of a piece; of <0x0A> one byte if it stands for that."""
    match = BYTE_PIECE.fullmatch(piece) if is_byte else None
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()


def tokenizer_json_bytes(vocabulary: TokenizerJsonVocabulary) -> TokenBytes:
    """Bytes of the tokens of a tokenizer.json, by its decoder.

    Raises:
      ValueError: the decoder is of another kind.
    """
    decoder = json.loads(vocabulary.json).get("decoder")
    names = vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    pieces = {
        token: name
        for name, token in names.items()
        if token not in vocabulary.hidden and token < vocabulary.base
    }
    if decoder is None:
        # The library puts a space between two tokens.
        first = {token: name.encode() for token, name in pieces.items()}
        return TokenBytes({token: b" " + name for token, name in first.items()}, first)
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if {*kinds} - {"Fuse"} == {"ByteLevel"}:
        table = byte_of_character()
        by_id = {
            token: bytes(table[each] for each in name) if {*name} <= {*table} else name.encode()
            for token, name in pieces.items()
        }
        return TokenBytes(by_id)
    check_decoder(steps)
    spelled = {token: replace_pieces(name, steps) for token, name in pieces.items()}
    byte_piece = BYTE_PIECE if "ByteFallback" in kinds else re.compile(r"(?!)")
    matches = {token: byte_piece.fullmatch(name) for token, name in pieces.items()}
    by_id = {
        token: bytes([int(match[1], 16)]) if match else spelled[token].encode()
        for token, match in matches.items()
    }
    if "Strip" in kinds:
        return TokenBytes(by_id, {token: text.removeprefix(b" ") for token, text in by_id.items()})
    for step in steps:
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            sign = step.get("replacement", SPACE)
            first = {
                token: by_id[token] if matches[token] else name.replace(sign, "").encode()
                for token, name in pieces.items()
            }
            return TokenBytes(by_id, first)
    return TokenBytes(by_id)


def check_decoder(steps: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if the steps of a decoder do not write each token by itself."""
    kinds = [step.get("type") for step in steps]
    plain = {*kinds} & {"Metaspace", "Replace", "ByteFallback"}
    known = {*kinds} <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    strips = [step for step in steps if step.get("type") == "Strip"]
    one_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    last = not strips or (kinds[-2:] == ["Fuse", "Strip"] and strips == [one_space])
    texts = all("String" in each["pattern"] for each in steps if each.get("type") == "Replace")
    if not (plain and known and last and texts):
        raise ValueError(
            f"tokenizer.json decodes by {kinds}: decoding cannot be constrained with it, for only "
            "ByteLevel, Metaspace, ByteFallback, Replace of a text, and Strip of one space from "
            "the beginning say what each token writes"
        )


def replace_pieces(piece: str, steps: Iterable[dict[str, Any]]) -> str:
    """Text of a piece after the Replace and Metaspace steps of a decoder."""
    for step in steps:
        if step.get("type") == "Replace":
            piece = piece.replace(step["pattern"]["String"], step["content"])
        elif step.get("type") == "Metaspace":
            piece = piece.replace(step.get("replacement", SPACE), " ")
    return piece


def byte_of_character() -> dict[str, int]:
    """Bytes by the characters that byte-level BPE writes them as (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + number): byte for number, byte in enumerate(others)}
