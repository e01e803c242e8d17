# SPDX-License-Identifier: Apache-2.0
"""Characters of a text that each of its tokens stands for."""

import unicodedata

from t5x_lite.tokenizers.subwords import TokenizerJsonVocabulary
from t5x_lite.tokenizers.token_bytes import token_bytes
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class OffsetError(ValueError):
    """A vocabulary changes a text so that its tokens cannot be found in it."""


def token_offsets(vocabulary: TextVocabulary, text: str) -> list[tuple[int, int]]:
    """First character of each token, and the one after its last, as a model reads the text.

    The tokens that begin and end a sequence have none: two equal numbers.

    Raises:
      OffsetError: the tokens cannot be found in the text.
    """
    ids = vocabulary.encode(text)
    inner = library_offsets(vocabulary, text, ids)
    if inner is None:
        try:
            inner = match_bytes(vocabulary, list(text), ids)
        except OffsetError:
            # The form in which SentencePiece's models read most of the texts that they change.
            forms = [unicodedata.normalize("NFKC", character) for character in text]
            inner = match_bytes(vocabulary, forms, ids)
    start = [] if vocabulary.bos is None else [(0, 0)]
    return [*start, *inner, *([(len(text), len(text))] if vocabulary.ends else [])]


def library_offsets(
    vocabulary: TextVocabulary, text: str, ids: list[int]
) -> list[tuple[int, int]] | None:
    """Offsets by the library that tokenizes; None where it has other ids, or none.

    Args:
      vocabulary: of the text.
      text: the text.
      ids: its ids.
    """
    if not isinstance(vocabulary, TokenizerJsonVocabulary):
        return None
    coded = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    return coded.offsets if coded.ids == ids else None


def match_bytes(
    vocabulary: TextVocabulary, characters: list[str], ids: list[int]
) -> list[tuple[int, int]]:
    """Offsets by the bytes that each id writes; spaces that no id writes are skipped, and after an
    id that writes none (unknown) all that the next does not write.

    Args:
      vocabulary: of the text.
      characters: the text, one item for each character.
      ids: its ids.

    Raises:
      OffsetError: an id does not write the next bytes of the text.
    """
    spelled, coded = token_bytes(vocabulary), [each.encode() for each in characters]
    content = b"".join(coded)
    # The character that each byte belongs to, and the end.
    owner = [place for place, each in enumerate(coded) for _ in each] + [len(characters)]
    offsets, place, unknown = [], 0, False
    for number, token in enumerate(ids):
        piece = spelled.by_id.get(token, b"")
        forms = (piece, spelled.first.get(token, piece), piece.lstrip(b" "))
        here = place
        while not (fitting := [each for each in forms if content.startswith(each, here)]):
            if here < len(content) and (unknown or content[here : here + 1].isspace()):
                here += 1
                continue
            there = content[place : place + 20].decode(errors="replace")
            raise OffsetError(
                f"token {number} ({piece.decode(errors='replace')!r}) is not what the text has "
                f"there ({there!r}): this vocabulary changes texts, so that tags cannot be aligned "
                "with them"
            )
        after = here + len(fitting[0])
        offsets.append((owner[here], owner[after - 1] + 1 if fitting[0] else owner[here]))
        place, unknown = after, not piece
    return offsets
