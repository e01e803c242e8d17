# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts: the shape with the most expected tokens, and how one is filled level by level.

w nodes of a block    n nodes of a level    K known successors of a token, the likeliest first
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite.decoding.protocol import Tree


@functools.cache
def best_tree(width: int, chances: tuple[float, ...]) -> Tree:
    """Returns the tree with the most expected tokens, for chances that are the same at every depth.

    Args:
      width: number of nodes, the root included.
      chances: chances[r] is how often the draft of rank r after an accepted node is accepted.

    Raises:
      ValueError: width is not positive, or chances do not fall from rank to rank within (0, 1).
    """
    if width < 1 or not is_falling(chances) or chances[-1] <= 0 or chances[0] >= 1:
        raise ValueError(f"No tree of {width} nodes by chances {chances}: they fall within (0, 1)")
    return best_first_tree(width, [chances] * width)


@functools.cache
def best_tree_of_heads(width: int, chances: tuple[tuple[float, ...], ...]) -> Tree:
    """Returns the tree with the most expected tokens, for the chances of each draft head.

    Args:
      width: number of nodes, the root included.
      chances: `chances[i][r]` is how often the token of rank r of head i is accepted.

    Raises:
      ValueError: there are not that many nodes, or chances do not fall from rank to rank.
    """
    for head, row in enumerate(chances):
        if not is_falling(row):
            raise ValueError(f"The chances of head {head} do not fall from rank to rank: {row}")
    return best_first_tree(width, chances)


def is_falling(chances: Sequence[float]) -> bool:
    """Returns True for chances within [0, 1] none of which is above the one before it."""
    return bool(chances) and all(a >= b for a, b in itertools.pairwise([1.0, *chances, 0.0]))


def best_first_tree(width: int, chances: Sequence[Sequence[float]]) -> Tree:
    """Returns the tree with the most expected tokens, by a best-first search.

    The drafts of a path are taken as independent, so that the value of a node is the product of the
    chances on its path, and the best tree has the nodes of the highest values (Sequoia, Chen et
    al., 2024, arXiv 2402.12374).

    Args:
      width: number of nodes, the root included.
      chances: `chances[d][r]` is how often the draft of rank r at depth d + 1 is accepted after its
        parent was; falls with r.

    Raises:
      ValueError: the chances are those of fewer nodes.
    """
    parents, depth = [-1], [0]
    arrival = itertools.count()
    # Value (negated: the heap returns the least), order of arrival, parent and rank of a node.
    waiting = [(-chances[0][0], next(arrival), 0, 0)]
    while len(parents) < width:
        if not waiting:
            raise ValueError(f"No tree of {width} nodes: the chances are those of {len(parents)}")
        value, _, parent, rank = heapq.heappop(waiting)
        node, level = len(parents), depth[parent]
        parents.append(parent)
        depth.append(level + 1)
        if level + 1 < len(chances):
            child = value * chances[level + 1][0]
            heapq.heappush(waiting, (child, next(arrival), node, 0))
        if rank + 1 < len(chances[level]):
            parent_value = value / chances[level][rank] if chances[level][rank] else 0.0
            sibling = parent_value * chances[level][rank + 1]
            heapq.heappush(waiting, (sibling, next(arrival), parent, rank + 1))
    return Tree(tuple(parents))


def ranks(tree: Tree) -> np.ndarray:
    """Counts the siblings [w] before each node."""
    return np.array([tree.parents[:node].count(parent) for node, parent in enumerate(tree.parents)])


def check_branches(tree: Tree, known: int, name: str) -> None:
    """Checks that a node has no more children than a token has known successors.

    Args:
      tree: the tree.
      known: number of successors.
      name: name of the drafter, for the message.

    Raises:
      ValueError: a node has more children.
    """
    branches = int(ranks(tree).max()) + 1
    if branches > known:
        raise ValueError(
            f"{name}: a node of its tree has {branches} children, but it knows {known} successors"
        )


def fill_tree(
    tree: Tree,
    last: Int[Array, ""],
    root: Int[Array, ""],
    successors: Callable[[Int[Array, " n"], Int[Array, " n"]], Int[Array, "n K"]],
) -> Int[Array, " w-1"]:
    """Drafts one row: the children of a node are its successors by rank.

    Args:
      tree: shape of the block.
      last: token before the root.
      root: the root.
      successors: (before, tokens) -> successors of `tokens`, each of which comes after `before`; -1
        where none is known, which has no successors itself.

    Returns:
      The draft tokens.
    """
    levels = [np.flatnonzero(tree.depth == depth) for depth in range(1, int(tree.depth.max()) + 1)]
    # A level of fewer nodes than the widest is filled up with one beyond the block, which is not
    # written. A loop over levels compiles in seconds at any depth; unrolled, 63 take minutes.
    nodes = np.full((len(levels), max(map(len, levels), default=0)), tree.width)
    for row, level in zip(nodes, levels, strict=True):
        row[: len(level)] = level
    parents, rank = (np.append(each, 0)[nodes] for each in (tree.parents, ranks(tree)))

    def fill_level(filled, level):
        (block, before), (nodes, parents, rank) = filled, level
        tokens = block[parents]
        known = jnp.take_along_axis(successors(before[parents], tokens), rank[:, None], axis=1)
        children = jnp.where(tokens >= 0, known[:, 0], -1)
        written = ((block, children), (before, tokens))
        return tuple(all.at[nodes].set(new, mode="drop") for all, new in written), None

    empty = 0 * root + jnp.full(tree.width, -1, root.dtype)
    begin = (empty.at[0].set(root), empty.at[0].set(last))
    (block, _), _ = jax.lax.scan(fill_level, begin, (nodes, parents, rank))
    return block[1:]
