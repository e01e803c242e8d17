# SPDX-License-Identifier: Apache-2.0
"""Regular expressions, JSON schemas and lists of choices as automata over the ids of a vocabulary.

outlines-core turns an expression into transitions between states by ids; here they become the
tables of a TokenAutomaton, which are kept on disk.
"""

import functools
import hashlib
import io
import json
import re
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.decoding.steering.automaton import NEVER, TokenAutomaton
from t5x_lite.decoding.steering.patterns import constraint_pattern, import_outlines
from t5x_lite.tokenizers.token_bytes import TokenBytes, token_bytes
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import cache_folder

FORMAT = 1  # raised when the same expression gives another table
# Ends a text for outlines-core, which from a state where a text may end drops the tokens that lead
# to one where it may not (0.2.14): "3" of \d+(\.\d+)? would never go on with a point.
END = "\U0010ffff"
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
      ValueError: it is not an expression or schema, cannot be bounded, or has no text that the
        vocabulary can spell within Decode.max_new_tokens.
    """
    pattern, name = constraint_pattern(decode)
    if pattern is None:
        return None
    table = load_table(pattern, vocabulary_bytes(vocabulary), tuple(vocabulary.stops), vocab, name)
    if table.shortest > decode.max_new_tokens:
        raise ValueError(
            f"The shortest text of {name} has {table.shortest} tokens with its end, and "
            f"Decode.max_new_tokens is {decode.max_new_tokens}"
        )
    return table


@functools.lru_cache(maxsize=8)
def vocabulary_bytes(vocabulary: TextVocabulary) -> TokenBytes:
    """Returns the bytes of a vocabulary's ids, once for each vocabulary."""
    return token_bytes(vocabulary)


def load_table(
    pattern: str, vocabulary: TokenBytes, stops: tuple[int, ...], vocab: int, name: str
) -> ConstraintTable:
    """Returns the table of an expression, from the cache if it has been compiled before.

    Args:
      pattern: the regular expression.
      vocabulary: bytes of the ids.
      stops: ids that end a text.
      vocab: size of the model's vocabulary.
      name: what the expression is called in messages.
    """
    identity = json.dumps(
        [FORMAT, pattern, stops, vocab, vocabulary.lead.hex(), vocabulary.always]
    ).encode()
    digest = hashlib.sha256(identity)
    for token, text in sorted(vocabulary.by_id.items()):
        digest.update(b"%d:%d:%b" % (token, len(text), text))
    path = cache_folder(FOLDER) / f"{digest.hexdigest()[:32]}.npz"
    cached = read_table(path)
    if cached is None:
        cached = compile_table(pattern, vocabulary, stops, vocab, name)
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
    pattern: str, vocabulary: TokenBytes, stops: Sequence[int], vocab: int, name: str
) -> ConstraintTable:
    """Compiles an expression to a table.

    Args:
      pattern: the regular expression.
      vocabulary: bytes of the ids.
      stops: ids that end a text.
      vocab: size of the model's vocabulary.
      name: what the expression is called in messages.

    Raises:
      ValueError: it is not an expression, or the ids can spell no text of it.
    """
    core = import_outlines()
    ids: dict[bytes, list[int]] = {}
    for token, text in vocabulary.by_id.items():
        if token < vocab:
            ids.setdefault(text, []).append(token)
    lead = re.escape(vocabulary.lead.decode())
    lead = lead if vocabulary.always or not lead else f"({lead})?"
    end, eos = vocab, vocab + 1
    ids[END.encode()] = [end]
    try:
        index = core.Index(f"{lead}({pattern}){END}", core.Vocabulary(eos, ids))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be followed: {error}") from None
    transitions, ended = index.get_transitions(), index.get_final_states()
    finals = {state for state, row in transitions.items() if row.get(end) in ended}
    edges = {
        state: {token: after for token, after in row.items() if token < vocab}
        for state, row in transitions.items()
    }
    states = {
        state: number
        for number, state in enumerate(sorted({index.get_initial_state(), *ended, *edges}))
    }
    table = make_table([edges.get(state, {}) for state in states], states, finals, stops, vocab)
    start = states[index.get_initial_state()]
    if table.tokens_left[start].min() == NEVER:
        raise ValueError(f"No text of {name} can be spelled with the tokens of the vocabulary")
    return table._replace(start=np.array(start, np.int32))


def make_table(
    edges: list[dict[int, int]],
    states: dict[int, int],
    finals: set[int],
    stops: Sequence[int],
    vocab: int,
) -> ConstraintTable:
    """Returns the table of transitions, with a class for tokens that behave alike.

    Args:
      edges: for each state the states after each token.
      states: number of each state.
      finals: states in which a text may end.
      stops: ids that end a text.
      vocab: size of the model's vocabulary.
    """
    renumber = np.full(max(states) + 1, -1, np.int32)
    renumber[[*states]] = [*states.values()]
    tokens = [np.fromiter(row.keys(), np.int64, len(row)) for row in edges]
    after = [renumber[np.fromiter(row.values(), np.int64, len(row))] for row in edges]
    # Tokens whose hashes of (state, state after it) have equal sums have equal columns.
    sums = np.zeros(vocab, np.uint64)
    for state, (row, to) in enumerate(zip(tokens, after, strict=True)):
        sums[row] += hash_integers(state * len(edges) + to)
    sums[[*stops]] = 0
    _, first, classes = np.unique(sums, return_index=True, return_inverse=True)
    ends = len(first)  # class of the ids that end a text
    following = np.full((len(edges), ends + 1), -1, np.int32)
    for state, (row, to) in enumerate(zip(tokens, after, strict=True)):
        following[state, classes[row]] = to
    classes[[*stops]] = ends
    final = np.array([state in finals for state in states])
    following[final, ends] = np.flatnonzero(final)
    left = count_tokens_left(following[:, :ends], final)
    tokens_left = np.where(
        following >= 0, np.minimum(left[np.maximum(following, 0)] + 1, NEVER), NEVER
    )
    tokens_left[final, ends] = 1
    return ConstraintTable(
        pad_table(following, -1),
        pad_table(tokens_left, NEVER),
        classes.astype(np.int32),
        np.array(0, np.int32),
    )


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


def hash_integers(values: np.ndarray) -> np.ndarray:
    """Hashes integers to 64 bits (SplitMix64; Steele, Lea and Flood, 2014)."""
    mixed = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def count_tokens_left(following: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Fewest tokens [s] with which a text can be finished from each state, its end included.

    Args:
      following: [s c] state after a token of each class, or -1.
      final: [s] states in which a text may end.
    """
    left = np.where(final, 1, NEVER).astype(np.int64)
    while True:
        after = np.where(following >= 0, left[np.maximum(following, 0)], NEVER)
        shorter = np.minimum(left, after.min(axis=1, initial=NEVER) + 1)
        if (shorter == left).all():
            return left
        left = shorter


def make_automaton(table: ConstraintTable, limit: np.ndarray) -> TokenAutomaton:
    """Returns the processor of a table.

    Args:
      table: the table.
      limit: [b] most new tokens of each row.
    """
    arrays: Any = (*table, np.asarray(limit, np.int32))
    return TokenAutomaton(*arrays)
