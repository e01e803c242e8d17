# SPDX-License-Identifier: Apache-2.0
"""Laws of contrastive training: the loss in float64, its gradient, and every mesh alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.model import matching
from t5x_lite.training import objective
from t5x_lite.training.losses import contrastive
from t5x_lite.training.losses.contrastive import PairTexts, PairVectors, TextRows
from t5x_lite.training.step_values import StepContext

WIDTH = 5
# The second and the fifth pair share their targets, the third and the sixth their inputs; the last
# row is padding. The first and the fourth negative are the fourth pair's own text, one is empty.
INPUTS = [[4, 5], [6], [7, 8, 9], [10], [11], [7, 8, 9], [12, 3], []]
TARGETS = [[20], [21, 22], [23], [24, 25], [21, 22], [26], [27, 28], []]
NEGATIVES = [[24, 25], [], [30, 31], [24, 25], [33], [34], [20], []]
CASES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def rows_of(texts: list[list[int]], length: int = 6) -> TextRows:
    """Texts in rows; an empty one is padding."""
    ids = np.zeros((len(texts), length), np.int32)
    segments = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
    return TextRows(ids, segments, (np.arange(length) * segments).astype(np.int32))


def drawn_vectors() -> np.ndarray:
    """Vectors [3 8 r] of inputs, targets that are somewhat like them, and negatives, float64."""
    vectors = np.random.default_rng(0).normal(size=(3, 8, WIDTH))
    vectors[1] += 0.5 * vectors[0]
    return vectors.astype(np.float32).astype(np.float64)


def expected_losses(vectors, temperature, symmetric, hard) -> np.ndarray:
    """Losses of the pairs in float64, candidate by candidate.

    Args:
      vectors: [3 8 r] of inputs, targets and negatives.
      temperature: what products are divided by.
      symmetric: targets find their inputs too.
      hard: with the hard negatives.
    """

    def losses_of(queries, texts, q, d, negatives):
        losses = []
        for i in range(7):
            scores = [q[i] @ d[i] / temperature]
            for j in range(7):
                if j != i and texts[j] != texts[i] and queries[j] != queries[i]:
                    scores.append(q[i] @ d[j] / temperature)
            for text, vector in negatives:
                if text and text != texts[i]:
                    scores.append(q[i] @ vector / temperature)
            losses.append(np.log(np.sum(np.exp(scores))) - scores[0])
        return np.array(losses)

    q, d, n = vectors
    losses = losses_of(INPUTS, TARGETS, q, d, list(zip(NEGATIVES, n, strict=True)) if hard else [])
    return (losses + losses_of(TARGETS, INPUTS, d, q, [])) / 2 if symmetric else losses


def actual_losses(vectors, temperature, symmetric, hard):
    texts = PairTexts(rows_of(INPUTS), rows_of(TARGETS), rows_of(NEGATIVES) if hard else None)
    q, d, n = jnp.asarray(vectors, jnp.float32)
    vectors = PairVectors(q, d, n if hard else None)
    texts = jax.tree.map(jnp.asarray, texts)
    targets = contrastive.score_targets(texts, vectors, temperature)
    inputs = contrastive.score_inputs(texts, vectors, temperature) if symmetric else None
    return contrastive.pair_losses(targets, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric, hard", CASES)
def test_the_loss_is_that_of_every_candidate_by_itself(one_device, symmetric, hard):
    vectors = drawn_vectors()
    actual = actual_losses(vectors, 0.3, symmetric, hard)
    expected = expected_losses(vectors, 0.3, symmetric, hard)
    np.testing.assert_allclose(actual.nll[:7], expected, rtol=2e-5, atol=1e-6)
    # Cold enough, the loss of a pair is 0 where it is right, and positive where another wins.
    frozen = expected_losses(vectors, 1e-2, False, hard)
    np.testing.assert_array_equal(actual.correct[:7] == 1, frozen < np.log(2))
    assert 0 < actual.correct[:7].sum() < 7


@pytest.mark.slow
@pytest.mark.parametrize("symmetric, hard", CASES)
def test_the_gradient_is_that_of_finite_differences(one_device, symmetric, hard):
    vectors, draw = drawn_vectors(), np.random.default_rng(1)

    def total(vectors, temperature):
        return jnp.sum(actual_losses(vectors, temperature, symmetric, hard).nll[:7])

    slopes = jax.grad(total, argnums=(0, 1))(jnp.asarray(vectors, jnp.float32), jnp.float32(0.3))
    for _ in range(3):
        direction, cooler = draw.normal(size=vectors.shape), draw.normal()
        ends = [
            expected_losses(vectors + e * direction, 0.3 + e * cooler, symmetric, hard).sum()
            for e in (1e-6, -1e-6)
        ]
        slope = np.sum(np.asarray(slopes[0], np.float64) * direction) + float(slopes[1]) * cooler
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4)


def pairs_batch(rows: int = 16, length: int = 6) -> Batch:
    """Random pairs with hard negatives, some of them equal, and a last row of padding."""
    draw = np.random.default_rng(3)

    def side(distinct):
        texts = [draw.integers(2, 64, draw.integers(1, length + 1)).tolist() for _ in range(rows)]
        texts = [texts[i % distinct] for i in range(rows - 1)] + [[]]
        return rows_of(texts, length)

    inputs, targets, negatives = side(13), side(14), side(15)
    weights = np.zeros_like(targets.segments, np.float32)
    return Batch(*targets, weights, *inputs, None, None, *negatives)


MESHES = {
    "one": (config.Mesh(), 1),
    "data": (config.Mesh(), 8),
    "fsdp and tensor": (config.Mesh(data=2, fsdp=2, tensor=2), 8),
}


@pytest.mark.slow
def test_negatives_are_those_of_the_whole_batch_on_every_mesh():
    readout = config.Readout(
        "vector", "mean", project=8, normalize=True, temperature=0.1, matching=True
    )
    cfg = dataclasses.replace(toy_model("encoder_only", layers=1), readout=readout)
    loss = config.Contrastive(symmetric=True, matching=0.5)
    results, weights = {}, None
    for name, (mesh, devices) in MESHES.items():
        sharding.use_mesh(mesh, jax.devices()[:devices])
        weights = weights or jax.device_get(model.initialize(cfg, jax.random.key(0)))
        placed = jax.tree.map(
            lambda x, shape: jax.device_put(x, shape.sharding), weights, model.shapes(cfg)
        )

        def loss_of(params, batch):
            batch = contrastive.weigh_pairs(batch)
            transformer = model.Transformer(cfg)
            sums = objective.pair_sums(
                transformer, loss, params, batch, StepContext(jax.random.key(5))
            )
            return sums.objective / sums.weights, sums

        differentiated = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        batch = sharding.place_batch(pairs_batch())
        results[name] = jax.device_get(differentiated(placed, batch))
    (_, sums), slopes = results["one"]
    assert sums.weights == 15 and np.abs(slopes["readout"]["log_temperature"]).max() > 1e-3
    expected = jax.tree.leaves(results["one"])
    for name, result in results.items():
        for leaf, wanted in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_joined_texts_are_one_after_the_other_without_padding(one_device):
    rows = matching.join_texts(*jax.tree.map(jnp.asarray, (rows_of(INPUTS), rows_of(TARGETS, 4))))
    for row, (first, second) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        size = len(first + second)
        assert rows.ids[row].tolist() == first + second + [0] * (10 - size)
        assert rows.segments[row].tolist() == [1] * size + [0] * (10 - size)
        assert rows.positions[row, :size].tolist() == list(range(size))


def test_negatives_are_drawn_by_the_softmax_of_their_scores(one_device):
    texts = jax.tree.map(
        jnp.asarray, PairTexts(rows_of(INPUTS), rows_of(TARGETS), rows_of(NEGATIVES))
    )
    q, d, n = jnp.asarray(drawn_vectors(), jnp.float32)
    scored = contrastive.score_targets(texts, PairVectors(q, d, n), 1.0)
    draw = jax.jit(jax.vmap(lambda key: contrastive.draw_negatives(scored, key).others.ids))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    every = np.concatenate([np.asarray(part.ids) for part in scored.texts])
    scores = np.where(scored.positive, -np.inf, np.asarray(scored.scores, np.float64))
    for row in range(7):
        law = np.exp(scores[row] - scores[row].max())
        law /= law.sum()
        for text in np.unique(every[law > 0], axis=0):
            wanted = law[(every == text).all(axis=1)].sum()
            share = (drawn[:, row] == text).all(axis=1).mean()
            assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-3
        # Neither the pair's own text, in any of its places, nor padding is drawn.
        assert not (drawn[:, row] == every[row]).all(axis=1).any()
        assert (drawn[:, row] > 0).any(axis=1).all()


def test_the_loss_of_matching_is_that_of_three_rows_for_each_pair(one_device):
    texts = jax.tree.map(jnp.asarray, PairTexts(rows_of(INPUTS), rows_of(TARGETS), None))
    q, d, _ = jnp.asarray(drawn_vectors(), jnp.float32)
    vectors, calls = PairVectors(q, d, None), []

    def match(first, second, key):
        calls.append((np.asarray(first.ids), np.asarray(second.ids)))
        margin = (first.ids.sum(axis=1) - second.ids.sum(axis=1)) / 10.0
        return jnp.stack([margin, -margin], axis=1)

    scored = (
        contrastive.score_targets(texts, vectors, 1.0),
        contrastive.score_inputs(texts, vectors, 1.0),
    )
    losses = contrastive.matching_losses(match, texts, scored, jax.random.key(1))
    expected = np.zeros(8)
    for (first, second), together in zip(calls, (1, 0, 0), strict=True):
        margin = (first.sum(axis=1) - second.sum(axis=1)) / 10.0
        expected += np.log1p(np.exp(2 * margin if together else -2 * margin)) / 3
    np.testing.assert_allclose(losses[:7], expected[:7], rtol=1e-5)
    (one, other), (same, wrong), (stranger, again) = calls
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(other, again)
    assert (wrong[:7] != other[:7]).any(axis=1).all()
    assert (stranger[:7] != one[:7]).any(axis=1).all()
