# SPDX-License-Identifier: Apache-2.0
"""Laws of retrieval metrics: by enumeration, under ties, and where vectors say nothing."""

import math

import numpy as np
import pytest

from t5x_lite.evaluation import retrieval


def by_hand(queries, documents, relevant) -> dict[str, float]:
    """Metrics of a ranking that is written out query by query; wrong documents win ties.

    Args:
      queries: vectors.
      documents: vectors.
      relevant: places of the right documents of each query.
    """
    sums = dict.fromkeys(("mrr", "recall@1", "recall@10", "ndcg@10"), 0.0)
    for query, places in zip(queries, relevant, strict=True):
        order = sorted(
            range(len(documents)), key=lambda i: (-float(documents[i] @ query), i in places)
        )
        hits = [document in places for document in order]
        sums["mrr"] += 1 / (hits.index(True) + 1)
        for k in (1, 10):
            sums[f"recall@{k}"] += sum(hits[:k]) / len(places)
        gain = sum(hit / math.log2(i + 2) for i, hit in enumerate(hits[:10]))
        best = sum(1 / math.log2(i + 2) for i in range(min(len(places), 10)))
        sums["ndcg@10"] += gain / best
    return {name: 100 * value / len(queries) for name, value in sums.items()}


def drawn(seed: int, queries: int, documents: int):
    """Vectors of small integers, so that many products are equal, and right documents.

    Args:
      seed: of the draw.
      queries: their number.
      documents: their number.
    """
    draw = np.random.default_rng(seed)
    vectors = [draw.integers(-2, 3, (n, 3)).astype(np.float32) for n in (queries, documents)]
    relevant = [
        sorted(draw.choice(documents, draw.integers(1, min(documents, 13)), replace=False).tolist())
        for _ in range(queries)
    ]
    return *vectors, relevant


@pytest.mark.parametrize(
    "seed, queries, documents", [(0, 5, 30), (1, 300, 7), (2, 1, 2), (3, 9, 40)]
)
def test_metrics_are_those_of_the_ranking_written_out(seed, queries, documents):
    case = drawn(seed, queries, documents)
    ranks = retrieval.rank_documents(*case)
    values = retrieval.measure_retrieval(tuple(retrieval.METRICS), ranks)
    assert values == pytest.approx(by_hand(*case))


def test_vectors_that_are_all_alike_find_nothing():
    ranks = retrieval.rank_documents(np.ones((4, 2)), np.ones((50, 2)), [[i] for i in range(4)])
    assert retrieval.recall(ranks) == {"recall@1": 0.0, "recall@10": 0.0}
    assert retrieval.reciprocal_rank(ranks) == {"mrr": 2.0}


def test_a_text_is_in_the_pool_once():
    pool = retrieval.make_pool(["q", "r", "s"], [["a", "b"], ["b"], ["c", "c"]])
    assert pool.documents == ["a", "b", "c"] and pool.relevant == [[0, 1], [1], [2]]
