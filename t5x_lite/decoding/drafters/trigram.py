# SPDX-License-Identifier: Apache-2.0
"""Adaptive trigrams: what most often followed the last two tokens in this text.

The draft of ADED (Liu et al., 2024, arXiv 2407.12021) without its corpus: counts begin with the
prompt and the encoder's input, and grow with the text.

  b rows    w nodes of a block    D accepted tokens    H slots of a table    K successors
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Tree,
    VerifyOutput,
    chain,
)

# Takes the place of the first token in the context of a bigram.
ANY = -1


class TrigramCounts(NamedTuple):
    """Counts of one row.

    When a successor follows its context, all weights of the slot decay and its own gains 1.

    Attributes:
      context: the two tokens that a slot belongs to; -2 for none.
      successors: tokens that followed them, the likeliest first; -1 for none.
      weight: decayed count of each successor.
    """

    context: Int[Array, "H 2"]
    successors: Int[Array, "H K"]
    weight: Float[Array, "H K"]


@dataclass(frozen=True)
class Trigram:
    """Drafts what followed the last two tokens most; if they are new, what followed the last one.

    A context lies in one of `slots` slots, where a newer one with the same hash replaces it: 33 kB
    per row with 1,024 of them.

    Attributes:
      tree: the tree.
      successors: K.
      decay: the share of its weight that a successor keeps when its context occurs again: 1 counts
        occurrences, 0 remembers the last one alone.
      slots: H.
      top: 0.

    Raises:
      ValueError: a node of the tree has more than K children.
    """

    tree: Tree = chain(8)
    successors: int = 3
    decay: float = 0.7
    slots: int = 1024
    top: int = 0

    def __post_init__(self):
        trees.check_branches(self.tree, self.successors, "Trigram")

    def begin(self, context: DecodeContext) -> TrigramCounts:
        """Counts the prompts and, if there are any, the encoder's inputs."""
        counts = jax.vmap(self.empty_counts)(context.prompts.length)
        if context.inputs is not None:
            counts = jax.vmap(self.count_text)(counts, context.inputs, context.inputs_length)
        return jax.vmap(self.count_text)(counts, *context.prompts)

    def propose(
        self, context: DecodeContext, drafter_state: TrigramCounts, state: DecodeState
    ) -> tuple[Draft, TrigramCounts]:
        """Fills the tree from the counts.

        Args:
          context: constants of the request; unused.
          drafter_state: the counts.
          state: the text so far.
        """

        def propose_row(counts, tokens, length):
            def successors(before, tokens):
                pair = self.find_successors(counts, before, tokens)
                single = self.find_successors(counts, ANY, tokens)
                return jnp.where(pair[:, :1] >= 0, pair, single)

            last = jnp.where(length > 0, tokens[jnp.maximum(length - 1, 0)], ANY)
            return trees.fill_tree(self.tree, last, tokens[length], successors)

        draft = jax.vmap(propose_row)(drafter_state, state.tokens, state.length)
        return Draft(draft), drafter_state

    def observe(
        self,
        context: DecodeContext,
        drafter_state: TrigramCounts,
        state: DecodeState,
        output: VerifyOutput,
    ) -> TrigramCounts:
        """Counts the accepted tokens.

        Args:
          context: constants of the request; unused.
          drafter_state: the counts.
          state: the text, accepted tokens included.
          output: the accepted tokens.
        """

        def observe_row(counts, tokens, length, accepted, count):
            # The two tokens before the accepted ones, of which there may be only one.
            first = length - count
            before = jnp.where(first > 0, tokens[jnp.maximum(first - 1, 0)], ANY)
            pair = jnp.stack([before, tokens[first]])
            return self.count_tokens(counts, jnp.concatenate([pair, accepted]), count + 2)

        return jax.vmap(observe_row)(
            drafter_state, state.tokens, state.length, output.tokens, output.count
        )

    def empty_counts(self, like: Int[Array, ""]) -> TrigramCounts:
        """Returns one row's counts of no tokens, split over a mesh as `like` is."""
        zero = 0 * like
        return TrigramCounts(
            context=zero + jnp.full((self.slots, 2), -2),
            successors=zero + jnp.full((self.slots, self.successors), -1),
            weight=zero + jnp.zeros((self.slots, self.successors)),
        )

    def count_text(
        self, counts: TrigramCounts, tokens: Int[Array, " n"], length: Int[Array, ""]
    ) -> TrigramCounts:
        """Counts a text from its beginning.

        Args:
          counts: counts of one row.
          tokens: the text.
          length: how many tokens of it exist.
        """
        if len(tokens) < 2:
            return counts
        tokens = jnp.concatenate([0 * tokens[:1] + ANY, tokens])
        return self.count_tokens(counts, tokens, length + 1)

    def count_tokens(
        self, counts: TrigramCounts, tokens: Int[Array, " n"], length: Int[Array, ""]
    ) -> TrigramCounts:
        """Counts tokens from the third on, each after the two before it.

        If the first is ANY, the third token is counted as a bigram only.

        Args:
          counts: counts of one row.
          tokens: the tokens.
          length: how many of them exist.
        """

        def count(place, counts):
            before, token, follows = tokens[place], tokens[place + 1], tokens[place + 2]
            exists = place + 2 < length
            counts = self.count_one(counts, before, token, follows, exists & (before >= 0))
            return self.count_one(counts, ANY, token, follows, exists)

        return jax.lax.fori_loop(0, len(tokens) - 2, count, counts)

    def count_one(
        self,
        counts: TrigramCounts,
        before: Int[Array, ""] | int,
        token: Int[Array, ""],
        follows: Int[Array, ""],
        valid: Bool[Array, ""],
    ) -> TrigramCounts:
        """Counts one successor of a context.

        Args:
          counts: counts of one row.
          before: first token of the context, or ANY.
          token: second token of the context.
          follows: the successor.
          valid: False leaves the counts as they are.
        """
        slot = self.slot_of(before, token)
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

        def write(table, value):
            return table.at[slot].set(value, mode="drop")

        return TrigramCounts(*map(write, counts, (context, successors, weight)))

    def find_successors(
        self, counts: TrigramCounts, before: Int[Array, " n"] | int, tokens: Int[Array, " n"]
    ) -> Int[Array, "n K"]:
        """Returns the successors of contexts; -1 for none.

        Args:
          counts: counts of one row.
          before: first token of each context, or ANY.
          tokens: second token of each context.
        """
        slots = self.slot_of(before, tokens)
        context = jnp.stack([0 * tokens + before, tokens], axis=1)
        same = jnp.all(counts.context[slots] == context, axis=1)
        return jnp.where(same[:, None], counts.successors[slots], -1)

    def slot_of(
        self, before: Int[Array, "..."] | int, token: Int[Array, "..."]
    ) -> Int[Array, "..."]:
        """Returns the slot of a context, by multiplicative hashing (Knuth, 1973, 6.4)."""
        first, second = (jnp.asarray(x).astype(jnp.uint32) for x in (before, token))
        mixed = (first * jnp.uint32(0x9E3779B1) ^ second) * jnp.uint32(0x85EBCA6B)
        return ((mixed >> 15) % self.slots).astype(jnp.int32)


def heaviest_first(
    successors: Int[Array, " K"], weight: Float[Array, " K"]
) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """Orders both by falling weight, equal ones as they are: for few, cheaper than a sort."""
    place = jnp.arange(len(weight))
    before = (weight[:, None] < weight) | ((weight[:, None] == weight) & (place[:, None] > place))
    order = jnp.sum(before, axis=1)
    moved = order == place[:, None]

    def reorder(values):
        return jnp.sum(jnp.where(moved, values, 0), axis=1, dtype=values.dtype)

    return reorder(successors), reorder(weight)
