# SPDX-License-Identifier: Apache-2.0
"""A tree of the heads' most probable tokens (Medusa, Cai et al., 2024, arXiv 2401.10774, 2.1).

b rows    w nodes of a block    g heads    n nodes before a level    K tokens of a head
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.decoding.drafters import blockwise
from t5x_lite.decoding.drafters.trees import best_tree_of_heads, ranks
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, Tree
from t5x_lite.utils.not_none import not_none

# How often the tokens of each rank were accepted on g2p, frozen heads (benchmarks/heads.py).
CHANCES = tuple(tuple(0.6**head * share for share in (0.6, 0.15, 0.07, 0.04)) for head in range(4))


@dataclass(frozen=True)
class Medusa(blockwise.HiddenStateDrafter):
    """Drafts a tree: the r-th child of a node at depth i is the r-th most probable token of head i
    (from 0).

    It is so whatever the node's own token is, unless heads are sequential: those depend on the path
    to the node (Hydra, Ankner et al., 2024, arXiv 2402.05109). All nodes are verified in one pass,
    so it pays where a pass over many tokens costs little more than one over one: at small batches
    on an accelerator.

      Drafting(Medusa(best_tree_of_heads(16, chances)))

    Attributes:
      tree: the tree.
      top: 0.
    """

    tree: Tree = best_tree_of_heads(16, CHANCES)
    top: int = 0

    def begin(self, context: DecodeContext) -> blockwise.LastHidden:
        """Returns an unknown hidden state.

        Raises:
          ValueError: the tree is deeper than the model has heads.
        """
        blockwise.check_heads(context, int(self.tree.depth.max()))
        return blockwise.unknown_hidden(context)

    def propose(
        self, context: DecodeContext, drafter_state: blockwise.LastHidden, state: DecodeState
    ) -> tuple[Draft, blockwise.LastHidden]:
        """Applies the heads to the last hidden state.

        Args:
          context: constants of the request.
          drafter_state: the last hidden state.
          state: state of the loop.
        """
        if self.tree.width == 1:
            return Draft(state.root[:, None][:, :0]), drafter_state
        if not_none(context.target.heads).sequential:
            tokens = self.draft_by_level(context, drafter_state, state)
        else:
            tokens = self.draft_at_once(context, drafter_state)
        return Draft(blockwise.mask_unknown(drafter_state, tokens)), drafter_state

    def draft_at_once(
        self, context: DecodeContext, last_hidden: blockwise.LastHidden
    ) -> Int[Array, "b w-1"]:
        """Drafts with heads that are not sequential: the same tokens below every parent."""
        rank, depth = ranks(self.tree), self.tree.depth
        logits = blockwise.head_logits(context, last_hidden, slice(0, int(depth.max())))
        best = jax.lax.top_k(logits, int(rank.max()) + 1)[1]
        return jax.vmap(lambda row: row[depth[1:] - 1, rank[1:]])(best)

    def draft_by_level(
        self, context: DecodeContext, last_hidden: blockwise.LastHidden, state: DecodeState
    ) -> Int[Array, "b w-1"]:
        """Drafts with sequential heads, level by level.

        Args:
          context: constants of the request.
          last_hidden: the last hidden state.
          state: state of the loop.
        """
        tree, rank = self.tree, ranks(self.tree)
        tokens = state.root[:, None]
        order = [0]
        for depth in range(1, int(tree.depth.max()) + 1):
            level = np.flatnonzero(tree.depth == depth).tolist()
            inner = sorted({tree.parents[node] for node in level})
            best = jnp.stack(
                [self.best_after(context, last_hidden, tokens, order, node) for node in inner],
                axis=1,
            )
            parents = np.array([inner.index(tree.parents[node]) for node in level])
            take = functools.partial(take_children, parents=parents, rank=rank[level])
            children = jax.vmap(take)(best)
            tokens = jnp.concatenate(sharding.by_rows([tokens, children]), axis=1)
            order += level
        return jax.vmap(lambda row: row[np.argsort(order)][1:])(tokens)

    def best_after(
        self,
        context: DecodeContext,
        last_hidden: blockwise.LastHidden,
        tokens: Int[Array, "b n"],
        order: list[int],
        node: int,
    ) -> Int[Array, "b K"]:
        """Returns the most probable tokens after a node, by the head of its depth.

        Args:
          context: constants of the request.
          last_hidden: the last hidden state.
          tokens: the tokens of the nodes `order`, among them those of the path to the node.
          order: the nodes that are drafted already.
          node: the node.
        """
        path = np.flatnonzero(self.tree.ancestors[node])
        places = np.array([order.index(int(each)) for each in path])
        before = jax.vmap(lambda row: row[places])(tokens)
        head = len(path) - 1
        logits = blockwise.head_logits(context, last_hidden, slice(head, head + 1), before)[:, 0]
        return jax.lax.top_k(logits, int(ranks(self.tree).max()) + 1)[1]


def take_children(best: Int[Array, "n K"], parents: np.ndarray, rank: np.ndarray) -> Array:
    """Takes the token of each node of a level, for one row.

    Args:
      best: the most probable tokens after each inner node.
      parents: index [m] of each node's parent among the inner nodes.
      rank: number [m] of siblings before each node.
    """
    return best[parents, rank]
