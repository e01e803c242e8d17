# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules: how far a row follows the drafts of a block. The exact rule, and the interface.

b rows    w nodes of a block    D most tokens that one step can add    v vocabulary
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


class VerifyInput(NamedTuple):
    """Input of an acceptance rule: a block, and the model's logits after each of its nodes.

    Attributes:
      block: the root and the draft tokens; -1 where there is no draft.
      logits: the model's logits after each node.
      chosen: the model's own choice after each node: its most probable token, or the one sampled
        with the noise of the position.
      draft: the draft, with its distributions if it has them.
      positions: position of the token after each node.
      tree: shape of the block.
      sampling: sampling parameters of the rows; None for greedy decoding.
    """

    block: Int[Array, "b w"]
    logits: Float[Array, "b w v"]
    chosen: Int[Array, "b w"]
    draft: Draft
    positions: Int[Array, "b w"]
    tree: Tree
    sampling: sampling.SamplingParams | None


class AcceptedPath(NamedTuple):
    """The nodes from the root on whose drafts are accepted, and the token after each of them.

    Attributes:
      path: the nodes; the first count[b] are valid.
      tokens: the token after each of them: the draft of the next node of the path, and after the
        last one the model's own.
      count: number of valid entries, 1 or more.
    """

    path: Int[Array, "b D"]
    tokens: Int[Array, "b D"]
    count: Int[Array, " b"]


class Acceptance(Protocol):
    """An acceptance rule: a frozen dataclass, so that equal rules share an executable."""

    def __call__(self, inputs: VerifyInput) -> AcceptedPath: ...


@dataclass(frozen=True)
class Exact:
    """Accepts a draft that equals the model's own choice: the text is that of plain decoding.

    For greedy and for sampled decoding: the token that is sampled at a position depends on no draft
    (`sampling`). The rule of Stern et al., 2018 (arXiv 1811.03115), section 3.
    """

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        return deepest_path(inputs, inputs.block == at_parents(inputs.tree, inputs.chosen))


def at_parents(tree: Tree, x: Array) -> Array:
    """Takes x [b w ...] at each node's parent; at the root, its own."""
    parents = np.maximum(tree.parents, 0)
    return sharding.by_rows(jax.vmap(lambda row: row[parents])(x))


def deepest_path(inputs: VerifyInput, accepted: Bool[Array, "b w"]) -> AcceptedPath:
    """Returns the longest path of accepted drafts, the first of equal ones, and what follows it."""
    tree = inputs.tree
    steps = np.arange(tree.paths.shape[1])
    reached = accepted | (np.arange(tree.width) == 0)
    for _ in range(int(tree.depth.max())):
        reached &= at_parents(tree, reached)

    def row_path(reached, chosen, block):
        last = jnp.argmax(jnp.where(reached, tree.depth, -1))
        # As a sum and not by index: a constant table cannot be indexed by rows split over a mesh.
        here = np.arange(tree.width) == last
        path = jnp.sum(jnp.where(here[:, None], tree.paths, 0), axis=0)
        count = jnp.sum(jnp.where(here, tree.depth, 0)) + 1
        drafts = block[path[np.minimum(steps + 1, steps[-1])]]
        return AcceptedPath(path, jnp.where(steps < count - 1, drafts, chosen[path]), count)

    return jax.vmap(row_path)(*sharding.by_rows((reached, inputs.chosen, inputs.block)))
