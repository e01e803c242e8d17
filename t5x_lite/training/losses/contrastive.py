# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of vectors, with the other texts of the whole batch as negatives.

b batch    n texts of the batch on all devices, then hard negatives    r width of a vector
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt

from t5x_lite.batch import Batch
from t5x_lite.model.layers import split
from t5x_lite.model.matching import TextRows
from t5x_lite.sharding import by_rows, spec


class PairTexts(NamedTuple):
    """Both sides of pairs: inputs and targets.

    Attributes:
      inputs: texts that search.
      targets: the text that each of them is to find.
      negatives: hard negatives; None without any.
    """

    inputs: TextRows
    targets: TextRows
    negatives: TextRows | None


def pair_texts(batch: Batch) -> PairTexts:
    """The texts of a batch of pairs."""
    negatives = None
    if batch.negatives is not None:
        negatives = TextRows(batch.negatives, batch.negative_segments, batch.negative_positions)
    return PairTexts(
        TextRows(batch.inputs, batch.input_segments, batch.input_positions),
        TextRows(batch.targets, batch.target_segments, batch.target_positions),
        negatives,
    )


def weigh_pairs(batch: Batch) -> Batch:
    """The batch with loss weight 1 for each pair, at the first token of its targets."""
    first = (batch.target_positions == 0) & (batch.target_segments > 0)
    return batch._replace(loss_weights=first.astype(jnp.float32))


class PairVectors(NamedTuple):
    """Vectors of a batch of pairs.

    Attributes:
      inputs: [b r] float32.
      targets: [b r] float32.
      negatives: [b r] float32; None without hard negatives.
    """

    inputs: Float[Array, "b r"]
    targets: Float[Array, "b r"]
    negatives: Float[Array, "b r"] | None


def pair_vectors(read, texts: PairTexts, key: jax.Array | None) -> PairVectors:
    """Vectors of the texts of pairs, each side with another dropout.

    Args:
      read: function of ids, segments, positions and a dropout key: [b r] vectors.
      texts: the texts.
      key: dropout key; None for no dropout.
    """
    first, second, third = split(key, 3)
    hard = texts.negatives
    return PairVectors(
        read(*texts.inputs, first),
        read(*texts.targets, second),
        None if hard is None else read(*hard, third),
    )


class ComparedTexts(NamedTuple):
    """Texts of the whole batch that each query is compared with, on every device.

    Attributes:
      vectors: [n r] float32.
      allowed: [b n] True for the query's own text and for its negatives.
      positive: [b n] True for the query's own text.
    """

    vectors: Float[Array, "n r"]
    allowed: Bool[Array, "b n"]
    positive: Bool[Array, "b n"]


def gather_rows(x: Array) -> Array:
    """Rows of the whole batch, on every device."""
    return jax.reshard(x, spec("whole" + " whole" * (x.ndim - 1)))


def text_digests(rows: TextRows) -> UInt[Array, "b 2"]:
    """Two 32-bit digests of the ids of every text; texts that differ share both with a chance of
    2 ** -64."""
    draw = np.random.default_rng(rows.ids.shape[1])
    factors = draw.integers(1, 2**32, (rows.ids.shape[1], 2), np.uint32) | np.uint32(1)
    ids = jnp.where(rows.segments > 0, rows.ids + 1, 0).astype(jnp.uint32)
    return jnp.stack([jnp.sum(ids * factors[:, each], axis=1) for each in (0, 1)], axis=1)


def equal_texts(rows: TextRows, others: TextRows) -> Bool[Array, "b n"]:
    """True where a text of the batch is equal to one of the whole batch of others."""
    mine, theirs = by_rows(text_digests(rows)), gather_rows(text_digests(others))
    return jnp.all(mine[:, None] == theirs[None], axis=-1)


def gather_compared(
    sides: tuple[TextRows, TextRows],
    vectors: Float[Array, "b r"],
    negatives: tuple[TextRows, Float[Array, "b r"]] | None = None,
) -> ComparedTexts:
    """The candidates of queries: one side of the pairs, and hard negatives.

    A candidate is no negative if it is equal to the query's own text, or is the positive of an
    equal query.

    Args:
      sides: texts of the queries, and of the candidates of the same pairs.
      vectors: of the candidates.
      negatives: texts and vectors of hard negatives; None without any.
    """
    queries, texts = sides
    row = jnp.arange(len(texts.ids))
    positive = by_rows(row[:, None] == row[None])
    known = equal_texts(queries, queries) | equal_texts(texts, texts)
    allowed = positive | (~known & gather_rows(texts.exists)[None])
    candidates = ComparedTexts(gather_rows(vectors), allowed, positive)
    if negatives is None:
        return candidates
    rows, hard = negatives
    more = ~equal_texts(texts, rows) & gather_rows(rows.exists)[None]
    return ComparedTexts(
        jnp.concatenate([candidates.vectors, gather_rows(hard)]),
        jnp.concatenate([allowed, more], axis=1),
        jnp.concatenate([positive, jnp.zeros_like(more)], axis=1),
    )


def masked_scores(
    queries: Float[Array, "b r"], candidates: ComparedTexts, temperature: Float[Array, ""] | float
) -> Float[Array, "b n"]:
    """Products of queries and candidates over the temperature; -inf for those not compared.

    Args:
      queries: vectors.
      candidates: what they are compared with.
      temperature: what products are divided by.
    """
    exact = jax.lax.Precision.HIGHEST
    products = jnp.einsum("br,nr->bn", by_rows(queries), candidates.vectors, precision=exact)
    return jnp.where(candidates.allowed, products / temperature, -jnp.inf)


