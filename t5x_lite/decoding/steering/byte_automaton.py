# SPDX-License-Identifier: Apache-2.0
"""Deterministic automata over the bytes of a text: of an expression, of texts to find.

s states
"""

import functools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

END = 256  # the end of a text, among the bytes of edges
MOST_ROUNDS = 500  # of `minimize`: a second for 3,000 states


class ByteAutomaton(NamedTuple):
    """Automaton over bytes.

    Attributes:
      following: [s 256] int32, state after each byte; -1 where there is none.
      final: [s] bool, states in which a text may end.
      start: state of an empty text.
    """

    following: np.ndarray
    final: np.ndarray
    start: int


def automaton_of_edges(start: int, edges: np.ndarray) -> ByteAutomaton:
    """Returns the automaton of transitions.

    Args:
      start: first state.
      edges: [n 3] state, byte or END, state after it.
    """
    names = np.unique(np.concatenate([[start], edges[:, 0], edges[:, 2]]))
    before, byte, after = np.searchsorted(names, edges[:, 0]), edges[:, 1], edges[:, 2]
    following = np.full((len(names), END + 1), -1, np.int32)
    following[before, byte] = np.searchsorted(names, after)
    return ByteAutomaton(
        following[:, :END], following[:, END] >= 0, int(np.searchsorted(names, start))
    )


