# SPDX-License-Identifier: Apache-2.0
"""What heads guess, put right by what usually follows what (Kim et al., 2024, arXiv 2404.09221).

Heads do not see one another's guesses, so that their likeliest tokens may not go together: twice
the same, or the second half of another word. A chain is chosen among the likeliest few of each
head, by the heads and by bigrams.

  b rows    w nodes of a block    g heads    k candidates of a head    T slots    v vocabulary
  r width of a small bigram model
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding.drafters import blockwise
from t5x_lite.decoding.protocol import Draft, Setting, State, Tree, Verdict, chain
from t5x_lite.sharding import spec


class Bigrams(NamedTuple):
    """A small neural model of what follows a token: log-probability of b after a is
    log_softmax(before[a] @ after)[b]. `training.bigrams.fit` makes one.
    """

    before: Float[Array, "v r"]
    after: Float[Array, "r v"]


class Lattice(NamedTuple):
    """The likeliest tokens of each head of one row, and their log-probabilities."""

    tokens: Int[Array, "g k"]
    log_probability: Float[Array, "g k"]


@dataclass(frozen=True)
class Refined:
    """Guesses the chain of highest score through the likeliest `candidates` of each head.

    A step from a to b scores log((1 - share) p(b) + share c(a, b) / c(a)): p is the head's, c
    counts what the row itself has written so far (and, with `from_input`, the encoder's input,
    where both have one vocabulary). Where Drafting has weights, Bigrams, `strength` times their
    log-probability is added.

      Drafting(Refined(chain(8)))
      Drafting(Refined(chain(8), share=0.0), bigrams.fit(rows, vocab=128))
    """

    tree: Tree = chain(4)
    candidates: int = 4
    share: float = 0.2
    strength: float = 0.5
    from_input: bool = False
    top: int = 0

    def begin(self, setting: Setting) -> blockwise.Seen:
        """Raises ValueError where the model has too few heads, or such as see the guesses."""
        heads = blockwise.check(setting, self.tree.width - 1)
        if heads.sequential:
            raise ValueError(
                "The model's heads see the guesses before them (Heads.shape hydra): there is "
                "nothing to refine. Use Blockwise"
            )
        return blockwise.unseen(setting)

    def propose(self, setting: Setting, memory: blockwise.Seen, state: State):
        if self.tree.width == 1:
            return Draft(state.root[:, None][:, :0]), memory
        logits = blockwise.logits(setting, memory, slice(0, self.tree.width - 1))
        best, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), self.candidates)
        source, known = self.source(setting, state)
        like = self.alike(setting, state.root, tokens)
        rows = (Lattice(tokens, best), state.root, source, known, like)
        guesses = jax.vmap(self.chosen)(*rows)
        return Draft(blockwise.where_known(memory, guesses)), memory

    def observe(self, setting: Setting, memory, state: State, verdict: Verdict) -> blockwise.Seen:
        return blockwise.seen(memory, verdict)

    def source(self, setting: Setting, state: State):
        """The tokens [b T] whose bigrams count, and of which places the next token is known."""
        known = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
        if not self.from_input or setting.inputs is None:
            return state.tokens, known
        inside = jnp.arange(setting.inputs.shape[1]) < setting.inputs_length[:, None] - 1
        join = lambda one, other: jnp.concatenate([one, other], axis=1)
        return join(state.tokens, setting.inputs), join(known, inside)

    def alike(self, setting: Setting, root: Int[Array, " b"], tokens: Int[Array, "b g k"]):
        """strength times the Bigrams' log-probability [b g k k] of each step; None without them."""
        if setting.weights is None:
            return None
        before, after = setting.weights
        rows, _, candidates = tokens.shape
        first = jnp.broadcast_to(root[:, None, None], (rows, 1, candidates))
        last = jnp.concatenate([first, tokens[:, :-1]], axis=1)
        placed = spec("batch whole whole whole")
        read = jnp.asarray(before).at[last].get(out_sharding=placed)
        said = jax.nn.log_softmax(jnp.einsum("bgkr,rv->bgkv", read, after))
        return self.strength * jax.vmap(picked)(said, tokens)

    def chosen(self, lattice: Lattice, root, source, known, like) -> Int[Array, " g"]:
        """The best chain of one row."""
        steps = []
        before, score = jnp.broadcast_to(root, lattice.tokens[0].shape), None
        for head in range(lattice.tokens.shape[0]):
            worth = self.worth(before, lattice.tokens[head], source, known)
            worth = log_mixed(self.share, lattice.log_probability[head], worth)
            if like is not None:
                worth = worth + like[head]
            total = worth if score is None else score[:, None] + worth
            steps.append(jnp.argmax(total, axis=0))
            score, before = jnp.max(total, axis=0), lattice.tokens[head]
        place, guesses = jnp.argmax(score), []
        for head in reversed(range(lattice.tokens.shape[0])):
            guesses.append(lattice.tokens[head, place])
            place = steps[head][place]
        return jnp.stack(guesses[::-1])

    def worth(self, before: Int[Array, " k"], after: Int[Array, " k"], source, known):
        """How often b came after a among all that came after a [k k]; -1 where nothing ever did."""
        here = (source[:, None] == before) & known[:, None]
        following = jnp.pad(source[1:], (0, 1))[:, None] == after
        together = here.astype(jnp.float32).T @ following.astype(jnp.float32)
        count = jnp.sum(here, axis=0)[:, None]
        return jnp.where(count > 0, together / jnp.maximum(count, 1), -1.0)


def log_mixed(
    share: float, log_probability: Float[Array, " k"], worth: Float[Array, "k k"]
) -> Float[Array, "k k"]:
    """The logarithm of the mixture of both; the head's alone where worth is -1."""
    probability = jnp.exp(log_probability)[None]
    mixed = (1 - share) * probability + share * worth
    return jnp.log(jnp.maximum(jnp.where(worth < 0, probability, mixed), 1e-30))


def picked(said: Float[Array, "g k v"], ids: Int[Array, "g k"]) -> Float[Array, "g k k"]:
    """said of the ids of the same head, after each of its k tokens."""
    return jnp.stack([row[:, of] for row, of in zip(said, ids, strict=True)])
