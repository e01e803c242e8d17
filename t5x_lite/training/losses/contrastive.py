# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of vectors, with the other texts of the whole batch as negatives.

b batch    n texts of the batch on all devices, then hard negatives    r width of a vector
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from t5x_lite.batch import Batch
from t5x_lite.model.layers import split
from t5x_lite.sharding import by_rows, spec


class TextRows(NamedTuple):
    """Texts, one in a row.

    Attributes:
      ids: [b s] int32 token ids.
      segments: [b s] int32, 1 for tokens and 0 for padding.
      positions: [b s] int32 positions.
    """

    ids: Int[Array, "b s"]
    segments: Int[Array, "b s"]
    positions: Int[Array, "b s"]

    @property
    def exists(self) -> Bool[Array, " b"]:
        """True for rows that have a text."""
        return jnp.any(self.segments > 0, axis=1)


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


def make_candidates(
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


class PairLosses(NamedTuple):
    """Losses of queries.

    Attributes:
      nll: [b] float32, negative log-probability of the positive among the candidates.
      correct: [b] float32, 1 where it has the largest score.
    """

    nll: Float[Array, " b"]
    correct: Float[Array, " b"]


def query_losses(scores: Float[Array, "b n"], positive: Bool[Array, "b n"]) -> PairLosses:
    """Losses of queries by their scores, of which one is of the query's own text."""
    score = jnp.sum(jnp.where(positive, scores, 0), axis=1)
    others = jnp.max(jnp.where(positive, -jnp.inf, scores), axis=1)
    nll = jax.nn.logsumexp(scores, axis=1) - score
    return PairLosses(nll, (score > others).astype(jnp.float32))


def pair_losses(
    texts: PairTexts,
    vectors: PairVectors,
    temperature: Float[Array, ""] | float,
    symmetric: bool,
) -> PairLosses:
    """Contrastive losses of the pairs of a batch; `correct` is that of the inputs.

    Args:
      texts: the texts.
      vectors: their vectors.
      temperature: what products are divided by.
      symmetric: also of the targets, which are to find their inputs.
    """
    hard = None
    if texts.negatives is not None and vectors.negatives is not None:
        hard = texts.negatives, vectors.negatives
    documents = make_candidates((texts.inputs, texts.targets), vectors.targets, hard)
    losses = query_losses(masked_scores(vectors.inputs, documents, temperature), documents.positive)
    if not symmetric:
        return losses
    queries = make_candidates((texts.targets, texts.inputs), vectors.inputs)
    back = query_losses(masked_scores(vectors.targets, queries, temperature), queries.positive)
    return losses._replace(nll=(losses.nll + back.nll) / 2)
