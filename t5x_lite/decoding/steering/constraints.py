# SPDX-License-Identifier: Apache-2.0
"""Constraints of a config as tables of a TokenAutomaton, which are kept on disk."""

import functools
import hashlib
import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.decoding.steering.automaton import NEVER, TokenAutomaton
from t5x_lite.decoding.steering.byte_automaton import begin_with, reachable
from t5x_lite.decoding.steering.patterns import Constraint, make_constraint
from t5x_lite.decoding.steering.token_table import TokenTransitions, token_transitions
from t5x_lite.tokenizers.token_bytes import TokenBytes, token_bytes
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import cache_folder

FORMAT = 5  # raised when the same constraint gives another table
FOLDER = "~/.cache/t5x_lite/constraints"


# What numpy raises for bytes that are not its files.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class ConstraintTable(NamedTuple):
    """Arrays of a TokenAutomaton, see there.

    Attributes:
      following: [s c] int32.
      tokens_left: [s c] int32.
      classes: [v] int32.
      start: [] int32.
    """

    following: np.ndarray
    tokens_left: np.ndarray
    classes: np.ndarray
    start: np.ndarray

    @property
    def shortest(self) -> int:
        """Fewest tokens of a text, its end included."""
        return int(self.tokens_left[self.start].min())


def find_constraint(
    decode: config.Decode, vocabulary: TextVocabulary, vocab: int
) -> ConstraintTable | None:
    """Returns the table of the constraint that a config names; None if it names none.

    Args:
      decode: the config.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.

    Raises:
      ValueError: it is not an expression, schema or grammar, cannot be bounded, or has no text
        that the vocabulary can spell within Decode.max_new_tokens.
    """
    constraint = make_constraint(decode)
    if constraint is None:
        return None
    try:
        constraint.parse()  # a mistake in it is reported before what the vocabulary lacks
        table = load_table(constraint, vocabulary, vocab)
    except UnicodeEncodeError:
        raise ValueError(
            f"{constraint.name} has half of a surrogate pair (\\ud800 to \\udfff): no text has"
        ) from None
    if table.shortest > decode.max_new_tokens:
        raise ValueError(
            f"The shortest text of {constraint.name} has {table.shortest} tokens with its end, and "
            f"Decode.max_new_tokens is {decode.max_new_tokens}"
        )
    return table


@functools.lru_cache(maxsize=8)
def vocabulary_bytes(vocabulary: TextVocabulary) -> TokenBytes:
    """Returns the bytes of a vocabulary's ids, once for each vocabulary."""
    return token_bytes(vocabulary)


@functools.lru_cache(maxsize=8)
def vocabulary_digest(vocabulary: TextVocabulary) -> str:
    """Returns a fingerprint of what a vocabulary's ids write, once for each vocabulary."""
    spelled, digest = vocabulary_bytes(vocabulary), hashlib.sha256()
    for table in (spelled.by_id, spelled.first):
        for token, text in sorted(table.items()):
            digest.update(b"%d:%d:%b" % (token, len(text), text))
        digest.update(b"end")
    return digest.hexdigest()


def load_table(constraint: Constraint, vocabulary: TextVocabulary, vocab: int) -> ConstraintTable:
    """Returns the table of a constraint, from the cache if it has been compiled before.

    Args:
      constraint: the constraint.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.
    """
    spelled, stops = vocabulary_bytes(vocabulary), tuple(vocabulary.stops)
    described = [FORMAT, constraint, stops, vocab, spelled.drops_again]
    identity = json.dumps([*described, vocabulary_digest(vocabulary)])
    path = cache_folder(FOLDER) / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    cached = read_table(path)
    if cached is None:
        cached = compile_table(constraint, spelled, stops, vocab)
        write_table(path, cached)
    return cached


