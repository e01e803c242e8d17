# SPDX-License-Identifier: Apache-2.0
"""Ids as a reader sees them: one short piece of text for each."""

from collections.abc import Sequence

from t5x_lite.data.vocabularies import Vocabulary

# A blank at the edge of a piece would not be seen; SentencePiece shows it so.
BLANK = "▁"
MARKS = {"\n": "⏎", "\t": "⇥"}


def label(vocabulary: Vocabulary, token: int, start: int | None = None) -> str:
    """The text that token adds to one before it, blanks and ends of lines made visible.

    Ids without text are named <end>, <pad>, <start> (where it is the model's `start`) or <id>.
    """
    if token in vocabulary.stops:
        return "<end>"
    if token == start:
        return "<start>"
    if token == vocabulary.pad:
        return "<pad>"
    # A piece may lose its blank at the beginning of a text: so it is read after itself.
    alone, twice = vocabulary.decode([token]), vocabulary.decode([token, token])
    text = twice[len(alone) :] if alone and twice.startswith(alone) else alone
    separator = getattr(vocabulary, "separator", "")
    text = text.removeprefix(separator) if separator else text
    if not text.strip("\ufffd"):
        return f"<{token}>"
    for letter, mark in MARKS.items():
        text = text.replace(letter, mark)
    return text.replace(" ", BLANK)


def labels(vocabulary: Vocabulary, ids: Sequence[int], start: int | None = None) -> list[str]:
    return [label(vocabulary, int(token), start) for token in ids]
