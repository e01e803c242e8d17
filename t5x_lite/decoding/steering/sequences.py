# SPDX-License-Identifier: Apache-2.0
"""Processors of token sequences: biased or forbidden ones, repeated n-grams, lengths, beginnings.

b rows    w nodes of a block    v vocabulary    m sequences    n tokens of a sequence
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding.steering.processor import DraftPaths, Text, last_tokens, per_row
from t5x_lite.utils.not_none import not_none


class TextProcessor:
    """Base of processors whose state does not change: the text has all they need."""

    def begin(self, text: Text, vocab: int) -> Any:
        """Returns no state."""
        return ()

    def observe(self, state: Any, tokens: Int[Array, "b D"], count: Int[Array, " b"]) -> Any:
        """Returns the same state.

        Args:
          state: the state.
          tokens: tokens that were added; unused.
          count: how many of them; unused.
        """
        return state


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["before", "last", "bias"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SequenceBias(TextProcessor):
    """Adds a bias to the logit of the last token of a sequence where the ones before it stand.

    A sequence of one token is biased everywhere. A bias of minus infinity forbids the sequence: bad
    words, suppressed tokens.

    Attributes:
      before: tokens of each sequence but its last, right-aligned; -1 in front of shorter ones.
      last: last token of each sequence.
      bias: what is added; for a token that ends several sequences, their sum.
    """

    before: Int[Array, "m n"]
    last: Int[Array, " m"]
    bias: Float[Array, " m"]

    def process(
        self, state: tuple, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits with the biases of the sequences that would be completed.

        Args:
          state: none.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        length = self.before.shape[1]
        here = last_tokens(text, paths, length)[:, :, None]
        match = jnp.all((self.before < 0) | (here == self.before), axis=-1)
        added = jnp.where(match, self.bias, 0.0)
        return scatter_add(logits, jnp.broadcast_to(self.last, added.shape), added)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size"])
@dataclass(frozen=True)
class NoRepeatNgram(TextProcessor):
    """Forbids every token that would complete an n-gram that prompt or text already has.

    Attributes:
      size: n, 1 or more.
    """

    size: int

    def process(
        self, state: tuple, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits without the tokens that would repeat an n-gram.

        Args:
          state: none.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        if self.size > text.tokens.shape[1]:
            return logits  # no text is so long
        rows = rows_of_nodes(text, paths)
        length = text.length[:, None] + paths.depth
        context = last_tokens(text, paths, self.size - 1) if self.size > 1 else None
        slots = rows.shape[-1] - self.size + 1
        match = jnp.arange(slots) + self.size <= length[:, :, None]
        for place in range(self.size - 1):
            same = rows[:, :, place : place + slots] == not_none(context)[:, :, place, None]
            match = match & same
        banned = jnp.where(match, -jnp.inf, 0.0)
        return scatter_add(logits, rows[:, :, self.size - 1 :], banned)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["least", "eos"], meta_fields=[])
@dataclass(frozen=True)
class MinNewTokens(TextProcessor):
    """Forbids the end of a text before it has so many new tokens.

    Attributes:
      least: number of new tokens that must precede EOS.
      eos: ids that end a text.
    """

    least: Int[Array, " b"]
    eos: Int[Array, " e"]

    def begin(self, text: Text, vocab: int) -> Int[Array, " b"]:
        """Returns the least number of each row."""
        return self.least

    def process(
        self, state: Int[Array, " b"], text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits, those of EOS minus infinity where the text is too short.

        Args:
          state: the least number of each row.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        short = count_new(text, paths)[:, :, None] < per_row(state)
        stops = jnp.any(jnp.arange(logits.shape[-1]) == self.eos[:, None], axis=0)
        return jnp.where(short & stops, -jnp.inf, logits)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "length"], meta_fields=[]
)
@dataclass(frozen=True)
class ForcedBeginning(TextProcessor):
    """Allows one token alone at each of the first places of the new text.

    Attributes:
      tokens: the tokens of each row.
      length: how many of them a row has.
    """

    tokens: Int[Array, "b n"]
    length: Int[Array, " b"]

    def begin(self, text: Text, vocab: int) -> tuple[Int[Array, "b n"], Int[Array, " b"]]:
        """Returns the tokens of each row and how many they are."""
        return self.tokens, self.length

    def process(
        self,
        state: tuple[Int[Array, "b n"], Int[Array, " b"]],
        text: Text,
        paths: DraftPaths,
        logits: Float[Array, "b w v"],
    ) -> Float[Array, "b w v"]:
        """Returns the logits, minus infinity but for a forced token.

        Args:
          state: the tokens of each row and how many they are.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        tokens, length = state
        place = count_new(text, paths)
        at = jnp.minimum(place, tokens.shape[1] - 1)
        token = jax.vmap(lambda row, at: row[at])(*sharding.by_rows((tokens, at)))
        forced = place[:, :, None] < per_row(length)
        other = jnp.arange(logits.shape[-1]) != token[:, :, None]
        return jnp.where(forced, jnp.where(other, -jnp.inf, 0.0), logits)


def count_new(text: Text, paths: DraftPaths) -> Int[Array, "b w"]:
    """Number of new tokens before the next token of each node."""
    return (text.length - text.prompt)[:, None] + paths.depth


def rows_of_nodes(text: Text, paths: DraftPaths) -> Int[Array, "b w T"]:
    """Returns the text of each row with the draft tokens before each node written after it."""
    width, depth = paths.exists.shape
    slots = jnp.arange(text.tokens.shape[1])
    rows = jnp.broadcast_to(
        text.tokens[:, None], (text.tokens.shape[0], width, text.tokens.shape[1])
    )
    for place in range(depth):
        here = (slots == text.length[:, None] + place)[:, None]
        written = here & paths.exists[:, place, None]
        rows = jnp.where(written, paths.tokens[:, :, place, None], rows)
    return rows


def scatter_add(
    logits: Float[Array, "b w v"], tokens: Int[Array, "b w m"], added: Float[Array, "b w m"]
) -> Float[Array, "b w v"]:
    """Adds to the logits of tokens, several times where a token is named so often.

    Args:
      logits: scores of the tokens.
      tokens: ids to add to; those below 0 are left out.
      added: what is added to each.
    """

    def add_node(logits, tokens, added):
        places = jnp.where(tokens < 0, logits.shape[0], tokens)
        return logits.at[places].add(added.astype(logits.dtype), mode="drop")

    return jax.vmap(jax.vmap(add_node))(*sharding.by_rows((logits, tokens, added)))