class ScoredTexts(NamedTuple):
    """Scores of the texts that each query is compared with.

    Attributes:
      scores: [b n] float32 products over the temperature; -inf for texts not compared.
      positive: [b n] True for the query's positive.
      texts: the n texts, in parts.
    """

    scores: Float[Array, "b n"]
    positive: Bool[Array, "b n"]
    texts: tuple[TextRows, ...]


def score_targets(
    texts: PairTexts, vectors: PairVectors, temperature: Float[Array, ""] | float
) -> ScoredTexts:
    """Scores of all targets and hard negatives of the batch for each input.

    Args:
      texts: the texts.
      vectors: their vectors.
      temperature: what products are divided by.
    """
    hard, parts = None, (texts.targets,)
    if texts.negatives is not None and vectors.negatives is not None:
        hard, parts = (texts.negatives, vectors.negatives), (texts.targets, texts.negatives)
    compared = gather_compared((texts.inputs, texts.targets), vectors.targets, hard)
    scores = masked_scores(vectors.inputs, compared, temperature)
    return ScoredTexts(scores, compared.positive, parts)


def score_inputs(
    texts: PairTexts, vectors: PairVectors, temperature: Float[Array, ""] | float
) -> ScoredTexts:
    """Scores of all inputs of the batch for each target; the arguments of `score_targets`.

    Args:
      texts: the texts.
      vectors: their vectors.
      temperature: what products are divided by.
    """
    compared = gather_compared((texts.targets, texts.inputs), vectors.inputs)
    scores = masked_scores(vectors.targets, compared, temperature)
    return ScoredTexts(scores, compared.positive, (texts.inputs,))


class PairLosses(NamedTuple):
    """Losses of pairs.

    Attributes:
      nll: [b] float32, negative log-probability of the positive among the texts compared.
      correct: [b] float32, 1 where it has the largest score.
    """

    nll: Float[Array, " b"]
    correct: Float[Array, " b"]


def query_losses(scored: ScoredTexts) -> PairLosses:
    """Losses of queries by the scores of the texts that they are compared with."""
    scores, positive, _ = scored
    score = jnp.sum(jnp.where(positive, scores, 0), axis=1)
    others = jnp.max(jnp.where(positive, -jnp.inf, scores), axis=1)
    nll = jax.nn.logsumexp(scores, axis=1) - score
    return PairLosses(nll, (score > others).astype(jnp.float32))


def pair_losses(targets: ScoredTexts, inputs: ScoredTexts | None = None) -> PairLosses:
    """Contrastive losses of the pairs of a batch; `correct` is that of the inputs.

    Args:
      targets: as the inputs score them.
      inputs: as the targets score them, for the mean of both losses; None for the first alone.
    """
    losses = query_losses(targets)
    if inputs is None:
        return losses
    return losses._replace(nll=(losses.nll + query_losses(inputs).nll) / 2)


class HardPairs(NamedTuple):
    """Texts that do not belong to the queries, drawn by their scores.

    Attributes:
      others: one for each query.
      exists: [b] False for a query that is compared with its positive alone.
    """

    others: TextRows
    exists: Bool[Array, " b"]


def draw_negatives(scored: ScoredTexts, key: jax.Array) -> HardPairs:
    """Draws a negative of each query by the softmax of its scores."""
    scores = jnp.where(scored.positive, -jnp.inf, jax.lax.stop_gradient(scored.scores))
    noise = by_rows(jax.random.gumbel(key, scores.shape))
    chosen = jnp.argmax(scores + noise, axis=1)

    def take(*parts):
        every = jnp.concatenate([gather_rows(part) for part in parts])
        return every.at[chosen].get(out_sharding=spec("batch whole"))

    others = TextRows(*(take(*parts) for parts in zip(*scored.texts, strict=True)))
    return HardPairs(others, jnp.any(scores > -jnp.inf, axis=1))


def matching_losses(
    match: Callable[..., Float[Array, "b 2"]],
    texts: PairTexts,
    scored: tuple[ScoredTexts, ScoredTexts],
    key: jax.Array,
) -> Float[Array, " b"]:
    """Cross entropy [b] of telling pairs from hard ones: the mean of a pair, its input with another
    target, and its target with another input.

    Args:
      match: function of the texts of both sides and a dropout key: [b 2] logits.
      texts: the texts.
      scored: the targets and the inputs, whose scores say which negatives are hard.
      key: random key of the draw, and of dropout.
    """
    draws, *drops = jax.random.split(key, 4)
    targets, inputs = map(draw_negatives, scored, jax.random.split(draws))
    rows = (
        (texts.inputs, texts.targets, 1, jnp.ones_like(targets.exists)),
        (texts.inputs, targets.others, 0, targets.exists),
        (inputs.others, texts.targets, 0, inputs.exists),
    )
    losses, counts = [], []
    for (first, second, together, exists), drop in zip(rows, drops, strict=True):
        log_probabilities = jax.nn.log_softmax(match(first, second, drop), axis=-1)
        losses.append(jnp.where(exists, -log_probabilities[:, together], 0))
        counts.append(exists.astype(jnp.float32))
    return (losses[0] + losses[1] + losses[2]) / (counts[0] + counts[1] + counts[2])
