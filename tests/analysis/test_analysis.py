# SPDX-License-Identifier: Apache-2.0
"""Laws of explanations: what they show is what the model does, and drawing it is safe anywhere."""

import dataclasses
import html.parser

import jax
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import analysis, config, model, sharding
from t5x_lite.analysis import drawing, reading
from t5x_lite.evaluation import predict
from t5x_lite.kernels import dense_mask
from t5x_lite.kernels.api import DenseMask
from t5x_lite.model import positions
from t5x_lite.tokenizers import vocabularies

LETTERS = "abcdefghijklmnopqrstuvwxyz é<&>"
MODELS = {
    "t5": toy_model("encoder_decoder"),
    "merged": toy_model("encoder_decoder", **FAMILIES["t5gemma2"]),
    "decoder": toy_model("decoder_only", positions="rotary"),
    "prefix": toy_model("decoder_only", prefix_lm=True),
    "startless": toy_model("decoder_only", add_bos=False, **FAMILIES["gpt2"] | {"max_length": 40}),
}
DECODE = config.Decode(max_new_tokens=6)


def predictor_of(cfg, scale=0.5):
    draw = np.random.default_rng(0)

    def make(shape):
        return (scale * draw.normal(size=shape.shape)).astype(np.float32)

    params = jax.tree.map(make, model.shapes(cfg))
    return predict.Predictor(cfg, params, (vocabularies.SymbolVocabulary(LETTERS),) * 2)


def explained(name, input="hello <b>", target="and out", **options):
    return analysis.explain(predictor_of(MODELS[name]), input, target, decode=DECODE, **options)


@pytest.fixture
def eight_devices():
    sharding.use_mesh(config.Mesh())


@pytest.fixture
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_of_scoring(eight_devices, name):
    explanation = explained(name)
    predictor = predictor_of(MODELS[name])
    rows = sharding.batch_shards()
    total, tokens = predictor.score(["hello <b>"] * rows, ["and out"] * rows)[0]
    log_probs = explanation.alternatives.predictions.log_probability_of_written
    np.testing.assert_allclose(log_probs, tokens, atol=1e-4)
    assert f"{total:.2f}" in explanation.alternatives.summary() or log_probs.sum() == pytest.approx(
        total
    )
    assert explanation.written == "and out" and explanation.alternatives.tokens[-1] == "<end>"


