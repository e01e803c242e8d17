# SPDX-License-Identifier: Apache-2.0
"""An adapted model is its checkpoint where it should be: hidden states, logits, and back again."""

import dataclasses

import adaptation_toys as toys
import conversion_toys
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, model
from t5x_lite.checkpoints.formats.huggingface import llama

IDS = np.random.default_rng(1).integers(2, 64, (8, 11)).astype(np.int32)


@pytest.fixture(autouse=True)
def mesh():
    toys.one_device()


@pytest.fixture(params=list(toys.LONE))
def lone(request, tmp_path):
    """A decoder of every family, its folder and its weights."""
    cfg = toy_model("decoder_only", **toys.LONE[request.param])
    drawn = toys.written(tmp_path / "lone", cfg)
    return cfg, tmp_path / "lone", drawn


def silenced(params: dict) -> dict:
    """params whose cross-attention says nothing."""
    arrays = toys.flat(params)
    for name, array in arrays.items():
        if "cross_attention/out" in name:
            arrays[name] = np.zeros_like(array)
    return arrays


@pytest.mark.slow
def test_an_encoder_that_sees_the_past_alone_has_the_decoders_hidden_states(lone):
    cfg, folder, drawn = lone
    pair = toys.pair_of(cfg)
    params, _ = toys.adapted(pair, source=folder)
    expected = toys.hidden(cfg, toys.nested(drawn.arrays, cfg), "decoder", IDS)
    if cfg.decoder.positions == "relative":
        # Half of the buckets look back: they are as fine as the decoder's up to distance 7.
        ids = IDS[:, :8]
        expected = toys.hidden(cfg, toys.nested(drawn.arrays, cfg), "decoder", ids)
        result = toys.hidden(pair, params, "encoder", ids)
    else:
        result = toys.hidden(pair, params, "encoder", IDS)
    np.testing.assert_allclose(result, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_decoder_whose_cross_attention_is_silent_has_the_logits_of_the_source(lone):
    cfg, folder, drawn = lone
    pair = toys.pair_of(cfg)
    params, _ = toys.adapted(pair, source=folder)
    batch = toys.batch_for("encoder_decoder")
    result = toys.logits(pair, toys.nested(silenced(params), pair), batch)
    alone = batch._replace(inputs=None, input_segments=None, input_positions=None)
    expected = toys.logits(cfg, toys.nested(drawn.arrays, cfg), alone)
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_a_pair_of_a_decoder_gives_the_decoder_back_bit_by_bit(lone, merged, tmp_path):
    cfg, folder, drawn = lone
    if merged and cfg.decoder.positions == "relative":
        pytest.skip("merged attention has no relative positions")
    decoder = dataclasses.replace(cfg.decoder, merged=merged)
    pair = toys.pair_of(cfg, decoder=decoder)
    params, _ = toys.adapted(pair, source=folder)
    arrays = toys.flat(params)
    source = conversion_toys.Drawn(pair)
    source.arrays = arrays
    conversion_toys.write_ours(tmp_path / "encoder_decoder", pair, source)
    back, _ = toys.adapted(cfg, source=tmp_path / "encoder_decoder")
    for path, array in toys.flat(back).items():
        np.testing.assert_array_equal(array, drawn.arrays[path], err_msg=path)


def test_cross_attention_is_the_self_attention_of_its_layer(lone):
    cfg, folder, drawn = lone
    params = toys.flat(toys.adapted(toys.pair_of(cfg), source=folder)[0])
    crossed = [path for path in params if "cross_attention" in path]
    assert crossed
    for path in crossed:
        self_path = path.replace("cross_attention", "attention")
        np.testing.assert_array_equal(params[path], drawn.arrays[self_path], err_msg=path)


@pytest.mark.slow
def test_an_encoder_alone_reads_as_the_pairs_encoder_does(lone):
    cfg, folder, _ = lone
    pair = toys.pair_of(cfg)
    alone = dataclasses.replace(cfg, decoder=None, encoder=cfg.decoder)
    first, _ = toys.adapted(pair, source=folder)
    second, _ = toys.adapted(alone, source=folder)
    result = toys.hidden(alone, second, "encoder", IDS)
    np.testing.assert_array_equal(result, toys.hidden(pair, first, "encoder", IDS))


@pytest.mark.slow
def test_two_checkpoints_of_unequal_widths_keep_each_its_weights(tmp_path):
    large = toy_model("decoder_only", **toys.GEMMA2 | dict(embed=24, heads=6, layers=4))
    small = toy_model("decoder_only", **toys.GEMMA2)
    weights = toys.written(tmp_path / "large", large, 1), toys.written(tmp_path / "small", small, 2)
    pair = toys.pair_of(small, encoder=large.decoder, separate_embeddings=True)
    options = dict(source=tmp_path / "small", encoder_source=tmp_path / "large", cross="random")
    params, report = toys.adapted(pair, **options)
    expected = toys.hidden(large, toys.nested(weights[0].arrays, large), "decoder", IDS)
    np.testing.assert_allclose(toys.hidden(pair, params, "encoder", IDS), expected, atol=1e-6)
    batch = toys.batch_for("encoder_decoder")
    result = toys.logits(pair, toys.nested(silenced(params), pair), batch)
    alone = batch._replace(inputs=None, input_segments=None, input_positions=None)
    expected = toys.logits(small, toys.nested(weights[1].arrays, small), alone)
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=0)
    crossed = [array for path, array in toys.flat(params).items() if "cross_attention" in path]
    assert report.new == sum(array.size for array in crossed)