def read_table(path: Path) -> ConstraintTable | None:
    """Returns a table from its file; None if there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            table = ConstraintTable(*(arrays[name] for name in ConstraintTable._fields))
        check_table(table)
    except UNREADABLE:
        return None
    return table


def check_table(table: ConstraintTable) -> None:
    """Raises ValueError if the arrays of a table do not belong together."""
    states, classes = table.following.shape
    config.require(
        all(array.dtype == np.int32 for array in table)
        and table.tokens_left.shape == (states, classes)
        and table.start.shape == ()
        and 0 <= table.start < states
        and -1 <= table.following.min() <= table.following.max() < states
        and 0 <= table.classes.min() <= table.classes.max() < classes,
        "not the table of a constraint",
    )


def write_table(path: Path, table: ConstraintTable) -> None:
    """Writes a table; one that cannot be written is compiled again next time."""
    content = io.BytesIO()
    np.savez_compressed(content, **table._asdict())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError:
        return


def compile_table(
    constraint: Constraint, vocabulary: TokenBytes, stops: Sequence[int], vocab: int
) -> ConstraintTable:
    """Compiles a constraint to a table.

    Args:
      constraint: the constraint.
      vocabulary: bytes of the ids.
      stops: ids that end a text.
      vocab: size of the model's vocabulary.

    Raises:
      ValueError: it is not an expression, has no text, or the ids can spell none of it.
    """
    automaton = constraint.compile()
    if not (automaton.final & reachable(automaton.following, automaton.start)).any():
        raise ValueError(f"{constraint.name} allows no text at all, not even an empty one")
    moves = token_transitions(automaton, vocabulary, vocab, constraint.name)
    table = make_table(moves, stops, constraint.is_open)
    if table.shortest == NEVER:
        raise ValueError(
            f"No text of {constraint.name} can be spelled with the tokens of the vocabulary"
        )
    return table


def make_table(moves: TokenTransitions, stops: Sequence[int], is_open: bool) -> ConstraintTable:
    """Returns the table of transitions.

    Args:
      moves: the transitions.
      stops: ids that end a text.
      is_open: the limit may end a text in a final state too, where tokens that write nothing may
        follow.
    """
    ends = moves.following.shape[1]  # class of the ids that end a text
    following = np.pad(moves.following, ((0, 0), (0, 1)), constant_values=-1)
    following[moves.final, ends] = np.flatnonzero(moves.final)
    classes = moves.classes.copy()
    classes[[*stops]] = ends
    if is_open:
        following[moves.final, 0] = np.flatnonzero(moves.final)
    left = count_tokens_left(moves.following, np.where(moves.final, 0 if is_open else 1, NEVER))
    tokens_left = np.where(
        following >= 0, np.minimum(left[np.maximum(following, 0)] + 1, NEVER), NEVER
    )
    tokens_left[moves.final, ends] = 1
    return ConstraintTable(
        pad_table(following, -1),
        pad_table(tokens_left, NEVER),
        classes,
        np.array(moves.start, np.int32),
    )


def compile_healing(
    tokens: Sequence[int | None], vocabulary: TextVocabulary, vocab: int
) -> tuple[ConstraintTable, np.ndarray]:
    """Compiles the texts that begin as a token of each row does.

    Args:
      tokens: the token of each row; None for any text.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.

    Returns:
      The table, and the first state [b] of each row.
    """
    spelled = vocabulary_bytes(vocabulary)
    different = sorted({spelled.by_id[token] for token in tokens if token is not None})
    automaton, starts = begin_with(different)
    # The tokens follow a prompt: none of them writes something else.
    moves = token_transitions(automaton, TokenBytes(spelled.by_id), vocab, "Decode.token_healing")
    places = dict(zip(different, starts, strict=True))
    states = [
        automaton.start if token is None else places[spelled.by_id[token]] for token in tokens
    ]
    return make_table(moves, vocabulary.stops, is_open=True), np.array(states, np.int32)


def pad_table(table: np.ndarray, value: int) -> np.ndarray:
    """Pads a table to one of few shapes, each of which is compiled once.

    Args:
      table: [s c].
      value: what fills the new rows and columns.
    """
    states, classes = (1 << max(6, (size - 1).bit_length()) for size in table.shape)
    padded = np.full((states, classes), value, np.int32)
    padded[: table.shape[0], : table.shape[1]] = table
    return padded


def count_tokens_left(following: np.ndarray, ending: np.ndarray) -> np.ndarray:
    """Fewest tokens [s] with which a text can be finished from each state, its end included.

    Args:
      following: [s c] state after a token of each class, or -1.
      ending: [s] tokens that end a text in each state; NEVER where it may not end.
    """
    left = ending.astype(np.int64)
    while True:
        after = np.where(following >= 0, left[np.maximum(following, 0)], NEVER)
        shorter = np.minimum(left, after.min(axis=1, initial=NEVER) + 1)
        if (shorter == left).all():
            return left
        left = shorter


def make_automaton(
    table: ConstraintTable, limit: np.ndarray, start: np.ndarray | None = None
) -> TokenAutomaton:
    """Returns the processor of a table.

    Args:
      table: the table.
      limit: [b] most new tokens of each row.
      start: [b] first state of each row; None for that of the table.
    """
    states: Any = np.broadcast_to(table.start if start is None else start, limit.shape)
    arrays: Any = (*table._replace(start=states), np.asarray(limit, np.int32))
    return TokenAutomaton(*arrays)
