# SPDX-License-Identifier: Apache-2.0
"""Trees of guesses: which shape promises most, and how one is filled, level by level.

w nodes of a block    n nodes of a level    K known successors of a token, likeliest first
"""

import functools
import heapq
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite.decoding.protocol import Tree


@functools.cache
def likeliest(width: int, chances: tuple[float, ...]) -> Tree:
    """The tree of `width` nodes of which most are expected to be accepted.

    chances[r] is how often the guess of rank r after a right one is right; guesses on a path are
    taken as independent, so that nodes are worth the product of chances on their way, and the best
    tree has the nodes that are worth most (Sequoia, Chen et al., 2024, arXiv 2402.12374).

    Raises:
      ValueError: width is not positive, or chances do not fall from rank to rank within (0, 1).
    """
    falling = all(a >= b for a, b in itertools.pairwise([1.0, *chances, 0.0]))
    if width < 1 or not chances or not falling or chances[-1] <= 0 or chances[0] >= 1:
        raise ValueError(f"No tree of {width} nodes by chances {chances}: they fall within (0, 1)")
    parents = [-1]
    # Worth (negated: the heap gives the least), the order of arrival, parent and rank of a node.
    arrival = itertools.count()
    waiting = [(-chances[0], next(arrival), 0, 0)]
    while len(parents) < width:
        worth, _, parent, rank = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        heapq.heappush(waiting, (worth * chances[0], next(arrival), node, 0))
        if rank + 1 < len(chances):
            sibling = worth / chances[rank] * chances[rank + 1]
            heapq.heappush(waiting, (sibling, next(arrival), parent, rank + 1))
    return Tree(tuple(parents))


def ranks(tree: Tree) -> np.ndarray:
    """How many siblings [w] stand before each node."""
    return np.array([tree.parents[:node].count(of) for node, of in enumerate(tree.parents)])


def check_branches(tree: Tree, known: int, name: str) -> None:
    """Raises ValueError where a node of the tree has more children than there are successors."""
    branches = int(ranks(tree).max()) + 1
    if branches > known:
        raise ValueError(
            f"{name}: a node of its tree has {branches} children, but it knows {known} successors"
        )


def grow(
    tree: Tree,
    last: Int[Array, ""],
    root: Int[Array, ""],
    successors: Callable[[Int[Array, " n"], Int[Array, " n"]], Int[Array, "n K"]],
) -> Int[Array, " w-1"]:
    """One row's guesses: after each node, its successors by rank; last stands before the root.

    successors(before, tokens) are those of tokens, which stand after `before`; -1 where there is
    none, and nothing follows it.
    """
    rank = ranks(tree)
    block, before, nodes = root[None], last[None], [0]
    for depth in range(1, int(tree.depth.max()) + 1):
        level = np.flatnonzero(tree.depth == depth).tolist()
        places = np.array([nodes.index(tree.parents[node]) for node in level])
        inner, which = np.unique(places, return_inverse=True)
        found = successors(before[inner], block[inner])
        grown = jnp.where(block[places] >= 0, found[which, rank[level]], -1)
        before = jnp.concatenate([before, block[places]])
        block = jnp.concatenate([block, grown])
        nodes += level
    return block[np.argsort(nodes)][1:]
