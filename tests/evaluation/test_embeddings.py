# SPDX-License-Identifier: Apache-2.0
"""Laws of text embeddings: what pools them, that company and padding change nothing, files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, decoding, interactive, model, sharding
from t5x_lite import infer as infer_command
from t5x_lite.checkpoints import manager
from t5x_lite.config import gin_file
from t5x_lite.data import save_pair
from t5x_lite.evaluation import embed, predict
from t5x_lite.model import matching
from t5x_lite.tokenizers import vocabularies

TEXTS = ["a", "hello", "hello there", "b" * 20, "é", "zz top", "one more", "", "c d e f g"]
LETTERS = "abcdefghijklmnopqrstuvwxyz é"


def params_of(cfg):
    draw = np.random.default_rng(0)

    def make(shape):
        return (0.5 * draw.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map(make, model.shapes(cfg))


def predictor_of(cfg, params=None, batch_size=4):
    params = params_of(cfg) if params is None else params
    pair = (vocabularies.SymbolVocabulary(LETTERS),) * 2
    return predict.Predictor(cfg, params, pair, batch_size=batch_size)


@pytest.fixture
def mesh():
    return sharding.use_mesh(config.Mesh(), jax.devices()[:1])


GEMMA = {**FAMILIES["t5gemma"], "separate_embeddings": False}
MODELS = {
    "t5": toy_model("encoder_decoder", layers=1),
    "encoder": toy_model("encoder_only", layers=1),
    "decoder": toy_model("decoder_only", layers=1, positions="rotary"),
    "gemma": toy_model("decoder_only", **GEMMA),
    "learned": toy_model("decoder_only", layers=1, positions="learned", max_length=64),
}


CASES = [("t5", "mean"), ("t5", "first"), ("encoder", "last"), ("decoder", "last")]
CASES += [("gemma", "mean"), ("learned", "mean")]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", CASES)
def test_company_and_padding_change_nothing(mesh, name, kind):
    predictor = predictor_of(MODELS[name], batch_size=64)
    together = embed.embed(predictor, TEXTS, kind)
    assert together.shape == (len(TEXTS), 16) and together.dtype == np.float32
    predictor.batch_size = 1
    alone = embed.embed(predictor, TEXTS, kind)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) == len(TEXTS)


MATCHING = config.Readout("vector", "mean", matching=True, max_length=8)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_score_of_a_pair_is_the_classifiers_of_both_texts_in_one_row(mesh, name):
    cfg = dataclasses.replace(MODELS[name], readout=MATCHING)
    params = params_of(cfg)
    session = interactive.Session(predictor_of(cfg, params), config.Decode())
    firsts, seconds = ["a", "hello there", "zz"], ["hello", "é", "a b c d e f g h i"]
    scores = session.score(firsts, seconds)
    assert session.score(firsts[1], seconds[1]) == pytest.approx(scores[1], abs=1e-5)
    vocabulary = vocabularies.SymbolVocabulary(LETTERS)

    def rows(texts):
        # Cut to Readout.max_length, its end kept, as before a vector; after a decoder's start.
        start = [] if cfg.encoder else [cfg.decoder_start_token_id]
        ids = [[*start, *vocabulary.encode(text)[:7], 1] for text in texts]
        padded = np.array([[*row, *[0] * (9 - len(row))] for row in ids])
        segments = (np.arange(9) < [[len(row)] for row in ids]).astype(np.int32)
        return matching.TextRows(padded, segments, np.arange(9) * segments)

    apply = functools.partial(model.Transformer(cfg).apply, {"params": params})
    logits = apply(rows(firsts), rows(seconds), method=matching.match_logits)
    np.testing.assert_allclose(scores, jax.nn.log_softmax(logits)[:, 1], atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "encoder"])
def test_vectors_are_pooled_from_what_the_encoder_gives(mesh, name):
    cfg, text = MODELS[name], "hello there"
    params = params_of(cfg)
    ids = jnp.array([[*vocabularies.SymbolVocabulary(LETTERS).encode(text), 1]])
    where = jnp.arange(ids.shape[1])[None]
    arguments = ({"params": params}, ids, jnp.ones_like(ids), where)
    states = model.Transformer(cfg).apply(*arguments, method=model.Transformer.encode)[0]
    wanted = {"mean": states.mean(axis=0), "first": states[0], "last": states[-1]}
    predictor = predictor_of(cfg, params)
    for kind, vector in wanted.items():
        np.testing.assert_allclose(embed.embed(predictor, [text], kind)[0], vector, atol=1e-5)


def test_a_decoders_last_vector_is_what_its_next_token_is_read_from(mesh):
    cfg = MODELS["decoder"]
    params = params_of(cfg)
    predictor = predictor_of(cfg, params)
    predictor.ended = False
    vector = embed.embed(predictor, ["hello"], "last")
    head = {"params": params}
    logits = model.Transformer(cfg).apply(
        head, jnp.array(vector)[:, None], method=model.Transformer.logits
    )
    ids = predictor.encode_inputs(["hello"])
    request = decoding.make_request(cfg, ids, config.Decode(max_new_tokens=1))
    result = decoding.generate(cfg, predictor.params, request, config.Decode(max_new_tokens=1))
    assert int(jnp.argmax(logits[0, 0])) == int(result.tokens[0, 0, 0])


def test_a_models_own_pooling_is_kept(mesh):
    first_pooling = config.Readout("vector", "first", project=5, normalize=True)
    cfg = dataclasses.replace(MODELS["encoder"], readout=first_pooling)
    vectors = embed.embed(predictor_of(cfg), TEXTS[:3])
    assert vectors.shape == (3, 5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    same = embed.embed(predictor_of(cfg), TEXTS[:3], "first")
    np.testing.assert_array_equal(vectors, same)


def test_a_text_is_cut_as_sentence_transformers_cuts_it(mesh):
    pooling = config.Readout("vector", "mean", max_length=5)
    cfg = dataclasses.replace(MODELS["encoder"], readout=pooling)
    params = params_of(cfg)
    predictor = predictor_of(cfg, params)
    # Four letters and the end: the beginning of a longer text has the same vector.
    cut, whole = embed.embed(predictor, ["helloagain", "hell"])
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    uncut = predictor_of(dataclasses.replace(cfg, readout=config.Readout("vector", "mean")), params)
    np.testing.assert_allclose(embed.embed(uncut, ["hell"])[0], cut, atol=1e-6)
    assert np.abs(embed.embed(uncut, ["helloagain"])[0] - cut).max() > 1e-3


def test_no_texts_are_no_vectors(mesh):
    assert embed.embed(predictor_of(MODELS["t5"]), []).shape == (0, 16)


def test_texts_that_cannot_be_read_are_errors(mesh):
    with pytest.raises(ValueError, match="pooled by mean, first, last; got 'max'"):
        embed.embed(predictor_of(MODELS["t5"]), ["a"], "max")
    with pytest.raises(ValueError, match="Text 1 takes 72 positions, but the model has 64"):
        embed.embed(predictor_of(MODELS["learned"]), ["a", 70 * "a"])


def write_folder(folder, monkeypatch, cfg):
    """Makes a run folder of a model; random weights stand in for its checkpoint."""
    lengths = {"inputs": 32, "targets": 32}
    run = config.Run(
        model_dir=str(folder), model=cfg, data=config.Data(task="cmudict_g2p", lengths=lengths)
    )
    (folder / "config.gin").write_text(gin_file.to_text(run))
    save_pair(folder / "vocabulary", *(vocabularies.SymbolVocabulary(LETTERS),) * 2)
    sharding.use_mesh(config.Mesh())
    params = params_of(cfg)
    (folder / manager.FOLDER / "3").mkdir(parents=True)
    monkeypatch.setattr(manager, "load_params", lambda *_, **__: (params, 3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder of an encoder alone."""
    write_folder(tmp_path, monkeypatch, MODELS["encoder"])
    return tmp_path


