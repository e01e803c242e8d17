# SPDX-License-Identifier: Apache-2.0
"""Laws of Decode.compute: int8 products against float64, rows alone or not, drafts, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model

from t5x_lite import config, decoding, interactive, model, sharding
from t5x_lite.checkpoints import weights
from t5x_lite.evaluation import predict
from t5x_lite.model import adapters, computation, quantization
from t5x_lite.tokenizers import vocabularies

LETTERS = "abcdefghijklmnopqrstuvwxyz é"
MODELS = {
    "t5": toy_model("encoder_decoder", layers=1),
    "tied": toy_model("encoder_decoder", layers=1, tied=True, gated=False, activation="relu"),
    "decoder": toy_model("decoder_only", layers=2, positions="rotary"),
}
TEXTS = ["ab ab ab", "é", "the quick brown fox", "zzz"]


@pytest.fixture(autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def drawn(cfg: config.Model, scale: float = 0.3) -> dict:
    """Weights of a model, drawn wide, so that texts differ from one another."""
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: (scale * draw.normal(size=shape.shape)).astype(np.float32), model.shapes(cfg)
    )


def session_of(name: str) -> interactive.Session:
    """A session of a toy."""
    pair = (vocabularies.SymbolVocabulary(LETTERS),) * 2
    predictor = predict.Predictor(MODELS[name], drawn(MODELS[name]), pair)
    return interactive.Session(predictor, config.Decode(max_new_tokens=11))


def in_eight_bits(x: np.ndarray, axis: int) -> np.ndarray:
    """x as integers of 8 bits times their scale along an axis, in float64."""
    scale = np.abs(x).max(axis, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.round(x / scale) * scale


def in_sixteen_bits(x: np.ndarray) -> np.ndarray:
    """Rows in 8 bits, and what that leaves in 254ths of a level, in float64."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    scale[scale == 0] = 1
    coarse = np.round(x / scale)
    return scale * (coarse + np.round(254 * (x / scale - coarse)) / 254)