def test_a_hugging_face_folder_in_bfloat16_is_adapted_bit_by_bit(tmp_path):
    cfg = dataclasses.replace(conversion_toys.LLAMA, dtype="float32")
    drawn = conversion_toys.Drawn(cfg, ml_dtypes.bfloat16)
    conversion_toys.write_hugging_face(tmp_path / "hf", llama, cfg, drawn)
    params = toys.flat(toys.adapted(toys.pair_of(cfg), source=tmp_path / "hf")[0])
    for path, array in params.items():
        source = path.replace("encoder", "decoder").replace("cross_attention", "attention")
        np.testing.assert_array_equal(array, drawn.arrays[source].astype(np.float32), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [config.Mesh(2, 2, 2), config.Mesh(1, 8, 1)])
def test_the_mesh_changes_no_bit(tmp_path, mesh):
    from t5x_lite import sharding

    sizes = dict(embed=16, heads=4, kv_heads=2)
    cfg = toy_model("decoder_only", **toys.GEMMA2 | sizes)
    toys.written(tmp_path / "lone", cfg)
    pair = toys.pair_of(cfg, vocab=80)
    options = dict(source=tmp_path / "lone", cross="random", rows="random", seed=3)
    alone = toys.flat(toys.adapted(pair, **options)[0])
    sharding.use_mesh(mesh)
    split = toys.flat(toys.adapted(pair, **options)[0])
    for path, array in alone.items():
        np.testing.assert_array_equal(split[path], array, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("cross", ["copy", "random"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_the_scale_multiplies_what_cross_attention_says(name, cross, tmp_path):
    cfg = toy_model("decoder_only", **toys.LONE[name])
    drawn = toys.written(tmp_path / "lone", cfg)
    pair, batch = toys.pair_of(cfg), toys.batch_for("encoder_decoder")

    def added(scale):
        options = dict(source=tmp_path / "lone", cross=cross, cross_scale=scale)
        params, _ = toys.adapted(pair, **options)
        return toys.crossed_by(pair, params, batch)

    whole = added(1.0)
    np.testing.assert_allclose(added(0.25), 0.25 * whole, atol=1e-6 * np.abs(whole).max())
    silent, _ = toys.adapted(pair, source=tmp_path / "lone", cross=cross, cross_scale=0.0)
    alone = batch._replace(inputs=None, input_segments=None, input_positions=None)
    expected = toys.logits(cfg, toys.nested(drawn.arrays, cfg), alone)
    np.testing.assert_allclose(toys.logits(pair, silent, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["encoder_decoder", "encoder_only"])
@pytest.mark.parametrize("separate", [False, True])
def test_a_new_decoder_stands_beside_a_pretrained_encoder(source, separate, tmp_path):
    there = toy_model(source, positions="relative", layers=3)
    drawn = toys.written(tmp_path / "there", there)
    width = 24 if separate else there.encoder.embed
    decoder = dataclasses.replace(there.encoder, layers=1, embed=width)
    pair = dataclasses.replace(there, decoder=decoder, tied=False, separate_embeddings=separate)
    params, report = toys.adapted(pair, source=tmp_path / "there", decoder_from=None)
    expected = toys.hidden(there, toys.nested(drawn.arrays, there), "encoder", IDS)
    np.testing.assert_array_equal(toys.hidden(pair, params, "encoder", IDS), expected)
    flat = toys.flat(params)
    new = [path for path in flat if path.startswith(("decoder/", "head"))]
    new += ["embedding"] if separate else []
    assert report.new == sum(flat[path].size for path in new)
    fresh = toys.flat(model.initialize(pair, jax.random.key(0)))
    for path in new:
        np.testing.assert_array_equal(flat[path], fresh[path], err_msg=path)
