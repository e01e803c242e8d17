# SPDX-License-Identifier: Apache-2.0
"""How far a row goes on with the drafts of a block.

b rows    w nodes of a block    D most tokens that one call can add    v vocabulary
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding.protocol import Draft, Tree


class Judged(NamedTuple):
    """A block before it is judged: its tokens, and what the model says after each node.

    chosen is the model's own choice (its most probable token, or the one drawn by position), at
    positions[b, i], which counts the token after node i.
    """

    block: Int[Array, "b w"]
    logits: Float[Array, "b w v"]
    chosen: Int[Array, "b w"]
    draft: Draft
    positions: Int[Array, "b w"]
    tree: Tree
    sampling: sampling.Sampling | None


class Accepted(NamedTuple):
    """The nodes from the root on whose guesses hold, and the token after each of them.

    Of both [b D] the first count[b] mean something. The last of these tokens nobody had guessed: it
    is the model's own. Those before it are the guesses of the nodes that follow.
    """

    path: Int[Array, "b D"]
    tokens: Int[Array, "b D"]
    count: Int[Array, " b"]


class Acceptance(Protocol):
    """A rule; a frozen dataclass, so that equal rules share an executable."""

    def __call__(self, judged: Judged) -> Accepted: ...


@dataclass(frozen=True)
class Exact:
    """A guess holds where it is what the model itself chooses: the text is that of plain decoding.

    Greedy and sampled: what is drawn at a position depends on no draft (`sampling`).
    """

    def __call__(self, judged: Judged) -> Accepted:
        return deepest(judged, judged.block == at_parents(judged.tree, judged.chosen))


def at_parents(tree: Tree, x: Array) -> Array:
    """x [b w ...] of each node's parent; of the root, its own."""
    parents = np.maximum(tree.parents, 0)
    return sharding.by_rows(jax.vmap(lambda row: row[parents])(x))


def deepest(judged: Judged, holds: Bool[Array, "b w"]) -> Accepted:
    """The longest path on which every guess holds (of equal ones the first), and what follows."""
    tree = judged.tree
    steps = np.arange(tree.paths.shape[1])
    reached = holds | (np.arange(tree.width) == 0)
    for _ in range(int(tree.depth.max())):
        reached &= at_parents(tree, reached)

    def row(reached, chosen, block):
        last = jnp.argmax(jnp.where(reached, tree.depth, -1))
        # As a sum and not by index: a table has no place on the mesh, a row has.
        here = np.arange(tree.width) == last
        path = jnp.sum(jnp.where(here[:, None], tree.paths, 0), axis=0)
        count = jnp.sum(jnp.where(here, tree.depth, 0)) + 1
        guessed = block[path[np.minimum(steps + 1, steps[-1])]]
        return Accepted(path, jnp.where(steps < count - 1, guessed, chosen[path]), count)

    return jax.vmap(row)(*sharding.by_rows((reached, judged.chosen, judged.block)))
