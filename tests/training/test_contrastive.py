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
    return contrastive.pair_losses(texts, vectors, temperature, symmetric)


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
    readout = config.Readout("vector", "mean", project=8, normalize=True, temperature=0.1)
    cfg = dataclasses.replace(toy_model("encoder_only", layers=1), readout=readout)
    loss = config.Contrastive(symmetric=True)
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
            sums = objective.pair_sums(transformer, loss, params, batch, StepContext())
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
