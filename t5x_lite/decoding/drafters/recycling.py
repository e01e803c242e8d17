# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: the model's own runners-up, kept by token, are the drafts of the next time.

Luo et al., 2024, arXiv 2408.08696. The paper keeps one table [v, 8] for all that is decoded. Here
every row has its own, so that what a row costs depends on no other row; for a vocabulary of 256,000
that would be 8 MB per row, and so tokens share `slots` by their remainder: 295 kB per row. A text
has a few thousand different tokens, drafts included, and the later of two in one slot is kept.

  b rows    w nodes of a block    D accepted tokens    H slots of the table    K successors
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, Tree, VerifyOutput

# How often the draft of each rank below an accepted node was accepted: SmolLM2-135M, smoothed,
# between code (0.68, 0.08, 0.03) and prose (0.42, 0.11, 0.08); benchmarks/drafters.py.
CHANCES = (0.6, 0.1, 0.05, 0.03, 0.02, 0.015, 0.012, 0.01)


class SuccessorTable(NamedTuple):
    """Likely successors of tokens, state and weights of Recycling.

    Attributes:
      token: [b H] int32, the token that a slot belongs to; -1 for none.
      successors: [b H K] int32, tokens that are likely after it, the likeliest first; -1 for none.
    """

    token: Any
    successors: Any


def count_successors(
    texts: Iterable[Sequence[int]], top: int = 8, slots: int = 8192
) -> SuccessorTable:
    """Returns what most often follows each token in texts: weights for Recycling to begin with.

    Of tokens that share a slot the most frequent one is kept.

    Args:
      texts: ids as the model writes them: Model.decoder_start_token_id first if it has one, EOS
        last.
      top: K.
      slots: H.
    """
    following: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for token, successor in pairwise(text):
            following[token][successor] += 1
    table = SuccessorTable(np.full(slots, -1, np.int32), np.full((slots, top), -1, np.int32))
    for token, counts in sorted(following.items(), key=lambda each: each[1].total()):
        known = [successor for successor, _ in counts.most_common(top)]
        table.token[token % slots] = token
        table.successors[token % slots] = known + [-1] * (top - len(known))
    return table


@dataclass(frozen=True)
class Recycling:
    """Drafts a tree of the K most probable tokens that the model last saw after each token.

    Every node of a block updates the table, accepted or not. Before the first block the table holds
    what follows each token in the prompt, in the encoder's input and, if they are given as weights,
    in the texts of `count_successors`.

    Attributes:
      tree: the tree.
      top: K.
      slots: H.

    Raises:
      ValueError: a node of the tree has more than K children.
    """

    tree: Tree = trees.best_tree(32, CHANCES)
    top: int = 8
    slots: int = 8192

    def __post_init__(self):
        trees.check_branches(self.tree, self.top, "Recycling")

    def begin(self, context: DecodeContext) -> SuccessorTable:
        """Fills the table from prompt, input and weights.

        Raises:
          ValueError: the weights are a table of another size.
        """
        prompts, weights = context.prompts, context.weights
        table = self.table_of(prompts.tokens, prompts.length)
        if context.inputs is not None:
            table = fill_missing(table, self.table_of(context.inputs, context.inputs_length))
        if weights is None:
            return table
        if weights.successors.shape != (self.slots, self.top):
            raise ValueError(
                f"Recycling with {self.slots} slots and top {self.top} begins with a table of "
                f"{weights.successors.shape}: use count_successors(texts, top, slots)"
            )
        return fill_missing(table, weights)

    def propose(
        self, context: DecodeContext, drafter_state: SuccessorTable, state: DecodeState
    ) -> tuple[Draft, SuccessorTable]:
        """Fills the tree from the table.

        Args:
          context: constants of the request; unused.
          drafter_state: the table.
          state: state of the loop.
        """

        def propose_row(table, root):
            def successors(before, tokens):
                slots = tokens % self.slots
                known = table.token[slots] == tokens
                return jnp.where(known[:, None], table.successors[slots], -1)

            return trees.fill_tree(self.tree, root, root, successors)

        return Draft(jax.vmap(propose_row)(drafter_state, state.root)), drafter_state

    def observe(
        self,
        context: DecodeContext,
        drafter_state: SuccessorTable,
        state: DecodeState,
        output: VerifyOutput,
    ) -> SuccessorTable:
        """Writes the most probable tokens after every node to the table.

        Args:
          context: constants of the request; unused.
          drafter_state: the table.
          state: state of the loop; unused.
          output: the block, and the K most probable tokens after its nodes.
        """

        def observe_row(table, block, top, path, count):
            # Of nodes with the same token one on the path wins over others, then the latest.
            order = jnp.arange(len(block))
            accepted = (path == order[:, None]) & (jnp.arange(len(path)) < count)
            order = order + len(block) * jnp.any(accepted, axis=1)
            slots = last_writers(block % self.slots, order, block >= 0, self.slots)
            return SuccessorTable(
                table.token.at[slots].set(block, mode="drop"),
                table.successors.at[slots].set(top, mode="drop"),
            )

        return jax.vmap(observe_row)(
            drafter_state, output.block, output.top, output.path, output.count
        )

    def table_of(self, tokens: Int[Array, "b p"], length: Int[Array, " b"]) -> SuccessorTable:
        """Returns what last followed each token of the first length[b] of tokens."""

        def row_table(tokens, length):
            place = jnp.arange(len(tokens))
            slots = jnp.where(place < length - 1, tokens % self.slots, self.slots)
            # The highest place is kept, whatever the order of writing.
            nowhere = jnp.full(self.slots, -1) + 0 * length
            last = nowhere.at[slots].max(place, mode="drop")
            owner = jnp.where(last >= 0, tokens[jnp.maximum(last, 0)], -1)
            follows = jnp.where(last >= 0, tokens[jnp.minimum(last + 1, len(tokens) - 1)], -1)
            rest = jnp.full((self.slots, self.top - 1), -1) + 0 * length
            return SuccessorTable(owner, jnp.concatenate([follows[:, None], rest], axis=1))

        return jax.vmap(row_table)(tokens, length)


def fill_missing(table: SuccessorTable, other: SuccessorTable) -> SuccessorTable:
    """Fills the free places of a table from another one."""
    free = (table.token < 0) | (table.token == other.token)
    unknown = free[..., None] & (table.successors < 0)
    return SuccessorTable(
        jnp.where(free, other.token, table.token),
        jnp.where(unknown, other.successors, table.successors),
    )


def last_writers(
    slots: Int[Array, " n"], order: Int[Array, " n"], valid: Bool[Array, " n"], size: int
) -> Int[Array, " n"]:
    """Keeps one writer of each slot, the one of the highest order.

    Which of several writers wins in a scatter is undefined, so only one may write.

    Args:
      slots: slot of each writer.
      order: rank of each writer.
      valid: False for writers to be dropped.
      size: number of slots.

    Returns:
      The slots, `size` (out of range: dropped by the scatter) for all other writers.
    """
    slots = jnp.where(valid, slots, size)
    beaten = (slots[:, None] == slots) & (order[:, None] < order)
    return jnp.where(jnp.any(beaten, axis=1), size, slots)
