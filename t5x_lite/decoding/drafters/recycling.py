# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: the model's own runners-up, kept by token, as guesses for the next time.

Luo et al., 2024, arXiv 2408.08696. The paper keeps one table [v, 8] for all that is decoded. Here
every row has its own, so that what a row costs depends on no other row; for a vocabulary of 256,000
that would be 8 MB per row, and so tokens share `slots` by their remainder: 295 kB per row. Texts
meet few thousand tokens, guesses included, and the latest of two in one slot is kept.

  b rows    w nodes of a block    H slots of the table    K successors
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.protocol import Draft, Tree

# How often the guess of each rank held below a node that held: SmolLM2-135M, smoothed, between code
# (0.68, 0.08, 0.03) and prose (0.42, 0.11, 0.08); benchmarks/drafters.py.
CHANCES = (0.6, 0.1, 0.05, 0.03, 0.02, 0.015, 0.012, 0.01)


class Table(NamedTuple):
    """Which token (-1: none) owns a slot, and what is likely after it."""

    token: Int[Array, "b H"]
    successors: Int[Array, "b H K"]


def expected(texts: Iterable[Sequence[int]], top: int = 8, slots: int = 8192) -> Table:
    """What most often follows each token in texts: weights for a Recycling to begin with.

    texts are ids as the model writes them, Model.start first where there is one, EOS last. Of
    tokens that share a slot the one that texts have most often is kept.
    """
    follows: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for token, following in pairwise(text):
            follows[token][following] += 1
    table = Table(np.full(slots, -1, np.int32), np.full((slots, top), -1, np.int32))
    for token, counts in sorted(follows.items(), key=lambda each: each[1].total()):
        known = [following for following, _ in counts.most_common(top)]
        table.token[token % slots] = token
        table.successors[token % slots] = known + [-1] * (top - len(known))
    return table


@dataclass(frozen=True)
class Recycling:
    """Drafts a tree from the K = `top` most probable tokens the model last saw after each token.

    The table is filled by every node of a block, right or wrong; before the first block by what
    follows each token in the prompt, in the encoder's input and, if there are any, in the texts
    that `expected` made its weights of.
    """

    tree: Tree = trees.likeliest(32, CHANCES)
    top: int = 8
    slots: int = 8192

    def __post_init__(self):
        trees.check_branches(self.tree, self.top, "Recycling")

    def begin(self, setting) -> Table:
        prompts = setting.prompts
        table = self.seeded(prompts.tokens, prompts.length)
        if setting.inputs is not None:
            table = filled(table, self.seeded(setting.inputs, setting.inputs_length))
        if setting.weights is None:
            return table
        if setting.weights.successors.shape != (self.slots, self.top):
            raise ValueError(
                f"Recycling with {self.slots} slots and top {self.top} begins with a table of "
                f"{setting.weights.successors.shape}: make it by expected(texts, top, slots)"
            )
        return filled(table, setting.weights)

    def propose(self, setting, memory: Table, state):
        def row(table, root):
            def successors(before, tokens):
                slots = tokens % self.slots
                known = table.token[slots] == tokens
                return jnp.where(known[:, None], table.successors[slots], -1)

            return trees.grow(self.tree, root, root, successors)

        return Draft(jax.vmap(row)(memory, state.root)), memory

    def observe(self, setting, memory: Table, state, verdict) -> Table:
        def row(table, block, top, path, count):
            # Of nodes with the same token the later one counts, before all those on the path.
            order = jnp.arange(len(block))
            kept = (path == order[:, None]) & (jnp.arange(len(path)) < count)
            order = order + len(block) * jnp.any(kept, axis=1)
            slots = latest(block % self.slots, order, block >= 0, self.slots)
            return Table(
                table.token.at[slots].set(block, mode="drop"),
                table.successors.at[slots].set(top, mode="drop"),
            )

        seen = (verdict.block, verdict.top, verdict.path, verdict.count)
        return jax.vmap(row)(memory, *seen)

    def seeded(self, tokens: Int[Array, "b p"], length: Int[Array, " b"]) -> Table:
        """What last followed each token of the first length[b] of tokens."""

        def row(tokens, length):
            place = jnp.arange(len(tokens))
            slots = jnp.where(place < length - 1, tokens % self.slots, self.slots)
            # The highest place wins whatever the order of writing.
            nowhere = jnp.full(self.slots, -1) + 0 * length
            last = nowhere.at[slots].max(place, mode="drop")
            owner = jnp.where(last >= 0, tokens[jnp.maximum(last, 0)], -1)
            follows = jnp.where(last >= 0, tokens[jnp.minimum(last + 1, len(tokens) - 1)], -1)
            rest = jnp.full((self.slots, self.top - 1), -1) + 0 * length
            return Table(owner, jnp.concatenate([follows[:, None], rest], axis=1))

        return jax.vmap(row)(tokens, length)


def filled(table: Table, other: Table) -> Table:
    """table with what the other knows where it knows nothing itself."""
    free = (table.token < 0) | (table.token == other.token)
    unknown = free[..., None] & (table.successors < 0)
    return Table(
        jnp.where(free, other.token, table.token),
        jnp.where(unknown, other.successors, table.successors),
    )


def latest(slots: Int[Array, " n"], order: Int[Array, " n"], valid, size: int) -> Int[Array, " n"]:
    """slots, but `size` (to be dropped) where another of the same slot has a higher order.

    What several writers leave in one slot of a scatter is anyone's guess; so only one may write.
    """
    slots = jnp.where(valid, slots, size)
    beaten = (slots[:, None] == slots) & (order[:, None] < order)
    return jnp.where(jnp.any(beaten, axis=1), size, slots)
