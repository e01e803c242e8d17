# SPDX-License-Identifier: Apache-2.0
"""Automata over bytes as tables over the ids of a vocabulary.

s states    c classes of tokens that lead to the same state from every state    v vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.decoding.steering.byte_automaton import ByteAutomaton, hash_rows
from t5x_lite.tokenizers.token_bytes import TokenBytes

MOST_ENTRIES = 2**25  # of a table: 128 MB
PAIRS = 256  # of a column and a byte, that are followed at a time


class TokenTransitions(NamedTuple):
    """Transitions of an automaton by tokens.

    Attributes:
      following: [s c] int32, state after a token of each class; -1 where there is none.
      classes: [v] int32, class of each token; that of tokens that write nothing leads nowhere.
      final: [s] bool, states in which a text may end.
      start: state of an empty text: one of its own if tokens write something else there.
    """

    following: np.ndarray
    classes: np.ndarray
    final: np.ndarray
    start: int


def token_transitions(
    automaton: ByteAutomaton, vocabulary: TokenBytes, vocab: int, name: str
) -> TokenTransitions:
    """Returns the transitions of an automaton by the tokens of a vocabulary.

    Args:
      automaton: an automaton over bytes.
      vocabulary: bytes of the ids.
      vocab: size of the model's vocabulary.
      name: what the automaton is called in messages.

    Raises:
      ValueError: the table is too large.
    """
    by_id = {token: text for token, text in vocabulary.by_id.items() if token < vocab}
    states = len(automaton.following)
    columns, used = walk_texts(automaton, np.arange(states), [*by_id.values()], name)
    columns = np.concatenate([np.full((1, states), -1, np.int32), columns])
    classes = np.zeros(vocab, np.int64)
    classes[[*by_id]] = used + 1
    final, start = automaton.final, automaton.start
    first = {token: text for token, text in vocabulary.first.items() if token in by_id}
    if first:
        row = first_row(automaton, vocabulary, columns[:, start][classes], first, name)
        pairs = np.stack([classes, row.astype(np.int64)], axis=1)
        pairs, classes = np.unique(pairs, axis=0, return_inverse=True)
        columns = np.concatenate([columns[pairs[:, 0]], pairs[:, 1:]], axis=1)
        final, start = np.append(final, final[start]), states
    return TokenTransitions(
        columns.T.astype(np.int32), classes.reshape(-1).astype(np.int32), final, start
    )


def first_row(
    automaton: ByteAutomaton,
    vocabulary: TokenBytes,
    plain: np.ndarray,
    first: dict[int, bytes],
    name: str,
) -> np.ndarray:
    """Returns the state [v] after each token at the beginning of a text.

    Args:
      automaton: an automaton over bytes.
      vocabulary: bytes of the ids.
      plain: [v] state after each token from the automaton's own start.
      first: bytes of the tokens that write something else at the beginning.
      name: what the automaton is called in messages.
    """
    row = plain.copy()
    after, used = walk_texts(automaton, np.array([automaton.start]), [*first.values()], name)
    row[[*first]] = after[used, 0]
    if vocabulary.drops_again:
        row[[token for token, text in first.items() if not text]] = len(automaton.following)
    return row


def walk_texts(
    automaton: ByteAutomaton, states: np.ndarray, texts: Sequence[bytes], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Follows texts from states, once for all that begin alike.

    Args:
      automaton: an automaton over bytes.
      states: [s] where the texts begin.
      texts: n texts.
      name: what the automaton is called in messages.

    Returns:
      Different columns [k s] of the states after a text, and the number [n] of each text's column.

    Raises:
      ValueError: the columns are too many.
    """
    dead = len(automaton.following)
    following = np.vstack(
        [np.where(automaton.following < 0, dead, automaton.following), [dead] * 256]
    )
    content = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    lengths = np.array([len(text) for text in texts], np.int64)
    begins = np.cumsum(lengths) - lengths
    column, columns, known = np.zeros(len(texts), np.int64), states[None], {}
    number_of(columns, known)
    left = np.flatnonzero(lengths > 0)
    place = 0
    while len(left):
        pairs, inverse = np.unique(
            column[left] * 256 + content[begins[left] + place], return_inverse=True
        )
        parts, numbers = [columns], []
        for first in range(0, len(pairs), PAIRS):
            some = pairs[first : first + PAIRS]
            after = following[columns[some // 256], some[:, None] % 256]
            number, new = number_of(after, known)
            check_entries(len(known), len(states), name)
            parts.append(after[new])
            numbers.append(number)
        columns = np.concatenate(parts)
        column[left] = np.concatenate(numbers)[inverse]
        place += 1
        left = left[lengths[left] > place]
        # What only led to longer texts is dropped: most columns, where states are many.
        used, column = np.unique(column, return_inverse=True)
        columns = columns[used]
        keys = np.array([*known], np.uint64)[used].tolist()
        known = dict(zip(keys, range(len(keys)), strict=True))
    return np.where(columns == dead, -1, columns), column


def number_of(rows: np.ndarray, known: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers rows, equal ones alike, and marks which of them are new.

    Args:
      rows: [n s] integers.
      known: numbers of earlier rows by their hashes; new ones are added.

    Returns:
      Numbers [n], and [n] bool.
    """
    numbers, new = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for place, key in enumerate(hash_rows(rows).tolist()):
        new[place] = key not in known
        numbers[place] = known.setdefault(key, len(known))
    return numbers, new


def check_entries(columns: int, states: int, name: str) -> None:
    """Raises ValueError if a table would be too large.

    Args:
      columns: its columns.
      states: its rows.
      name: what the automaton is called in messages.
    """
    if columns * states > MOST_ENTRIES:
        raise ValueError(
            f"{name} has {states} states, between which the vocabulary's tokens lead in more than "
            f"{MOST_ENTRIES // states} ways: make it smaller"
        )
