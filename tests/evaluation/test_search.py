# SPDX-License-Identifier: Apache-2.0
"""Laws of searches over texts, of lattices and of coverage, in a session."""

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, interactive, model, sharding
from t5x_lite.evaluation import predict
from t5x_lite.evaluation.coverage import coverage_penalties
from t5x_lite.tokenizers import vocabularies

LETTERS = "abcdefghijklmnopqrstuvwxyz é"
MODELS = {
    "t5": toy_model("encoder_decoder", layers=1),
    "decoder": toy_model("decoder_only", layers=1, positions="rotary"),
}


@pytest.fixture(autouse=True)
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def session_of(name, scale=0.3):
    cfg, draw = MODELS[name], np.random.default_rng(0)

    def make(shape):
        return (scale * draw.normal(size=shape.shape)).astype(np.float32)

    pair = (vocabularies.SymbolVocabulary(LETTERS),) * 2
    predictor = predict.Predictor(cfg, jax.tree.map(make, model.shapes(cfg)), pair)
    return interactive.Session(predictor, config.Decode(max_new_tokens=11))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_judge_sees_the_input_and_the_texts_so_far(name):
    session, texts_judged = session_of(name), []

    def judge(input, texts):
        texts_judged.append((input, list(texts)))
        return [text.count("a") for text in texts]

    options = dict(temperature=1.0, seed=3, n_best=4)
    searched = dict(search="best", particles=4, segment_tokens=5)
    results = session.search("ab ab", judge, **options, **searched)
    assert {input for input, _ in texts_judged} == {"ab ab"} and len(texts_judged) <= 3
    assert [len(texts) for _, texts in texts_judged] == [4] * len(texts_judged)
    assert results.texts == sorted(texts_judged[-1][1], key=lambda text: -text.count("a"))
    assert results.utilities == [text.count("a") for text in results.texts]
    # Segments as long as the text: the samples of plain decoding.
    whole = session.search("ab ab", judge, **options, **searched | {"segment_tokens": 99})
    assert sorted(whole.texts) == sorted(session.generate("ab ab", **options))


@pytest.mark.slow
@pytest.mark.parametrize("search", ["best", "rejection:2", "smc", "puct:3"])
def test_every_search_works_with_drafters_stops_and_details(search):
    session = session_of("t5")
    options = dict(temperature=1.0, seed=5, search=search, particles=3, segment_tokens=4)
    options |= dict(segment_stop=[" "], stop="z", logprobs=1)

    def judge(input, texts):
        return [-abs(len(text) - 6) for text in texts]

    plain = session.search(["ab", "cd"], judge, **options)
    drafted = session.search(["ab", "cd"], judge, **options, drafter="lookup", draft_length=4)
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert [len(each.details[0]) for each in plain] == [len(each.tokens[0]) for each in plain]
    assert "z" not in plain[0].texts[0]
    # A text is searched the same alone, by its number.
    ids = session.predictor.encode_inputs(["cd"])
    alone = session.settings(options | {"judge": next(iter(session.predictor.choosers))[1]})
    (same,) = session.predictor.predict_ids(ids, alone, rows=[1])
    assert same.tokens == plain[1].tokens


def test_what_a_search_cannot_follow_is_refused():
    session = session_of("t5")
    with pytest.raises(ValueError, match=r"set Decode\.draft_length to 2 or more"):
        session.search("ab", lambda input, texts: [0.0] * len(texts), drafter="lookup")
    for values in ([0.0], [np.nan] * 8, [np.inf] * 8, None):
        with pytest.raises(ValueError, match=r"Decode\.judge: the function must return a finite"):
            session.search("ab", lambda input, texts, values=values: values)
    with pytest.raises(ValueError, match="to stream, leave out search"):
        list(session.stream("ab", temperature=1.0, search="smc", judge="score"))
    with pytest.raises(ValueError, match="smc:4"):
        session.search("ab", "score", search="smc:4")


@pytest.mark.slow
def test_a_lattice_of_a_session_has_the_beams():
    session = session_of("t5")
    lattice = session.lattice("ab", merged=2, beams=4, alpha=0.0)
    paths = {tuple(ids) for ids, _ in lattice.list_paths()}
    beams = session.predict("ab", beams=4, alpha=0.0, n_best=4)
    assert {tuple(ids) for ids in beams.tokens} <= paths


def test_coverage_is_that_of_the_attention_that_explain_shows():
    session = session_of("t5", scale=0.8)
    texts = ["ba", "abc ab", "c"]
    penalties = coverage_penalties(session.predictor, ["ab c"] * 3, texts)
    for text, penalty in zip(texts, penalties, strict=True):
        cross = session.explain("ab c", text).attention.cross[-1].astype(np.float64)
        written = len(session.predictor.encode_targets([text])[0])
        got = cross[:, :written].mean(axis=0).sum(axis=0)
        assert penalty == pytest.approx(np.log(np.minimum(got, 1)).sum(), abs=1e-4)
    assert len({round(each, 3) for each in penalties}) == 3
    plain = session.predict("ab c", beams=4, n_best=4)
    chosen = session.predict("ab c", beams=4, n_best=4, choose="coverage:2")
    assert sorted(chosen.texts) == sorted(plain.texts)
    covered = coverage_penalties(session.predictor, ["ab c"] * 4, chosen.texts)
    utilities = [score + 2 * each for score, each in zip(chosen.scores, covered, strict=True)]
    np.testing.assert_allclose(chosen.utilities, utilities, atol=1e-4)
    assert chosen.utilities == sorted(chosen.utilities, reverse=True)
    with pytest.raises(ValueError, match="this model has none: it needs an encoder-decoder"):
        session_of("decoder").predict("ab", beams=2, n_best=2, choose="coverage:0.2")
    with pytest.raises(ValueError, match="BETA is a number"):
        config.Decode(beams=2, n_best=2, choose="coverage:x")
