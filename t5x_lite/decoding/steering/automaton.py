# SPDX-License-Identifier: Apache-2.0
"""Constraint of new texts to a regular language, as a table on the device.

Tokens that lead to the same state from every state share a class, so that the table has a column
for each class and not for each of the 262,144 ids of a vocabulary.

b rows    w nodes of a block    v vocabulary    s states    c classes
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding.steering.processor import DraftPaths, Text, per_row

NEVER = 2**30


class ConstraintState(NamedTuple):
    """State of a TokenAutomaton.

    Attributes:
      state: state of the automaton after the text of each row.
      budget: most new tokens that each row can still get, its end included.
    """

    state: Int[Array, " b"]
    budget: Int[Array, " b"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["following", "tokens_left", "classes", "start", "budget"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TokenAutomaton:
    """Allows the tokens after which the text can still be finished within its limit.

    Every text ends in the language, and never because of the limit.

    Attributes:
      following: state after a token of each class; -1 where there is none.
      tokens_left: fewest tokens of a text that goes on with a token of each class, that token and
        the one that ends the text included; NEVER where there is none.
      classes: class of each token.
      start: state of an empty text of each row.
      budget: most new tokens of each row.
    """

    following: Int[Array, "s c"]
    tokens_left: Int[Array, "s c"]
    classes: Int[Array, " v"]
    start: Int[Array, " b"]
    budget: Int[Array, " b"]

    def begin(self, text: Text, vocab: int) -> ConstraintState:
        """Returns the first state for each row; of a prompt nothing counts."""
        return ConstraintState(self.start, self.budget)

    def process(
        self, state: ConstraintState, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits, minus infinity for tokens that are not allowed.

        Args:
          state: state of each row.
          text: the rows up to the root; unused.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        width, depth = paths.exists.shape
        here = jnp.broadcast_to(state.state[:, None], (state.state.shape[0], width))
        here = sharding.by_rows(here)
        for place in range(depth):
            after = self.step(here, paths.tokens[:, :, place])
            here = jnp.where(paths.exists[:, place], after, here)
        left = take_rows(self.tokens_left, here)
        allowed = left <= per_row(state.budget) - paths.depth[:, None]
        allowed = jax.vmap(lambda row: row[:, self.classes])(allowed)
        return jnp.where(allowed, logits, -jnp.inf)

    def observe(
        self, state: ConstraintState, tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> ConstraintState:
        """Returns the state after more tokens.

        Args:
          state: state before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        here = state.state
        for place in range(tokens.shape[1]):
            here = jnp.where(place < count, self.step(here, tokens[:, place]), here)
        return ConstraintState(here, state.budget - count)

    def find_banks(self, state: ConstraintState, count: int) -> Int[Array, "b v"]:
        """Returns the share of the way to the end that a text has gone after each token.

        Args:
          state: state of each row.
          count: number of banks that the way is divided into.

        Returns:
          0 for a token that brings the text no nearer to its end, to count - 1 where no more than
          the end is missing.
        """
        shortest = jnp.min(take_rows(self.tokens_left, self.start))
        gone = shortest + 1 - take_rows(self.tokens_left, state.state)
        banks = jnp.clip(jnp.maximum(gone, 0) * count // shortest, 0, count - 1)
        return jax.vmap(lambda row: row[self.classes])(banks)

    def step(self, state: Int[Array, "b ..."], token: Int[Array, "b ..."]) -> Int[Array, "b ..."]:
        """Returns the states after one token each; any state after one that is not allowed."""
        columns = take_rows(self.classes, jnp.maximum(token, 0))
        flat = state * self.following.shape[1] + columns
        return jnp.maximum(take_rows(self.following.reshape(-1), flat), 0)


def take_rows(table: Int[Array, "n ..."], index: Int[Array, "b ..."]) -> Int[Array, "b ..."]:
    """Returns entries of a table that every device has, placed as the rows of the index are."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(table)[index]
    placed = sharding.spec("batch" + " whole" * (index.ndim + table.ndim - 2))
    return jnp.asarray(table).at[index].get(out_sharding=placed)