def minimize(automaton: ByteAutomaton) -> ByteAutomaton:
    """Returns the smallest automaton of the same texts (Moore, 1956), without states that lead
    nowhere; with these alone removed where it takes many rounds."""
    columns, classes = np.unique(automaton.following, axis=1, return_inverse=True)
    alive = automaton.final.copy()
    while True:
        more = alive | np.any((columns >= 0) & alive[np.maximum(columns, 0)], axis=1)
        if (more == alive).all():
            break
        alive = more
    columns = np.where((columns >= 0) & alive[np.maximum(columns, 0)], columns, -1)
    group = np.where(alive, 1 + automaton.final, 0)
    count = 0
    for _ in range(MOST_ROUNDS):
        after = np.where(columns >= 0, group[np.maximum(columns, 0)], -1)
        rows = hash_rows(np.concatenate([group[:, None], after], axis=1))
        _, first, group = np.unique(rows, return_index=True, return_inverse=True)
        if len(first) == count:
            break
        count = len(first)
    else:
        first = group = np.arange(len(columns))
    after = np.where(columns >= 0, group[np.maximum(columns, 0)], -1)[first]
    reached = reachable(after, int(group[automaton.start]))
    number = np.cumsum(reached) - 1
    after = np.where(after >= 0, number[np.maximum(after, 0)], -1)[reached]
    return ByteAutomaton(
        after[:, classes.reshape(-1)].astype(np.int32),
        automaton.final[first][reached],
        int(number[group[automaton.start]]),
    )


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Hashes rows [n m] of integers to 64 bits each (SplitMix64; Steele, Lea and Flood, 2014)."""
    places = np.arange(rows.shape[1], dtype=np.uint64) << np.uint64(32)
    mixed = (rows.astype(np.uint64) + np.uint64(2) + places) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.sum(mixed ^ (mixed >> np.uint64(31)), axis=1)


def reachable(following: np.ndarray, start: int) -> np.ndarray:
    """Marks the states [s] that some text leads to.

    Args:
      following: [s c] state after a byte of each class; -1 where there is none.
      start: first state.
    """
    reached = np.zeros(len(following), bool)
    front = np.array([start])
    while len(front):
        reached[front] = True
        after = np.unique(following[front])
        front = after[(after >= 0) & ~reached[np.maximum(after, 0)]]
    return reached


def find_texts(texts: Sequence[bytes]) -> ByteAutomaton:
    """Returns the automaton of all bytes that contain one of several texts (Aho and Corasick, 1975,
    doi 10.1145/360825.360855); its last state is the one after the first occurrence.

    Args:
      texts: what is looked for, none of them empty.
    """
    trie: list[dict[int, int]] = [{}]
    ends = set()
    for text in texts:
        node = 0
        for byte in text:
            if byte not in trie[node]:
                trie[node][byte] = len(trie)
                trie.append({})
            node = trie[node][byte]
        ends.add(node)
    following = np.zeros((len(trie) + 1, 256), np.int32)
    longest_suffix, queue = [0] * len(trie), deque([0])
    while queue:
        node = queue.popleft()
        if node:
            following[node] = following[longest_suffix[node]]
        if longest_suffix[node] in ends:
            ends.add(node)
        for byte, child in trie[node].items():
            longest_suffix[child] = int(following[node, byte]) if node else 0
            following[node, byte] = child
            queue.append(child)
    last = len(trie)
    following[np.isin(following, [*ends])] = last
    following[last] = last
    return ByteAutomaton(following, np.arange(last + 1) == last, 0)


def avoid_texts(texts: Sequence[bytes]) -> ByteAutomaton:
    """Returns the automaton of all bytes that contain none of several texts."""
    finder = find_texts(texts)
    last = len(finder.following) - 1
    after = np.where(finder.following == last, -1, finder.following)[:last]
    return ByteAutomaton(after, np.ones(last, bool), finder.start)


def begin_with(texts: Sequence[bytes]) -> tuple[ByteAutomaton, list[int]]:
    """Returns the automaton of all bytes, and for each of several texts the state from which they
    begin with it."""
    following = np.full((1 + sum(map(len, texts)), 256), -1, np.int32)
    following[0] = 0
    starts, state = [], 1
    for text in texts:
        starts.append(state if text else 0)
        for place, byte in enumerate(text, 1):
            following[state, byte] = 0 if place == len(text) else state + 1
            state += 1
    return ByteAutomaton(following, np.arange(len(following)) == 0, 0), starts


def intersect(first: ByteAutomaton, second: ByteAutomaton, most: int, name: str) -> ByteAutomaton:
    """Returns the smallest automaton of the texts of both.

    Args:
      first: an automaton.
      second: another one.
      most: most states of their product.
      name: what the product is called in messages.

    Raises:
      ValueError: it has more states.
    """
    size = len(second.following)
    front = np.array([first.start * size + second.start])
    known, rows = front, []
    while len(front):
        one, other = first.following[front // size], second.following[front % size]
        after = np.where((one >= 0) & (other >= 0), one * size + other, -1)
        rows.append(after)
        front = np.setdiff1d(after[after >= 0], known)
        known = np.concatenate([known, front])
        if len(known) > most:
            raise ValueError(f"{name} needs more than {most} states: make it smaller")
    order = np.argsort(known)
    after = np.concatenate(rows)
    place = order[np.searchsorted(known[order], np.maximum(after, known.min()))]
    both = first.final[known // size] & second.final[known % size]
    return minimize(ByteAutomaton(np.where(after >= 0, place, -1), both, 0))


@functools.cache
def valid_text() -> ByteAutomaton:
    """Returns the automaton of all texts in UTF-8 (RFC 3629, section 4)."""
    edges = []
    ranges = [
        (0, 0x00, 0x7F, 0),
        (0, 0xC2, 0xDF, 1),
        (0, 0xE0, 0xE0, 4),
        (0, 0xE1, 0xEC, 2),
        (0, 0xED, 0xED, 5),
        (0, 0xEE, 0xEF, 2),
        (0, 0xF0, 0xF0, 6),
        (0, 0xF1, 0xF3, 3),
        (0, 0xF4, 0xF4, 7),
        (1, 0x80, 0xBF, 0),
        (2, 0x80, 0xBF, 1),
        (3, 0x80, 0xBF, 2),
        (4, 0xA0, 0xBF, 1),
        (5, 0x80, 0x9F, 1),
        (6, 0x90, 0xBF, 2),
        (7, 0x80, 0x8F, 2),
    ]
    for state, lowest, highest, after in ranges:
        edges += [(state, byte, after) for byte in range(lowest, highest + 1)]
    return automaton_of_edges(0, np.array([*edges, (0, END, 0)], np.int32))
