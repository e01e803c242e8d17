# SPDX-License-Identifier: Apache-2.0
"""The heads' likeliest tokens as a tree (Medusa, Cai et al., 2024, arXiv 2401.10774, section 2.1).

b rows    w nodes of a block    g heads    n nodes of a level    v vocabulary
"""

import functools
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite.decoding.drafters import blockwise
from t5x_lite.decoding.drafters.trees import ranks
from t5x_lite.decoding.protocol import Draft, Setting, State, Tree, Verdict


@functools.cache
def promising(width: int, chances: tuple[tuple[float, ...], ...]) -> Tree:
    """The tree of `width` nodes of which most are expected to be accepted.

    chances[i][r] is how often the token of rank r of head i is right; a node is worth the product
    of the chances on its way, and the tree has the nodes that are worth most.

    Raises:
      ValueError: there are not that many nodes, or chances do not fall from rank to rank.
    """
    for head, row in enumerate(chances):
        falling = all(a >= b for a, b in itertools.pairwise([1.0, *row, 0.0]))
        if not row or not falling:
            raise ValueError(f"The chances of head {head} do not fall from rank to rank: {row}")
    parents, depth = [-1], [0]
    arrival = itertools.count()
    # Worth (negated: the heap gives the least), the order of arrival, parent and rank of a node.
    waiting = [(-chances[0][0], next(arrival), 0, 0)]
    while len(parents) < width:
        if not waiting:
            raise ValueError(f"No tree of {width} nodes: the chances are those of {len(parents)}")
        worth, _, parent, rank = heapq.heappop(waiting)
        node, level = len(parents), depth[parent]
        above = worth / chances[level][rank] if chances[level][rank] else 0.0
        parents.append(parent)
        depth.append(level + 1)
        if level + 1 < len(chances):
            entry = (worth * chances[level + 1][0], next(arrival), node, 0)
            heapq.heappush(waiting, entry)
        if rank + 1 < len(chances[level]):
            entry = (above * chances[level][rank + 1], next(arrival), parent, rank + 1)
            heapq.heappush(waiting, entry)
    return Tree(tuple(parents))


def cartesian(sizes: Sequence[int]) -> Tree:
    """Every combination of the sizes[i] likeliest tokens of head i."""
    parents, level = [-1], [0]
    for size in sizes:
        begin = len(parents)
        parents += [parent for parent in level for _ in range(size)]
        level = list(range(begin, len(parents)))
    return Tree(tuple(parents))


# How often the tokens of each rank were right on g2p, frozen heads (benchmarks/heads.py).
CHANCES = tuple(tuple(0.6**head * share for share in (0.6, 0.15, 0.07, 0.04)) for head in range(4))


@dataclass(frozen=True)
class Medusa:
    """Guesses a tree: the r-th child of a node at depth i carries the r-th likeliest token of head
    i (from 0), whatever the node's own token is, unless heads see the guesses before them.

    All its nodes are verified in one pass, so it pays where a pass over many tokens costs little
    more than one over one: at small batches on an accelerator.

      Drafting(Medusa(promising(16, chances)))
      Drafting(Medusa(cartesian((3, 2, 1))))
    """

    tree: Tree = promising(16, CHANCES)
    top: int = 0

    def begin(self, setting: Setting) -> blockwise.Seen:
        """Raises ValueError where the tree is deeper than the model has heads."""
        blockwise.check(setting, int(self.tree.depth.max()))
        return blockwise.unseen(setting)

    def propose(self, setting: Setting, memory: blockwise.Seen, state: State):
        if self.tree.width == 1:
            return Draft(state.root[:, None][:, :0]), memory
        sequential = setting.target.heads.sequential
        grow = self.told if sequential else self.alike
        return Draft(blockwise.where_known(memory, grow(setting, memory, state))), memory

    def observe(self, setting: Setting, memory, state: State, verdict: Verdict) -> blockwise.Seen:
        return blockwise.seen(memory, verdict)

    def alike(self, setting: Setting, memory: blockwise.Seen, state: State) -> Int[Array, "b w-1"]:
        """The tokens of heads that see no guesses: the same under every parent."""
        rank, depth = ranks(self.tree), self.tree.depth
        logits = blockwise.logits(setting, memory, slice(0, int(depth.max())))
        best = jax.lax.top_k(logits, int(rank.max()) + 1)[1]
        return jax.vmap(lambda row: row[depth[1:] - 1, rank[1:]])(best)

    def told(self, setting: Setting, memory: blockwise.Seen, state: State) -> Int[Array, "b w-1"]:
        """The tokens of heads that see the guesses on the way, level by level."""
        tree, rank = self.tree, ranks(self.tree)
        tokens = state.root[:, None]
        order = [0]
        for depth in range(1, int(tree.depth.max()) + 1):
            level = np.flatnonzero(tree.depth == depth).tolist()
            inner = sorted({tree.parents[node] for node in level})
            found = jnp.stack(
                [self.after(setting, memory, tokens, order, node) for node in inner], axis=1
            )
            which = np.array([inner.index(tree.parents[node]) for node in level])
            grown = jax.vmap(lambda row, which=which, of=rank[level]: row[which, of])(found)
            tokens = jnp.concatenate([tokens, grown], axis=1)
            order += level
        return jax.vmap(lambda row: row[np.argsort(order)][1:])(tokens)

    def after(self, setting: Setting, memory, tokens, order: list[int], node: int):
        """The likeliest tokens [b K] after a node, whose own is among tokens [b n] of `order`."""
        way = np.flatnonzero(self.tree.ancestors[node])
        places = np.array([order.index(each) for each in way])
        since = jax.vmap(lambda row: row[places])(tokens)
        head = len(way) - 1
        logits = blockwise.logits(setting, memory, slice(head, head + 1), since)[:, 0]
        return jax.lax.top_k(logits, int(ranks(self.tree).max()) + 1)[1]
