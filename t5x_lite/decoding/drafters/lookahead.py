# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding: n-grams gathered from Jacobi iterations beside the text, tried when met.

Fu et al., 2024, arXiv 2402.02057. Their attention mask is that of a tree: the oldest guesses, at
`window` places after the root, are a chain; below each of them hangs what the model made of it in
the iterations since; and below the root hang the n-grams that begin with it.

  b rows    w nodes of a block    W places of the window    L levels, the n of n-grams less 1
  H slots of the pool    G n-grams of a slot
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite.decoding.protocol import Draft, Tree


class Pool(NamedTuple):
    """The last G different n-grams by first token (-1: none): what followed it."""

    token: Int[Array, "b H"]
    following: Int[Array, "b H G L"]
    written: Int[Array, "b H"]


class Memory(NamedTuple):
    """The window, oldest level first, and the pool."""

    window: Int[Array, "b L W"]
    pool: Pool


@functools.cache
def block(window: int, levels: int, guesses: int) -> Tree:
    """The root, the window level by level, then the n-grams one after the other."""
    parents = [-1, *range(window)]
    parents += [len(parents) - window + i for i in range(window * (levels - 1))]
    for _ in range(guesses):
        parents += [0, *range(len(parents), len(parents) + levels - 1)]
    return Tree(tuple(parents))


@dataclass(frozen=True)
class Lookahead:
    """Drafts the window and up to `guesses` n-grams of `ngram` tokens that begin with the root."""

    window: int = 5
    ngram: int = 4
    guesses: int = 5
    slots: int = 1024
    top: int = 0

    def __post_init__(self):
        if min(self.window, self.guesses, self.slots) < 1 or self.ngram < 2:
            raise ValueError(
                "Lookahead needs window, guesses and slots of at least 1, and ngram of at least 2; "
                f"got {self.window}, {self.guesses}, {self.slots}, {self.ngram}"
            )

    @property
    def levels(self) -> int:
        return self.ngram - 1

    @property
    def tree(self) -> Tree:
        return block(self.window, self.levels, self.guesses)

    def begin(self, setting) -> Memory:
        tokens, length = setting.prompts
        memory = jax.vmap(self.begun)(tokens, length)
        if setting.inputs is None:
            return memory
        given = jax.vmap(self.begun)(setting.inputs, setting.inputs_length)
        return Memory(given.window, jax.vmap(self.gathered)(given.pool, tokens, length))

    def propose(self, setting, memory: Memory, state):
        def row(memory, root):
            slot = root % self.slots
            known = memory.pool.token[slot] == root
            grams = jnp.where(known, memory.pool.following[slot], -1)
            return jnp.concatenate([memory.window.reshape(-1), grams.reshape(-1)])

        return Draft(jax.vmap(row)(memory, state.root)), memory

    def observe(self, setting, memory: Memory, state, verdict) -> Memory:
        newest = slice(1 + (self.levels - 1) * self.window, 1 + self.levels * self.window)

        def row(memory, chosen, count):
            seen = jnp.concatenate([memory.window, chosen[None]])
            insert = lambda place, pool: self.inserted(pool, seen[0, place], seen[1:, place], True)
            pool = jax.lax.fori_loop(0, self.window, insert, memory.pool)
            # The text has come count places on; a level further is one of them.
            onward = (jnp.arange(self.window) + jnp.maximum(count - 1, 0)) % self.window
            return Memory(seen[1:][:, onward], pool)

        return jax.vmap(row)(memory, verdict.chosen[:, newest], verdict.count)

    def begun(self, tokens: Int[Array, " p"], length: Int[Array, ""]) -> Memory:
        """One row's memory: a window of what the tokens begin with, and their n-grams."""
        place = jnp.arange(self.levels)[:, None] + jnp.arange(self.window)
        nothing = 0 * length
        pool = Pool(
            nothing + jnp.full(self.slots, -1),
            nothing + jnp.full((self.slots, self.guesses, self.levels), -1),
            nothing + jnp.zeros(self.slots, jnp.int32),
        )
        window = tokens[place % jnp.maximum(length, 1)]
        return Memory(window, self.gathered(pool, tokens, length))

    def gathered(self, pool: Pool, tokens: Int[Array, " p"], length: Int[Array, ""]) -> Pool:
        """One row's pool with the n-grams of the first `length` of tokens."""

        def insert(place, pool):
            following = jax.lax.dynamic_slice_in_dim(tokens, place + 1, self.levels)
            return self.inserted(pool, tokens[place], following, place + self.levels < length)

        if len(tokens) <= self.levels:
            return pool
        return jax.lax.fori_loop(0, len(tokens) - self.levels, insert, pool)

    def inserted(self, pool: Pool, token, following: Int[Array, " L"], valid) -> Pool:
        """One row's pool with an n-gram in place of the oldest, if valid and not known."""
        slot = token % self.slots
        same = pool.token[slot] == token
        grams = jnp.where(same, pool.following[slot], -1)
        written = jnp.where(same, pool.written[slot], 0)
        known = jnp.any(jnp.all(grams == following, axis=1))
        oldest = jnp.arange(self.guesses) == written % self.guesses
        grams = jnp.where(oldest[:, None], following, grams)
        slot = jnp.where(valid & ~known, slot, self.slots)
        write = lambda table, value: table.at[slot].set(value, mode="drop")
        return Pool(*map(write, pool, (token, grams, written + 1)))
