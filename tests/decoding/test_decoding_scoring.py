# SPDX-License-Identifier: Apache-2.0
"""Laws of scoring: teacher-forced log-probabilities equal those of decoding."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, decoding, model, sharding

KINDS = {
    "encoder_decoder": toy_model("encoder_decoder"),
    "decoder_only": toy_model("decoder_only", positions="rotary"),
    "prefix": toy_model("decoder_only", prefix_lm=True),
}
INPUTS = [[5, 9, 33], [7], [60, 2, 2, 8, 14, 31, 9], [12, 13]]
TARGETS = [[4, 1], [8, 8, 9, 1], [3], [30, 20, 10]]


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def lively(cfg):
    random = np.random.default_rng(3)

    def draw(shape):
        return (0.4 * random.normal(size=shape.shape)).astype(np.float32)

    return decoding.prepare_params(cfg, jax.tree.map(draw, model.shapes(cfg)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_decoded_text_is_its_log_probability(kind):
    cfg, decode = KINDS[kind], config.Decode(max_new_tokens=6, temperature=1.0)
    params = lively(cfg)
    result = decoding.generate(cfg, params, decoding.make_request(cfg, INPUTS, decode), decode)
    texts = [row[0, : size[0]].tolist() for row, size in zip(*result[:2], strict=True)]
    scores = decoding.score(cfg, params, INPUTS, texts)
    np.testing.assert_allclose(scores.log_probability, result.log_probability[:, 0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_of_all_next_tokens_add_up_to_one(kind):
    cfg = KINDS[kind]
    params = lively(cfg)
    scores = decoding.score(cfg, params, [INPUTS[0]] * 64, [[4, token] for token in range(64)])
    np.testing.assert_allclose(np.exp(scores.tokens[:, 1]).sum(), 1, atol=1e-5)
    np.testing.assert_allclose(scores.tokens[:, 0], scores.tokens[0, 0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_sum_over_its_tokens_and_depends_on_no_other_row(kind):
    cfg = KINDS[kind]
    params = lively(cfg)
    scores = decoding.score(cfg, params, INPUTS, TARGETS)
    assert scores.lengths.tolist() == [2, 4, 1, 3]
    np.testing.assert_allclose(scores.tokens.sum(axis=1), scores.log_probability, rtol=1e-6)
    assert np.all(scores.tokens[np.arange(4) >= scores.lengths[:, None]] == 0)
    alone = decoding.score(cfg, params, INPUTS[2:3], TARGETS[2:3])
    np.testing.assert_allclose(alone.log_probability[0], scores.log_probability[2], rtol=1e-5)


def test_what_cannot_be_scored_says_why():
    cfg = KINDS["encoder_decoder"]
    with pytest.raises(ValueError, match="4 inputs but 1 targets"):
        decoding.score(cfg, {}, INPUTS, TARGETS[:1])
    with pytest.raises(ValueError, match="Target 1 is empty"):
        decoding.score(cfg, {}, INPUTS[:2], [[3], []])
    with pytest.raises(ValueError, match="vocabulary 0..63"):
        decoding.score(cfg, {}, INPUTS[:1], [[99]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder_only", "learned", "prefix"])
def test_without_start_token_the_score_is_the_log_probability_too(kind):
    learned = toy_model("decoder_only", positions="learned", max_length=64)
    cfg = dataclasses.replace((KINDS | {"learned": learned})[kind], add_bos=False)
    params, decode = lively(cfg), config.Decode(max_new_tokens=6, temperature=1.0)
    prompts = [*INPUTS[:3], []]
    result = decoding.generate(cfg, params, decoding.make_request(cfg, prompts, decode), decode)
    texts = [row[0, : size[0]].tolist() for row, size in zip(*result[:2], strict=True)]
    scores = decoding.score(cfg, params, prompts, texts)
    np.testing.assert_allclose(scores.log_probability, result.log_probability[:, 0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only", "no start"])
def test_ends_are_the_scores_of_the_stops_in_the_place_of_each_token(kind):
    cfg = KINDS.get(kind) or dataclasses.replace(KINDS["decoder_only"], add_bos=False)
    params, stops = lively(cfg), (1, 5)
    scores = decoding.score(cfg, params, INPUTS, TARGETS, stops)
    for row, target in enumerate(TARGETS):
        for place in range(len(target)):
            texts = [[*target[:place], stop] for stop in stops]
            ended = decoding.score(cfg, params, [INPUTS[row]] * 2, texts).tokens[:, place]
            expected = np.logaddexp(*ended)
            np.testing.assert_allclose(scores.ends[row, place], expected, rtol=1e-4)
    assert decoding.score(cfg, params, INPUTS, TARGETS).ends is None
