# SPDX-License-Identifier: Apache-2.0
"""Texts that end a row, wherever they stand in its tokens.

b rows    D tokens    v vocabulary    s states    c classes of tokens
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from t5x_lite import config, sharding
from t5x_lite.decoding.steering.automaton import take_rows
from t5x_lite.decoding.steering.byte_automaton import find_texts
from t5x_lite.decoding.steering.constraints import find_constraint, vocabulary_bytes
from t5x_lite.decoding.steering.token_table import token_transitions
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class StopTable(NamedTuple):
    """Arrays of StopStrings, see there.

    Attributes:
      following: [s c] int32.
      classes: [v] int32.
      start: [] int32.
      last: [] int32.
    """

    following: np.ndarray
    classes: np.ndarray
    start: np.ndarray
    last: np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["following", "classes", "start", "last"],
    meta_fields=[],
)
@dataclass(frozen=True)
class StopStrings:
    """Stops a row with the token that completes one of several texts in its new tokens.

    Attributes:
      following: state after a token of each class.
      classes: class of each token.
      start: state of an empty text.
      last: state of a text that has one of the texts.
    """

    following: Int[Array, "s c"]
    classes: Int[Array, " v"]
    start: Int[Array, ""]
    last: Int[Array, ""]

    def begin(self, length: Int[Array, " b"]) -> Int[Array, " b"]:
        """Returns the first state for each row."""
        return sharding.by_rows(jnp.zeros_like(length) + self.start)

    def states(self, state: Int[Array, " b"], tokens: Int[Array, "b D"]) -> Int[Array, "b D"]:
        """Returns the state after each of some more tokens."""
        after = []
        for place in range(tokens.shape[1]):
            column = take_rows(self.classes, jnp.maximum(tokens[:, place], 0))
            flat = state * self.following.shape[1] + column
            state = take_rows(self.following.reshape(-1), flat)
            after.append(state)
        return jnp.stack(after, axis=1)

    def complete(self, state: Int[Array, " b"], tokens: Int[Array, "b D"]) -> Bool[Array, "b D"]:
        """Returns True for each token at which a text is complete."""
        return self.states(state, tokens) == self.last

    def observe(
        self, state: Int[Array, " b"], tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        """Returns the state after more tokens.

        Args:
          state: state before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        after = self.states(state, tokens)
        at = jnp.arange(tokens.shape[1]) == count[:, None] - 1
        return jnp.where(count > 0, jnp.sum(jnp.where(at, after, 0), axis=1), state)


def find_stops(decode: config.Decode, vocabulary: TextVocabulary, vocab: int) -> StopTable | None:
    """Returns the table of the texts that end a row; None if a config names none.

    Args:
      decode: the config.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.

    Raises:
      ValueError: the vocabulary does not say what its ids write.
    """
    return compile_stops(tuple(decode.stop), vocabulary, vocab) if decode.stop else None


@functools.lru_cache(maxsize=32)
def compile_stops(stop: tuple[str, ...], vocabulary: TextVocabulary, vocab: int) -> StopTable:
    """Returns the table of texts that end a row, once for each.

    Args:
      stop: the texts.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.

    Raises:
      ValueError: the vocabulary does not say what its ids write.
    """
    automaton = find_texts([each.encode() for each in stop])
    moves = token_transitions(automaton, vocabulary_bytes(vocabulary), vocab, "Decode.stop")
    # Tokens that write nothing change nothing.
    here = np.arange(len(moves.following), dtype=np.int32)[:, None]
    return StopTable(
        np.where(moves.following < 0, here, moves.following),
        moves.classes,
        np.array(moves.start, np.int32),
        np.array(len(automaton.following) - 1, np.int32),
    )


def find_tables(decode: config.Decode, vocabulary: TextVocabulary, vocab: int) -> dict[str, Any]:
    """Returns the tables of a request: `constraint` and `stop`, each None if a config names none.

    Args:
      decode: the config.
      vocabulary: vocabulary of the new texts.
      vocab: size of the model's vocabulary.

    Raises:
      ValueError: a constraint or a stop cannot be followed.
    """
    return {
        "constraint": find_constraint(decode, vocabulary, vocab),
        "stop": find_stops(decode, vocabulary, vocab),
    }


def cut_text(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of several texts in it."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)] if places else text


def settled_text(text: str, stops: Sequence[str]) -> str:
    """Returns the part of a growing text that stays whatever follows: no stop begins in it."""
    cut = cut_text(text, stops)
    if cut != text:
        return cut
    open_ = max(
        (size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
    return text[: len(text) - open_]
