# SPDX-License-Identifier: Apache-2.0
"""Laws of a session at play: a stream is the text, a step teaches, nothing else moves."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, decoding, interactive, model, sharding
from t5x_lite.evaluation import predict, streaming
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import fit_in_memory

LETTERS = "abcdefghijklmnopqrstuvwxyz é"
MODELS = {
    "t5": toy_model("encoder_decoder", layers=1),
    "decoder": toy_model("decoder_only", layers=1, positions="rotary"),
    "startless": toy_model(
        "decoder_only", add_bos=False, **FAMILIES["gpt2"] | {"max_length": 64, "layers": 1}
    ),
}


def session_of(name, scale=0.3, vocabulary=None):
    cfg, draw = MODELS[name], np.random.default_rng(0)

    def make(shape):
        return (scale * draw.normal(size=shape.shape)).astype(np.float32)

    params = jax.tree.map(make, model.shapes(cfg))
    pair = (vocabulary or vocabularies.SymbolVocabulary(LETTERS),) * 2
    predictor = predict.Predictor(cfg, params, pair)
    return interactive.Session(predictor, config.Decode(max_new_tokens=11))


@pytest.fixture
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.parametrize(
    "name, every, options",
    [
        ("t5", 1, {}),
        ("decoder", 3, {"temperature": 1.0, "seed": 3}),
        ("startless", 2, {"decoder": "lookup", "width": 8}),
    ],
)
def test_a_stream_put_together_is_the_text(one_device, name, every, options):
    session = session_of(name)
    pieces = list(session.stream("ab ab ab", every=every, **options))
    plain = {key: value for key, value in options.items() if key not in ("decoder", "width")}
    assert "".join(pieces) == session.generate("ab ab ab", **plain)
    assert len(pieces) >= 2


def test_a_stream_has_the_ids_calls_and_drafters_of_generation():
    sharding.use_mesh(config.Mesh(data=2, tensor=4))
    session = session_of("t5", scale=0.1)
    decode = config.Decode(max_new_tokens=20, drafter="lookup", draft_length=8)
    whole = session.predictor.predict(["abab"], decode)[0]
    pieces = list(streaming.stream_text(session.predictor, "abab", decode, every=2))

    def gather(name):
        return [each for piece in pieces for each in getattr(piece, name)]

    assert gather("tokens") == whole.tokens[0]
    assert gather("calls") == whole.calls and gather("drafted_by") == whole.drafted_by
    assert pieces[-1].total < len(whole.calls)


def test_multibyte_characters_and_trailing_spaces_wait_until_they_are_complete():
    spelled = vocabularies.ByteVocabulary()
    text = "é 日 x  "
    ids = [*spelled.encode(text), 1]

    def row(values):
        return np.array(values, np.int32)[None, None]

    def results():
        for count in range(1, len(ids) + 1):
            zeros = row([0] * count)
            length, none = row(count), row(0)
            yield decoding.Result(row(ids[:count]), length, none, none, count, zeros, zeros)

    pieces = list(streaming.text_pieces(SimpleNamespace(targets=spelled), results(), ("model",)))
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert sum((piece.tokens for piece in pieces), []) == ids


def test_what_cannot_be_streamed_is_refused_before_anything_is_written(one_device):
    session = session_of("t5")
    with pytest.raises(ValueError, match="to stream, leave out beams"):
        session.stream("a", beams=2)
    with pytest.raises(ValueError, match="got every=0"):
        session.stream("a", every=0)
    with pytest.raises(ValueError, match="did you mean draft_length"):
        session.stream("a", lenght=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_steps_teach_the_pairs_and_the_first_loss_is_that_of_scoring(one_device, name):
    session = session_of(name)
    before = jax.tree.map(np.asarray, session.predictor.params)
    inputs, targets = ["ab", "hello"], ["xyz", "no"]
    scores = session.score(inputs, targets)
    tokens = sum(len(row) for row in session.predictor.encode_targets(targets))
    first = session.train_step(inputs, targets, learning_rate=2e-2)
    assert first == pytest.approx(-sum(scores) / tokens, abs=1e-4)
    for _ in range(100):
        last = session.train_step(inputs, targets, learning_rate=2e-2)
    assert last < 0.05 and [*session.generate(inputs)] == targets
    fresh = session_of(name).predictor.params
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_gradient_is_that_of_small_differences_and_fillers_count_for_nothing():
    sharding.use_mesh(config.Mesh())
    session = session_of("t5")
    predictor = session.predictor
    ids = predictor.encode_inputs(["ab"]), predictor.encode_targets(["xyz"])
    learner = fit_in_memory.Learner(predictor.cfg, predictor.params)
    loss = learner.step(*ids, learning_rate=1e-4)
    score = session.score("ab", "xyz")
    assert loss == pytest.approx(-score / 4, abs=1e-5)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), learner.exact, predictor.params)
    # Adam's first step moves a weight by its rate, whatever its slope is.
    assert max(jax.tree.leaves(moved)) == pytest.approx(1e-4, rel=0.02)
    example = fit_in_memory.make_training_examples(predictor.cfg, *ids)
    assert example.weights.shape[0] == 8 and float(example.weights.sum()) == 4


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(one_device):
    session = session_of("t5")
    session.train_step("ab", "x", learning_rate=1e-3)
    good = session.predictor.params
    session.learner.exact = jax.tree.map(lambda x: x * np.inf, session.learner.exact)
    with pytest.raises(ValueError, match="nothing was learned"):
        session.train_step("ab", "x")
    assert session.predictor.params is good
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        session.train_step("ab", "x", learning_rate=0)
    with pytest.raises(ValueError, match="two texts, or two lists"):
        session.train_step("ab", ["x"])
    with pytest.raises(ValueError, match="2 inputs but 1 targets"):
        session.train_step(["a", "b"], ["x"])


def test_explaining_is_a_method_of_the_session(one_device):
    session = session_of("t5")
    explanation = session.explain("ab", top=3, max_new_tokens=4)
    assert explanation.written == session.generate("ab", max_new_tokens=4)
    assert explanation.alternatives.predictions.ids.shape[1] == 3
    assert session.explain("ab", "xyz").written == "xyz"
    with pytest.raises(ValueError, match="did you mean top_k"):
        session.explain("ab", topk=3)
    assert dataclasses.is_dataclass(explanation.lens)
