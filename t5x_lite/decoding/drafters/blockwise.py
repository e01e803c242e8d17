# SPDX-License-Identifier: Apache-2.0
"""The model's own heads guess a chain (Stern et al., 2018, arXiv 1811.03115), and what all drafters
that read those heads remember.

  b rows    w nodes of a block    g heads    d width    v vocabulary
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite.decoding.drafters import guessing
from t5x_lite.decoding.protocol import Draft, Heads, Setting, State, Tree, Verdict, chain
from t5x_lite.sharding import spec


class Seen(NamedTuple):
    """What the root was read from; not known before the first call, as nothing wrote the prompt."""

    hidden: Float[Array, "b d"]
    known: Bool[Array, " b"]


@dataclass(frozen=True)
class Blockwise:
    """Guesses w - 1 tokens, one with each of the first heads, at the accepted position alone.

    Heads are run there only: 1 position with w - 1 heads, instead of w positions with all of them
    as in the paper's single pass. `drawn` draws the guesses and tells their law, for speculative
    acceptance; otherwise they are chosen with the noise of the model's own choice.

      Drafting(Blockwise(chain(8)))
    """

    tree: Tree = chain(4)
    drawn: bool = False
    top: int = 0

    def begin(self, setting: Setting) -> Seen:
        """Raises ValueError where the model has fewer heads than the block has guesses."""
        check(setting, self.tree.width - 1)
        return unseen(setting)

    def propose(self, setting: Setting, memory: Seen, state: State):
        count, sequential = self.tree.width - 1, setting.target.heads.sequential
        if count == 0:
            return Draft(state.root[:, None][:, :0]), memory
        every = None if sequential else logits(setting, memory, slice(0, count))
        tokens, laws = [], []
        for number in range(count):
            if sequential:
                since = jnp.stack([state.root, *tokens], axis=1)
                own = logits(setting, memory, slice(number, number + 1), since)[:, 0]
            else:
                own = every[:, number]
            token, law = guessing.guess(setting, state, own, number, self.drawn)
            tokens.append(token)
            laws.append(law)
        law = jnp.stack(laws, axis=1) if self.drawn else None
        return Draft(where_known(memory, jnp.stack(tokens, axis=1)), law), memory

    def observe(self, setting: Setting, memory: Seen, state: State, verdict: Verdict) -> Seen:
        return seen(memory, verdict)


def check(setting: Setting, wanted: int) -> Heads:
    """The model's heads.

    Raises:
      ValueError: it has none, or fewer than are wanted.
    """
    heads = setting.target.heads
    if heads is None:
        raise ValueError(
            "The model has no heads that guess later tokens: train some with configs/runs/"
            "heads_g2p.gin as a pattern (Model.blockwise), or choose a drafter that needs none"
        )
    if heads.count < wanted:
        raise ValueError(
            f"The block has {wanted} guesses in a row, but the model has {heads.count} heads: "
            f"choose a block of at most {heads.count + 1} tokens"
        )
    return heads


def unseen(setting: Setting) -> Seen:
    """The memory before the first call, in the width and dtype of the target's hidden states."""
    tokens, index = setting.prompts.tokens[:, :1], setting.prompts.length
    like = jax.eval_shape(setting.target.part(0, 1).begin, tokens, index)
    zeros = jnp.zeros((like.shape[0], like.shape[2]), like.dtype, out_sharding=spec("batch width"))
    return Seen(zeros, index < 0)


def seen(memory: Seen, verdict: Verdict) -> Seen:
    """What the new root was read from; rows that are done keep what they had."""
    last = jnp.maximum(verdict.count - 1, 0)
    pick = lambda hidden, path, last: hidden[path[last]]
    hidden = jax.vmap(pick)(verdict.hidden, verdict.path, last)
    moved = verdict.count > 0
    hidden = jnp.where(moved[:, None], hidden.astype(memory.hidden.dtype), memory.hidden)
    return Seen(hidden, memory.known | moved)


def logits(setting: Setting, memory: Seen, which: slice, since=None) -> Float[Array, "b g v"]:
    """What these heads say of the tokens after the root; since [b j] are the root and guesses."""
    since = None if since is None else since[:, None]
    said = setting.target.heads.guess(memory.hidden[:, None], which, since)
    return setting.target.logits(said[:, 0])


def where_known(memory: Seen, tokens: Array) -> Array:
    """tokens [b n], -1 in rows of which nothing is known yet."""
    return jnp.where(memory.known[:, None], tokens, -1)
