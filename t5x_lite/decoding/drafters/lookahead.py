# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding: n-grams from Jacobi iterations, drafted where their first token comes up.

Fu et al., 2024, arXiv 2402.02057. Their attention mask is that of a tree: the oldest level of the
window, `window` places after the root, is a chain; below each of its nodes hangs what the model
made of it in the iterations since; and below the root hang the n-grams that begin with it.

  b rows    w nodes of a block    W places of the window    L levels, the n of n-grams less 1
  H slots of the pool    G n-grams of a slot    p prompt or input tokens
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, Tree, VerifyOutput


class NgramPool(NamedTuple):
    """The last G different n-grams of each first token.

    Attributes:
      token: the first token that a slot belongs to; -1 for none.
      following: what followed it.
      written: how many n-grams were written to the slot.
    """

    token: Int[Array, "b H"]
    following: Int[Array, "b H G L"]
    written: Int[Array, "b H"]


class LookaheadState(NamedTuple):
    """State of Lookahead.

    Attributes:
      window: tokens of the window, the oldest level first.
      pool: the n-grams.
    """

    window: Int[Array, "b L W"]
    pool: NgramPool


@functools.cache
def lookahead_tree(window: int, levels: int, candidates: int) -> Tree:
    """Returns the tree of the root, the window level by level, then the n-grams.

    Args:
      window: W.
      levels: L.
      candidates: G.
    """
    parents = [-1, *range(window)]
    parents += [len(parents) - window + i for i in range(window * (levels - 1))]
    for _ in range(candidates):
        parents += [0, *range(len(parents), len(parents) + levels - 1)]
    return Tree(tuple(parents))


@dataclass(frozen=True)
class Lookahead:
    """Drafts the window, and up to `candidates` n-grams that begin with the root.

    Attributes:
      window: W, places of the window.
      ngram: n of the n-grams.
      candidates: G, n-grams of a first token.
      slots: H, slots of the pool; a first token has the slot of its remainder.
      top: 0.

    Raises:
      ValueError: a number is too small.
    """

    window: int = 5
    ngram: int = 4
    candidates: int = 5
    slots: int = 1024
    top: int = 0

    def __post_init__(self):
        if min(self.window, self.candidates, self.slots) < 1 or self.ngram < 2:
            raise ValueError(
                "Lookahead needs window, candidates and slots of at least 1, and ngram of at least "
                f"2; got {self.window}, {self.candidates}, {self.slots}, {self.ngram}"
            )

    @property
    def levels(self) -> int:
        """L."""
        return self.ngram - 1

    @property
    def tree(self) -> Tree:
        """Window and n-grams below the root."""
        return lookahead_tree(self.window, self.levels, self.candidates)

    def begin(self, context: DecodeContext) -> LookaheadState:
        """Fills window and pool from the prompts and, if there are any, the encoder's inputs."""
        tokens, length = context.prompts
        if context.inputs is None:
            return jax.vmap(self.initial_row)(tokens, length)
        first = jax.vmap(self.initial_row)(context.inputs, context.inputs_length)
        return first._replace(pool=jax.vmap(self.add_ngrams)(first.pool, tokens, length))

    def propose(
        self, context: DecodeContext, drafter_state: LookaheadState, state: DecodeState
    ) -> tuple[Draft, LookaheadState]:
        """Returns the window, and the n-grams of the root.

        Args:
          context: constants of the request; unused.
          drafter_state: window and pool.
          state: state of the loop.
        """

        def propose_row(row, root):
            slot = root % self.slots
            known = row.pool.token[slot] == root
            ngrams = jnp.where(known, row.pool.following[slot], -1)
            return jnp.concatenate([row.window.reshape(-1), ngrams.reshape(-1)])

        return Draft(jax.vmap(propose_row)(drafter_state, state.root)), drafter_state

    def observe(
        self,
        context: DecodeContext,
        drafter_state: LookaheadState,
        state: DecodeState,
        output: VerifyOutput,
    ) -> LookaheadState:
        """Adds the n-grams of the window to the pool, and moves the window on.

        Args:
          context: constants of the request; unused.
          drafter_state: window and pool.
          state: state of the loop; unused.
          output: the model's choices after the newest level of the window.
        """
        newest = slice(1 + (self.levels - 1) * self.window, 1 + self.levels * self.window)

        def observe_row(row, chosen, count):
            columns = jnp.concatenate([row.window, chosen[None]])

            def insert(place, pool):
                return self.insert_ngram(pool, columns[0, place], columns[1:, place], True)

            pool = jax.lax.fori_loop(0, self.window, insert, row.pool)
            # The text has advanced by `count`, and a new level by one of them.
            onward = (jnp.arange(self.window) + jnp.maximum(count - 1, 0)) % self.window
            return LookaheadState(columns[1:][:, onward], pool)

        return jax.vmap(observe_row)(drafter_state, output.chosen[:, newest], output.count)

    def initial_row(self, tokens: Int[Array, " p"], length: Int[Array, ""]) -> LookaheadState:
        """Returns one row's state: a window of the first tokens, and the n-grams of all."""
        place = jnp.arange(self.levels)[:, None] + jnp.arange(self.window)
        # Constants depend on the row, so that they are split over a mesh as rows are.
        zero = 0 * length
        pool = NgramPool(
            token=zero + jnp.full(self.slots, -1),
            following=zero + jnp.full((self.slots, self.candidates, self.levels), -1),
            written=zero + jnp.zeros(self.slots, jnp.int32),
        )
        window = tokens[place % jnp.maximum(length, 1)]
        return LookaheadState(window, self.add_ngrams(pool, tokens, length))

    def add_ngrams(
        self, pool: NgramPool, tokens: Int[Array, " p"], length: Int[Array, ""]
    ) -> NgramPool:
        """Adds the n-grams of tokens to one row's pool.

        Args:
          pool: the row's pool.
          tokens: the tokens.
          length: how many of them exist.
        """

        def insert(place, pool):
            following = jax.lax.dynamic_slice_in_dim(tokens, place + 1, self.levels)
            return self.insert_ngram(pool, tokens[place], following, place + self.levels < length)

        if len(tokens) <= self.levels:
            return pool
        return jax.lax.fori_loop(0, len(tokens) - self.levels, insert, pool)

    def insert_ngram(
        self,
        pool: NgramPool,
        token: Int[Array, ""],
        following: Int[Array, " L"],
        valid: Bool[Array, ""] | bool,
    ) -> NgramPool:
        """Writes an n-gram over the oldest of its slot, unless it is there already.

        Args:
          pool: one row's pool.
          token: first token of the n-gram.
          following: the others.
          valid: False leaves the pool as it is.
        """
        slot = token % self.slots
        same = pool.token[slot] == token
        ngrams = jnp.where(same, pool.following[slot], -1)
        written = jnp.where(same, pool.written[slot], 0)
        known = jnp.any(jnp.all(ngrams == following, axis=1))
        oldest = jnp.arange(self.candidates) == written % self.candidates
        ngrams = jnp.where(oldest[:, None], following, ngrams)
        slot = jnp.where(valid & ~known, slot, self.slots)

        def write(table, value):
            return table.at[slot].set(value, mode="drop")

        return NgramPool(*map(write, pool, (token, ngrams, written + 1)))
