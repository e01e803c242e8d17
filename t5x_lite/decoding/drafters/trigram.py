# SPDX-License-Identifier: Apache-2.0
"""Adaptive tri-grams: what most often followed the last two tokens in this very text.

The draft of ADED (Liu et al., 2024, arXiv 2407.12021) without its corpus: counts begin with the
prompt and the encoder's input and grow with what is written.

  b rows    w nodes of a block    D most tokens of one call    H slots of a table    K successors
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.protocol import Draft, Tree, chain

# What stands before the token in the context of a bi-gram.
ANY = -1


class Counts(NamedTuple):
    """One row's successors of a context of two tokens (-2: none), likeliest first.

    Every time that something follows its context, all weights of the slot lose the same share and
    that successor gains 1.
    """

    context: Int[Array, "H 2"]
    successors: Int[Array, "H K"]
    weight: Float[Array, "H K"]


@dataclass(frozen=True)
class Trigram:
    """Drafts what followed the last two tokens most; where they are new, what followed the last.

    A context lies in one of `slots` slots, from which a newer one with the same hash drives it out:
    33 kB per row with 1,024 of them. `decay` is the share of its weight that a successor keeps
    whenever its context is met again: 1 counts, 0 knows the last time alone.
    """

    tree: Tree = chain(8)
    successors: int = 3
    decay: float = 0.7
    slots: int = 1024
    top: int = 0

    def __post_init__(self):
        trees.check_branches(self.tree, self.successors, "Trigram")

    def begin(self, setting) -> Counts:
        counts = jax.vmap(self.empty)(setting.prompts.length)
        if setting.inputs is not None:
            counts = jax.vmap(self.counted_whole)(counts, setting.inputs, setting.inputs_length)
        return jax.vmap(self.counted_whole)(counts, *setting.prompts)

    def propose(self, setting, memory: Counts, state):
        def row(counts, tokens, length):
            def successors(before, tokens):
                pair, single = self.known(counts, before, tokens), self.known(counts, ANY, tokens)
                return jnp.where(pair[:, :1] >= 0, pair, single)

            last = jnp.where(length > 0, tokens[jnp.maximum(length - 1, 0)], ANY)
            return trees.grow(self.tree, last, tokens[length], successors)

        return Draft(jax.vmap(row)(memory, state.tokens, state.length)), memory

    def observe(self, setting, memory: Counts, state, verdict) -> Counts:
        def row(counts, tokens, length, written, count):
            # The two tokens before what was written, of which there may be only one.
            first = length - count
            before = jnp.where(first > 0, tokens[jnp.maximum(first - 1, 0)], ANY)
            context = jnp.stack([before, tokens[first]])
            return self.counted(counts, jnp.concatenate([context, written]), count + 2)

        seen = (state.tokens, state.length, verdict.tokens, verdict.count)
        return jax.vmap(row)(memory, *seen)

    def empty(self, like: Int[Array, ""]) -> Counts:
        """One row's counts before anything was seen."""
        nothing = 0 * like
        return Counts(
            nothing + jnp.full((self.slots, 2), -2),
            nothing + jnp.full((self.slots, self.successors), -1),
            nothing + jnp.zeros((self.slots, self.successors)),
        )

    def counted_whole(self, counts: Counts, tokens: Int[Array, " n"], length) -> Counts:
        """counts with the first `length` of tokens, before which there is nothing."""
        if len(tokens) < 2:
            return counts
        return self.counted(counts, jnp.concatenate([0 * tokens[:1] + ANY, tokens]), length + 1)

    def counted(self, counts: Counts, tokens: Int[Array, " n"], length: Int[Array, ""]) -> Counts:
        """counts with the first `length` of tokens from the third on, each after the two before it.

        Where ANY stands first, the token two places on is counted as a bi-gram only.
        """

        def count(place, counts):
            before, token, follows = tokens[place], tokens[place + 1], tokens[place + 2]
            here = place + 2 < length
            counts = self.met(counts, before, token, follows, here & (before >= 0))
            return self.met(counts, ANY, token, follows, here)

        return jax.lax.fori_loop(0, len(tokens) - 2, count, counts)

    def met(self, counts: Counts, before, token, follows, valid) -> Counts:
        """counts after `follows` has followed its context once more, if valid."""
        slot = self.slot(before, token)
        context = jnp.stack([0 * token + before, token])
        same = jnp.all(counts.context[slot] == context)
        successors = jnp.where(same, counts.successors[slot], -1)
        weight = jnp.where(same, counts.weight[slot] * self.decay, 0.0)
        known = successors == follows
        # A new successor takes the place of the least likely one, which is the last.
        last = jnp.arange(self.successors) == self.successors - 1
        place = jnp.where(jnp.any(known), known, last)
        weight = jnp.where(place, jnp.where(known, weight, 0.0) + 1.0, weight)
        successors = jnp.where(place, follows, successors)
        successors, weight = heaviest_first(successors, weight)
        slot = jnp.where(valid, slot, self.slots)
        write = lambda table, value: table.at[slot].set(value, mode="drop")
        return Counts(*map(write, counts, (context, successors, weight)))

    def known(self, counts: Counts, before, tokens: Int[Array, " n"]) -> Int[Array, "n K"]:
        """The successors of tokens after `before`; -1 where there is none."""
        slots = self.slot(before, tokens)
        context = jnp.stack([0 * tokens + before, tokens], axis=1)
        same = jnp.all(counts.context[slots] == context, axis=1)
        return jnp.where(same[:, None], counts.successors[slots], -1)

    def slot(self, before, token: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where a context lies: multiplicative hashing (Knuth, 1973, 6.4)."""
        unsigned = lambda x: jnp.asarray(x).astype(jnp.uint32)
        mixed = (unsigned(before) * jnp.uint32(0x9E3779B1) ^ unsigned(token)) * jnp.uint32(
            0x85EBCA6B
        )
        return ((mixed >> 15) % self.slots).astype(jnp.int32)


def heaviest_first(
    successors: Int[Array, " K"], weight: Float[Array, " K"]
) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """Both in order of falling weight, equal ones as they were: for few, cheaper than a sort."""
    place = jnp.arange(len(weight))
    before = (weight[:, None] < weight) | ((weight[:, None] == weight) & (place[:, None] > place))
    order = jnp.sum(before, axis=1)
    moved = order == place[:, None]
    pick = lambda values: jnp.sum(jnp.where(moved, values, 0), axis=1, dtype=values.dtype)
    return pick(successors), pick(weight)
