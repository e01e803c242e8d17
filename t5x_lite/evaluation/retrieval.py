# SPDX-License-Identifier: Apache-2.0
"""Retrieval by vectors: ranks of the right documents in a pool, and metrics of them.

q queries    n documents of the pool    r width of a vector
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.config.training_run import DataRun
from t5x_lite.data import Dataset
from t5x_lite.evaluation import embed
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.not_none import not_none

# Queries whose scores are computed at once.
CHUNK = 256
# Ranks up to which documents count, of recall and nDCG.
CUTOFFS = (1, 10)


class Pool(NamedTuple):
    """Queries, and the pool of documents that they search.

    Attributes:
      queries: texts [q].
      documents: distinct texts [n].
      relevant: places in the pool of the right documents of each query.
    """

    queries: list[str]
    documents: list[str]
    relevant: list[list[int]]


def make_pool(queries: Sequence[str], references: Sequence[Sequence[str]]) -> Pool:
    """Makes a pool of all right documents of all queries; a text is in it once.

    Args:
      queries: texts.
      references: right documents of each.
    """
    places: dict[str, int] = {}
    relevant = [
        sorted({places.setdefault(text, len(places)) for text in texts}) for texts in references
    ]
    return Pool(list(queries), list(places), relevant)


def rank_documents(
    queries: np.ndarray, documents: np.ndarray, relevant: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Ranks of the right documents of each query among all, from 1, ascending.

    Documents are ordered by the product with the query. Of equal ones a right document comes after
    the wrong ones, so that vectors that are all alike find nothing.

    Args:
      queries: [q r] vectors.
      documents: [n r] vectors.
      relevant: places of the right documents of each query.
    """
    ranks = []
    for first in range(0, len(queries), CHUNK):
        scores = queries[first : first + CHUNK] @ documents.T
        for row, places in zip(scores, relevant[first : first + CHUNK], strict=True):
            right = np.sort(row[list(places)])[::-1]
            before = (row[None] >= right[:, None]).sum(axis=1)
            # Right documents with at least this score are not before it, but its equals are placed
            # one after the other.
            among = (right[None] >= right[:, None]).sum(axis=1)
            ranks.append(before - among + 1 + np.arange(len(right)))
    return ranks


def reciprocal_rank(ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over queries of one over the rank of the first right document, in percent (MRR)."""
    return {"mrr": 100 * float(np.mean([1 / each[0] for each in ranks]))}


def recall(ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean share of the right documents that are among the first, in percent."""
    return {
        f"recall@{k}": 100 * float(np.mean([np.mean(each <= k) for each in ranks])) for k in CUTOFFS
    }


def discounted_gain(ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """nDCG of the first ten with gains 0 and 1, in percent (Jaervelin and Kekaelaeinen, 2002)."""
    k = CUTOFFS[-1]
    best = np.cumsum([1 / math.log2(place + 2) for place in range(k)])
    gains = [
        np.sum(1 / np.log2(each[each <= k] + 1)) / best[min(len(each), k) - 1] for each in ranks
    ]
    return {f"ndcg@{k}": 100 * float(np.mean(gains))}


METRICS: dict[str, Callable[[Sequence[np.ndarray]], dict[str, float]]] = {
    "mrr": reciprocal_rank,
    "recall": recall,
    "ndcg": discounted_gain,
}


def measure_retrieval(names: Sequence[str], ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """Computes metrics of ranks.

    Args:
      names: keys of METRICS.
      ranks: of the right documents of each query, from `rank_documents`.
    """
    values: dict[str, float] = {}
    for name in names:
        values |= METRICS[name](ranks)
    return values


def retrieval_rows(
    pool: Pool, vectors: tuple[np.ndarray, np.ndarray], ranks: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Rows of a predictions file: each query, the document that it finds first, the right ones, and
    the rank of the first of these.

    Args:
      pool: texts.
      vectors: [q r] of the queries, and [n r] of the documents.
      ranks: of the right documents of each query.
    """
    rows = []
    for number, (query, places) in enumerate(zip(pool.queries, pool.relevant, strict=True)):
        scores = vectors[1] @ vectors[0][number]
        best = int(np.argmax(scores))
        row = {"input": query, "prediction": pool.documents[best]}
        row["references"] = [pool.documents[place] for place in places]
        rows.append(row | {"score": round(float(scores[best]), 4), "rank": int(ranks[number][0])})
    return rows


def makes_vectors(cfg: config.Model) -> bool:
    """True for a model whose outputs are vectors of texts."""
    return cfg.readout is not None and cfg.readout.kind == "vector"


def choose_metrics(run: config.Run) -> tuple[str, ...]:
    """Names of the metrics of a run that makes vectors: all of METRICS where it names none.

    Raises:
      ValueError: an unknown name.
    """
    for name in run.evaluate.metrics:
        config.require(
            name in METRICS,
            f"Evaluate.metrics: vectors are measured by {', '.join(METRICS)}; "
            f"{suggest(name, METRICS)}",
        )
    return run.evaluate.metrics or tuple(METRICS)


class RetrievalResult(NamedTuple):
    """Metrics of vectors on a split, and what every query finds.

    Attributes:
      values: metrics by name, and the sizes of the pool.
      rows: of a predictions file.
    """

    values: dict[str, float]
    rows: list[dict[str, Any]]


def search_split(
    run: DataRun,
    params: Any,
    dataset: Dataset,
    on_progress: Callable[[int], None] | None = None,
) -> RetrievalResult:
    """Searches the targets of the first examples of a split by their inputs.

    Texts are cut as they are in training. The pool is all references of these examples.

    Args:
      run: config of the run.
      params: weights of its model.
      dataset: the split.
      on_progress: called with the number of examples whose queries are embedded.
    """
    count = min(len(dataset), run.evaluate.examples)
    texts = [not_none(dataset.inputs_text(i)) for i in range(count)]
    pool = make_pool(texts, [dataset.references(i) for i in range(count)])
    sides = {}
    for side, each in (("targets", pool.documents), ("inputs", pool.queries)):
        # The id that begins the texts of a decoder alone has a place of its own.
        most = run.data.lengths[side] - (run.data.start is not None)
        cfg = cut_texts(run.model, most)
        predictor = Predictor(cfg, params, dataset.vocabularies, batch_size=run.evaluate.batch_size)
        progress = on_progress if side == "inputs" else None
        sides[side] = embed.embed(predictor, each, on_progress=progress)
    vectors = sides["inputs"], sides["targets"]
    ranks = rank_documents(*vectors, pool.relevant)
    values = measure_retrieval(choose_metrics(run), ranks)
    values |= {"queries": float(count), "documents": float(len(pool.documents))}
    return RetrievalResult(values, retrieval_rows(pool, vectors, ranks))


def cut_texts(cfg: config.Model, most: int) -> config.Model:
    """The model with texts cut at `most` tokens, or earlier where its readout cuts them so."""
    readout = not_none(cfg.readout)
    longest = min(most, readout.max_length or most)
    return dataclasses.replace(cfg, readout=dataclasses.replace(readout, max_length=longest))
