# SPDX-License-Identifier: Apache-2.0
"""Drafts of the heads, refined by which tokens follow which (Kim et al., 2024, arXiv 2404.09221).

Heads do not depend on one another's drafts, so their most probable tokens may not fit together:
the same one twice, or the second half of another word. A chain is chosen among the most probable
few of each head, by the heads and by bigrams.

  b rows    w nodes of a block    g heads    k candidates of a head    T slots    v vocabulary
  n tokens to count bigrams in    r width of a small bigram model
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding.drafters import blockwise
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Tree,
    chain,
)
from t5x_lite.sharding import spec
from t5x_lite.utils.not_none import not_none

BIGRAM_RATE = 0.02


class BigramModel(NamedTuple):
    """A small neural bigram model, from `fit_bigrams`.

    The log-probability of b after a is log_softmax(before[a] @ after)[b].

    Attributes:
      before: embeddings of the first token.
      after: output weights.
    """

    before: Float[Array, "v r"]
    after: Float[Array, "r v"]


class CandidateLattice(NamedTuple):
    """The most probable tokens of each head of one row.

    Attributes:
      tokens: the tokens.
      log_probability: their log-probabilities.
    """

    tokens: Int[Array, "g k"]
    log_probability: Float[Array, "g k"]


@dataclass(frozen=True)
class Refined(blockwise.HiddenStateDrafter):
    """Drafts the chain of highest score through the most probable tokens of each head.

    A step from a to b scores log((1 - share) p(b) + share c(a, b) / c(a)): p is the head's
    probability, c counts in the text of the row so far. With a BigramModel as weights, `strength`
    times its log-probability is added.

      Drafting(Refined(chain(8)))
      Drafting(Refined(chain(8), share=0.0), fit_bigrams(rows, vocab=128))

    Attributes:
      tree: the chain.
      candidates: k, tokens of each head.
      share: weight of the counts.
      strength: weight of the bigram model.
      from_input: count in the encoder's input too, for models with one vocabulary for both.
      top: 0.
    """

    tree: Tree = chain(4)
    candidates: int = 4
    share: float = 0.2
    strength: float = 0.5
    from_input: bool = False
    top: int = 0

    def begin(self, context: DecodeContext) -> blockwise.LastHidden:
        """Returns an unknown hidden state.

        Raises:
          ValueError: the model has too few heads, or sequential ones.
        """
        heads = blockwise.check_heads(context, self.tree.width - 1)
        if heads.sequential:
            raise ValueError(
                "The model's heads depend on the drafts before them (DraftHeads.shape hydra), so "
                "there is nothing to refine. Use Blockwise"
            )
        return blockwise.unknown_hidden(context)

    def propose(
        self, context: DecodeContext, drafter_state: blockwise.LastHidden, state: DecodeState
    ) -> tuple[Draft, blockwise.LastHidden]:
        """Applies the heads, and searches the best chain (Viterbi).

        Args:
          context: constants of the request.
          drafter_state: the last hidden state.
          state: the text so far.
        """
        if self.tree.width == 1:
            return Draft(state.root[:, None][:, :0]), drafter_state
        logits = blockwise.head_logits(context, drafter_state, slice(0, self.tree.width - 1))
        best, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), self.candidates)
        text, known = self.counted_tokens(context, state)
        bigrams = self.bigram_scores(context, state.root, tokens)
        lattice = CandidateLattice(tokens, best)
        drafts = jax.vmap(self.best_chain)(lattice, state.root, text, known, bigrams)
        return Draft(blockwise.mask_unknown(drafter_state, drafts)), drafter_state

    def counted_tokens(
        self, context: DecodeContext, state: DecodeState
    ) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
        """Returns tokens to count bigrams in, and the places whose next token is known."""
        known = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
        if not self.from_input or context.inputs is None:
            return state.tokens, known
        inside = jnp.arange(context.inputs.shape[1]) < context.inputs_length[:, None] - 1
        tokens = jnp.concatenate([state.tokens, context.inputs], axis=1)
        return tokens, jnp.concatenate([known, inside], axis=1)

    def bigram_scores(
        self, context: DecodeContext, root: Int[Array, " b"], tokens: Int[Array, "b g k"]
    ) -> Float[Array, "b g k k"] | None:
        """Computes `strength` times the bigram model's log-probability of each step.

        Args:
          context: the bigram model as weights; None without it.
          root: token before the first head's.
          tokens: candidates of each head.
        """
        if context.weights is None:
            return None
        before, after = context.weights
        rows, _, candidates = tokens.shape
        first = jnp.broadcast_to(root[:, None, None], (rows, 1, candidates))
        last = jnp.concatenate(sharding.by_rows([first, tokens[:, :-1]]), axis=1)
        placed = spec("batch whole whole whole")
        embedded = jnp.asarray(before).at[last].get(out_sharding=placed)
        scores = jax.nn.log_softmax(jnp.einsum("bgkr,rv->bgkv", embedded, after))
        return self.strength * jax.vmap(gather_ids)(scores, tokens)

    def best_chain(
        self,
        lattice: CandidateLattice,
        root: Int[Array, ""],
        text: Int[Array, " n"],
        known: Bool[Array, " n"],
        bigrams: Float[Array, "g k k"] | None,
    ) -> Int[Array, " g"]:
        """Returns the chain of highest score of one row.

        Args:
          lattice: candidates of the heads.
          root: the root.
          text: tokens to count bigrams in.
          known: places whose next token is known.
          bigrams: scores of the bigram model, or None.
        """
        steps = []
        before, score = jnp.broadcast_to(root, lattice.tokens[0].shape), None
        for head in range(lattice.tokens.shape[0]):
            frequency = self.bigram_frequency(before, lattice.tokens[head], text, known)
            step = log_mixture(self.share, lattice.log_probability[head], frequency)
            if bigrams is not None:
                step = step + bigrams[head]
            total = step if score is None else score[:, None] + step
            steps.append(jnp.argmax(total, axis=0))
            score, before = jnp.max(total, axis=0), lattice.tokens[head]
        place, drafts = jnp.argmax(not_none(score)), []
        for head in reversed(range(lattice.tokens.shape[0])):
            drafts.append(lattice.tokens[head, place])
            place = steps[head][place]
        return jnp.stack(drafts[::-1])

    def bigram_frequency(
        self,
        before: Int[Array, " k"],
        after: Int[Array, " k"],
        text: Int[Array, " n"],
        known: Bool[Array, " n"],
    ) -> Float[Array, "k k"]:
        """Computes how often b came after a, among all that came after a; -1 if nothing did.

        Args:
          before: the tokens a.
          after: the tokens b.
          text: tokens to count in.
          known: places whose next token is known.
        """
        here = (text[:, None] == before) & known[:, None]
        following = jnp.pad(text[1:], (0, 1))[:, None] == after
        together = here.astype(jnp.float32).T @ following.astype(jnp.float32)
        count = jnp.sum(here, axis=0)[:, None]
        return jnp.where(count > 0, together / jnp.maximum(count, 1), -1.0)


def log_mixture(
    share: float, log_probability: Float[Array, " k"], frequency: Float[Array, "k k"]
) -> Float[Array, "k k"]:
    """Computes the logarithm of a mixture of the head's probability and the frequency.

    Args:
      share: weight of the frequency.
      log_probability: the head's.
      frequency: -1 where only the head counts.
    """
    probability = jnp.exp(log_probability)[None]
    mixed = (1 - share) * probability + share * frequency
    return jnp.log(jnp.maximum(jnp.where(frequency < 0, probability, mixed), 1e-30))


def gather_ids(scores: Float[Array, "g k v"], ids: Int[Array, "g k"]) -> Float[Array, "g k k"]:
    """Takes the scores of the ids of the same head, after each of its k tokens."""
    return jnp.stack([row[:, columns] for row, columns in zip(scores, ids, strict=True)])


def bigram_pairs(rows: Iterable[Sequence[int]], start: int) -> np.ndarray:
    """Returns every token of the rows with the one before it, [n 2]; `start` before the first."""
    pairs = [np.stack([[start, *row[:-1]], row], axis=1) for row in rows if len(row)]
    return np.concatenate(pairs).astype(np.int32) if pairs else np.zeros((0, 2), np.int32)


def bigram_loss(
    params: BigramModel, before: Int[Array, " n"], after: Int[Array, " n"]
) -> Float[Array, ""]:
    """Computes the mean cross entropy of tokens after the ones before them.

    Args:
      params: the bigram model.
      before: the first tokens.
      after: the second tokens.
    """
    logits = params.before[before] @ params.after
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, after))


def fit_bigrams(
    rows: Iterable[Sequence[int]],
    vocab: int,
    *,
    start: int = 0,
    width: int = 32,
    steps: int = 300,
    seed: int = 0,
) -> BigramModel:
    """Fits a bigram model to rows of ids: Adam on cross entropy, reproducible by seed.

    Args:
      rows: the ids.
      vocab: v.
      start: token before the first of each row.
      width: r.
      steps: number of updates.
      seed: seed of the first weights and of the batches.

    Raises:
      ValueError: the rows have no token, or one outside of the vocabulary.
    """
    data = bigram_pairs(rows, start)
    if not len(data):
        raise ValueError("Bigrams cannot be learned from no tokens at all: give rows of target ids")
    if data.min() < 0 or data.max() >= vocab:
        raise ValueError(f"Bigrams: ids must be in 0..{vocab - 1}; got {data.min()}..{data.max()}")
    first, second = jax.random.split(jax.random.key(seed))

    def draw(key, shape):
        return width**-0.5 * jax.random.normal(key, shape)

    params = BigramModel(draw(first, (vocab, width)), draw(second, (width, vocab)))
    optimizer = optax.adam(BIGRAM_RATE)
    batches = np.random.default_rng(seed).integers(0, len(data), (steps, min(1024, len(data))))

    def update(carry, places):
        params, state = carry
        before, after = jnp.asarray(data)[places].T
        updates, state = optimizer.update(
            jax.grad(bigram_loss)(params, before, after), state, params
        )
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), batches)
        return params

    return BigramModel(*map(np.asarray, run(params)))