@pytest.mark.parametrize("inward, outward", [((24,), (2, 8)), ((3, 8), (10,)), ((7,), (1,))])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_is_that_of_the_rounded_numbers(inward, outward, rows):
    draw = np.random.default_rng(3)
    matrix = draw.normal(size=(*inward, *outward)).astype(np.float32)
    x = draw.standard_t(3, size=(rows, 1, *inward)).astype(np.float32)
    x[0] *= 0 if rows == 5 else 1
    weight = quantization.quantize_channels(jnp.asarray(matrix), len(inward))
    placed = sharding.spec(" ".join(["batch length", *(["whole"] * len(outward))]))
    product = jax.jit(lambda x: quantization.quantized_matmul(x, weight, placed))
    size = int(np.prod(inward))
    wanted = in_sixteen_bits(x.reshape(rows, size).astype(np.float64)) @ in_eight_bits(
        matrix.reshape(size, -1).astype(np.float64), 0
    )
    got = np.array(product(jnp.asarray(x)))
    assert got.shape == (rows, 1, *outward)
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=2e-5, atol=2e-5)
    for row in range(rows):
        np.testing.assert_array_equal(product(jnp.asarray(x[row : row + 1]))[0], got[row])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_what_a_cpu_computes_by_itself(name):
    predictor = session_of(name).predictor
    assert computation.dtype_of_computation(predictor.cfg) == "float32"
    other = predictor.for_compute("float32")
    for mine, same in zip(
        jax.tree.leaves(predictor.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_array_equal(mine, same)
    scores = predictor.score(TEXTS, TEXTS), other.score(TEXTS, TEXTS)
    assert scores[0] == scores[1]


def test_every_matrix_is_in_eight_bits_and_the_embedding_stays():
    cfg = MODELS["tied"]
    params = decoding.prepare_params(cfg, drawn(cfg))
    few = computation.params_for_compute(cfg, params, "int8")
    kinds = [
        leaf.kind for leaf in quantization.weight_leaves(few) if quantization.is_quantized(leaf)
    ]
    matrices = 2 * 6 + 4  # attention and Mlp of both stacks, and cross-attention
    assert len(kinds) == matrices + 1 and all(kind.activations == 16 for kind in kinds)
    assert few["embedding"] is not few["head"] and few["embedding"].dtype == jnp.float32
    assert few["head"].values.shape == (cfg.vocab, 16)
    assert params.keys() == few.keys() - {"head"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_int8_by_channels_is_int8_of_stacked_layers_to_the_last_bit(name):
    cfg, params = MODELS[name], drawn(MODELS[name])
    prepared = computation.params_for_compute(cfg, decoding.prepare_params(cfg, params), "int8")
    stacked = computation.params_for_compute(cfg, placed(cfg, params), "int8")
    inputs = [[5, 6, 7, 8, 1]] * 2
    targets = [[9, 10, 11], [4, 1]]
    mine = decoding.score(cfg, prepared, inputs, targets)
    theirs = decoding.score(cfg, model.unstack(stacked), inputs, targets)
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    exact = decoding.score(cfg, decoding.prepare_params(cfg, params), inputs, targets)
    off = np.abs(mine.log_probability - exact.log_probability)
    assert 0 < off.max() < 0.15 * np.abs(exact.log_probability).max()


def placed(cfg: config.Model, params: dict) -> dict:
    """Params placed on the mesh as a checkpoint's are.

    Args:
      cfg: the model.
      params: arrays of the host.
    """
    return weights.place_arrays(model.shapes(cfg), params, "drawn")


DRAWN = {"temperature": 1.0, "seed": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    mark_exhaustive(
        [(name, options) for name in ("t5", "decoder") for options in ({}, DRAWN)],
        kept=[("t5", DRAWN), ("decoder", {})],
    ),
)
def test_a_text_in_int8_is_the_same_alone_in_company_and_drafted(name, options):
    session = session_of(name)
    together = session.generate(TEXTS, compute="int8", **options)
    if not options:
        assert [session.generate(text, compute="int8") for text in TEXTS] == together
    for drafter in ("lookup", "recycling"):
        drafted = {"drafter": drafter, "draft_length": 4}
        assert session.generate(TEXTS, compute="int8", **drafted, **options) == together
    assert "".join(session.stream(TEXTS[0], compute="int8", **options)) == together[0]


def test_each_way_to_compute_has_its_weights_once_and_a_tally_for_all():
    session = session_of("t5")
    predictor = session.predictor
    few = predictor.for_compute("int8")
    assert few is predictor.for_compute("int8") and few.for_compute("auto") is predictor
    assert few.tally is predictor.tally and few.for_compute("bfloat16").cfg == predictor.cfg
    wide = dataclasses.replace(session.decode, compute="bfloat16")
    scores = interactive.Session(predictor, wide).score(TEXTS, TEXTS)
    exact = session.score(TEXTS, TEXTS)
    assert scores != exact
    np.testing.assert_allclose(scores, exact, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_stay_in_float32_over_a_base_in_int8(dora):
    cfg, inputs, targets = MODELS["t5"], [[5, 6, 7, 8, 1]] * 2, [[9, 10, 11], [4, 1]]
    params = decoding.prepare_params(cfg, drawn(cfg))
    plain = decoding.score(
        cfg, computation.params_for_compute(cfg, params, "int8"), inputs, targets
    )
    layer = params["decoder"]["layers"][0]
    draw = np.random.default_rng(1)

    def scores(b):
        kept = quantization.dequantize(quantization.quantize_channels(layer["mlp"]["down"], 1))
        magnitude = jnp.sqrt(jnp.sum(jnp.square(kept), axis=0)) if dora else None
        a = jnp.asarray(draw.normal(size=(layer["mlp"]["down"].shape[0], 2)), jnp.float32)
        adapted = adapters.AdaptedWeight(layer["mlp"]["down"], a, b, magnitude, None, 1.0, 0.0)
        changed = layer | {"mlp": layer["mlp"] | {"down": adapted}}
        decoder = params["decoder"] | {"layers": (changed,)}
        few = computation.params_for_compute(cfg, params | {"decoder": decoder}, "int8")
        return decoding.score(cfg, few, inputs, targets).log_probability

    unchanged = scores(jnp.zeros((2, 16)))
    np.testing.assert_allclose(unchanged, plain.log_probability, rtol=1e-5 if dora else 0)
    assert np.abs(scores(jnp.ones((2, 16))) - unchanged).min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(["tied", "decoder"], kept=["tied"]))
def test_a_mesh_of_eight_computes_the_same_texts(name):
    alone = session_of(name).generate(TEXTS, compute="int8")
    sharding.use_mesh(config.Mesh(2, 2, 2), jax.devices())
    assert session_of(name).generate(TEXTS, compute="int8") == alone