def test_infer_writes_a_vector_for_every_line(folder):
    words, out = folder / "words.txt", folder / "out.jsonl"
    words.write_text("cat\nhats\n\nzebra\n")
    infer_command.main(
        [f"--checkpoint={folder}", f"--input={words}", f"--output={out}", "--embed=mean"]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    session = interactive.load(folder)
    result = [row["embedding"] for row in rows if "embedding" in row]
    np.testing.assert_allclose(result, session.embed(["cat", "hats", "zebra"], "mean"), atol=1e-5)
    assert session.embed("cat").shape == (16,)


def test_vectors_are_no_text(folder, capsys):
    with pytest.raises(SystemExit):
        infer_command.main([f"--checkpoint={folder}", "--embed=mean", "--text"])
    assert "--embed writes vectors as JSON" in capsys.readouterr().err


def test_infer_scores_pairs_and_names_those_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    readout = dataclasses.replace(MATCHING, max_length=None)
    write_folder(tmp_path, monkeypatch, dataclasses.replace(MODELS["learned"], readout=readout))
    pairs = [("hello", "zz"), ("a" * 40, "b" * 40), ("a", 7), ("a" * 70, "b")]
    lines = [json.dumps({"input": first, "target": second}) for first, second in pairs]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    flags = [f"--checkpoint={tmp_path}", f"--input={source}", f"--output={out}", "--targets=target"]
    infer_command.main(flags)
    scored, *troubled = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = interactive.load(tmp_path).score("hello", "zz")
    assert scored["log_probability"] == pytest.approx(wanted, abs=1e-4) and wanted < 0
    assert troubled[0]["error"] == "takes 84 positions, but the model has 64 (Stack.max_length)"
    assert "target" in troubled[1]["error"] and troubled[2]["error"].startswith(
        "takes 72 positions"
    )
    with pytest.raises(ValueError, match="Pair 0 takes 84 positions"):
        interactive.load(tmp_path).score(*pairs[1])
    with pytest.raises(SystemExit):
        infer_command.main([*flags, "--pairs"])
    assert "--pairs" in capsys.readouterr().err