@pytest.mark.parametrize("name", ["t5", "startless"])
def test_ranks_and_alternatives_agree_with_one_another(one_device, name):
    predictions = explained(name, top=64).alternatives.predictions
    np.testing.assert_allclose(np.exp(predictions.log_probability).sum(-1), 1, atol=1e-4)
    wanted = [*vocabularies.SymbolVocabulary(LETTERS).encode("and out"), 1]
    at = np.take_along_axis(predictions.ids, predictions.rank[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(at, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged", "prefix"])
def test_what_is_written_greedily_was_the_first_choice_everywhere(one_device, name):
    explanation = explained(name, target=None)
    predictor = predictor_of(MODELS[name])
    assert explanation.written == predictor.predict(["hello <b>"], DECODE)[0].texts[0]
    assert np.all(explanation.alternatives.predictions.rank == 0)
    assert explanation.lens.best[-1] == explanation.alternatives.tokens
    assert explanation.blocks.blocks == [[token] for token in explanation.blocks.tokens]


@pytest.mark.slow
def test_blocks_are_the_text_in_the_calls_that_wrote_it(one_device):
    predictor = predictor_of(MODELS["decoder"], scale=0.1)

    def explain(**options):
        return analysis.explain(
            predictor, "abababab", decode=config.Decode(max_new_tokens=24, **options)
        )

    plain, explanation = explain(drafter="plain"), explain(drafter="lookup", draft_length=8)
    assert explanation.written == plain.written
    blocks = explanation.blocks
    assert [token for block in blocks.blocks for token in block] == plain.blocks.tokens
    # The last token of every forward pass is the model's own, unless a drafted end has cut it.
    assert blocks.drawn.drafted_by.count("model") >= len(blocks.blocks) - 1
    assert len(blocks.blocks) < len(blocks.tokens) and "lookup" in str(blocks)


@pytest.mark.slow
def test_decoder_lens_is_the_model_with_fewer_encoder_layers(eight_devices):
    cfg = MODELS["t5"]
    predictor = predictor_of(cfg)
    explanation = explained("t5").decoder_lens
    assert len(explanation.texts) == cfg.encoder.layers + 1
    decode = dataclasses.replace(DECODE)
    assert explanation.texts[-1] == predictor.predict(["hello <b>"], decode)[0].texts[0]
    for layers in range(1, cfg.encoder.layers):
        short = dataclasses.replace(cfg.encoder, layers=layers)
        predictor.cfg = dataclasses.replace(cfg, encoder=short)
        encoder = predictor.params["encoder"]
        cut = dict(encoder, layers=encoder["layers"][:layers])
        predictor.params = dict(predictor.params, encoder=cut)
        assert explanation.texts[layers] == predictor.predict(["hello <b>"], decode)[0].texts[0]


def test_the_lens_reads_a_layer_as_a_decoder_that_ends_there(one_device):
    cfg = MODELS["decoder"]
    explanation, predictor = explained("decoder"), predictor_of(cfg)
    predictor.cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, layers=1))
    decoder = predictor.params["decoder"]
    cut = dict(decoder, layers=decoder["layers"][:1])
    predictor.params = dict(predictor.params, decoder=cut)
    _, tokens = predictor.score(["hello <b>"], ["and out"])[0]
    np.testing.assert_allclose(
        explanation.lens.predictions.log_probability_of_written[1], tokens, atol=1e-4
    )


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_position_bias_is_what_attention_adds(one_device, name):
    cfg = toy_model("encoder_decoder", **FAMILIES.get(name, {}))
    predictor = predictor_of(cfg)
    explanation = analysis.position_bias(cfg, predictor.params)
    for stack, both in (("encoder", True), ("decoder", False)):
        tower = predictor.params[stack]
        tables = [each["attention"].get("bias") for each in tower["layers"]]
        tables = tables if name == "umt5" else [tower["bias"]]
        assert explanation.bias[stack].shape[0] == len(tables)
        distance = np.arange(5)[:, None] - np.arange(5)
        over = DenseMask(distance[None] >= -4, jax.numpy.asarray(distance))
        for table, bias in zip(tables, explanation.bias[stack], strict=True):
            relative = positions.relative(table, getattr(cfg, stack), both)
            expected = np.asarray(dense_mask.materialize_bias(relative, over))[0]
            at = bias[:, -distance + np.flatnonzero(explanation.distances == 0)[0]]
            visible = np.ones_like(distance, bool) if both else distance >= 0
            np.testing.assert_allclose(at[:, visible], expected[:, visible], rtol=1e-6)
            assert both or np.all(np.isnan(at[:, ~visible]))


def test_maps_have_the_shapes_and_names_of_what_was_read(one_device):
    attention = explained("t5").attention
    assert attention.inputs == [*"hello", "▁", *"<b>", "<end>"]
    assert attention.tokens == ["<start>", *"and", "▁", *"out"]
    assert attention.cross.shape == (2, 4, 8, 10) and attention.encoder.shape == (2, 4, 10, 10)
    one = attention.map("cross", layer=1, head=2)
    np.testing.assert_array_equal(one.shares, attention.cross[0, 2])
    mean = attention.map("decoder")
    np.testing.assert_allclose(mean.shares, attention.decoder[1].mean(axis=0))
    assert "<start> 100 %" in str(mean)


class Balanced(html.parser.HTMLParser):
    """Parser of a page: its tags, text and links; every tag has to be closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], set(), [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_pages_stand_alone_and_texts_are_never_markup(one_device, name):
    attack = "<script>alert(1)</script>&amp;"
    predictor = predictor_of(MODELS[name])
    explanation = analysis.explain(predictor, attack, attack, decode=DECODE)
    page = Balanced(explanation._repr_html_())
    assert page.tags <= set("div h4 p table tr th td img span small br pre b".split())
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert attack in "".join(page.text)
    for view in explanation.views():
        assert Balanced(view._repr_html_()).text and str(view) and "\x1b" not in str(view)
    assert attack in str(explanation)


def test_a_view_that_the_model_has_nothing_for_says_so(one_device):
    explanation = explained("decoder")
    with pytest.raises(ValueError, match="has none; its own layers are in the logit lens"):
        _ = explanation.decoder_lens
    with pytest.raises(ValueError, match="lacks a table of position biases.*rotary"):
        _ = explanation.positions
    with pytest.raises(ValueError, match="was given, not written block by block"):
        _ = explanation.blocks
    with pytest.raises(ValueError, match="no cross attention; it has .'decoder'"):
        explanation.attention.map("cross")
    with pytest.raises(ValueError, match="kinds encoder, decoder, cross; got 'self'"):
        explanation.attention.map("self")
    with pytest.raises(ValueError, match="from 1 to 2; got layer=0"):
        explanation.attention.map("decoder", layer=0)
    with pytest.raises(ValueError, match="from 0 to 3; got head=4"):
        explanation.attention.map("decoder", head=4)


def test_what_cannot_be_explained_is_refused_with_the_reason(one_device, monkeypatch):
    with pytest.raises(ValueError, match="the model needs a decoder"):
        analysis.explain(predictor_of(toy_model("encoder_only")), "a", "b", decode=DECODE)
    with pytest.raises(ValueError, match="top must be in 1..64"):
        explained("t5", top=0)
    with pytest.raises(ValueError, match="takes 47 positions .* the model has 40"):
        explained("startless", input="a" * 20, target="b" * 25)
    monkeypatch.setattr(reading, "MOST_BYTES", 20000)
    with pytest.raises(ValueError, match="explain at most .* tokens at once"):
        explained("t5", input="a" * 100)


def test_an_empty_input_and_unknown_characters_are_explained_too(one_device):
    assert explained("t5", input="").attention.inputs == ["<end>"]
    assert explained("decoder", input="").attention.tokens[0] == "<start>"
    assert explained("t5", input="日本語").attention.inputs[:3] == ["?"] * 3


def test_labels_show_blanks_ends_and_ids_without_text():
    symbols = vocabularies.SymbolVocabulary(["AH", "T"], separator=" ")
    assert drawing.token_labels(symbols, [3, 4, 1, 0]) == ["AH", "T", "<end>", "<pad>"]
    assert drawing.token_label(symbols, 0, start=0) == "<start>"
    spelled = vocabularies.ByteVocabulary()
    assert drawing.token_labels(spelled, spelled.encode("a \n")) == ["a", "▁", "⏎"]
    assert drawing.token_labels(spelled, spelled.encode("é")) == ["<198>", "<172>"]


def test_shades_and_columns_are_spread_over_what_there_is():
    assert drawing.shades(np.array([0.0, 0.01, 0.25, 1.0])) == "  ▒█"
    assert drawing.spread_evenly(3) == [0, 1, 2] and drawing.spread_evenly(31)[-1] == 30
    assert len(drawing.spread_evenly(31)) == 8
