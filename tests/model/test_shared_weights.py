# SPDX-License-Identifier: Apache-2.0
"""Laws of weights that both towers share: one array, read by both, stored once."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import toy_batch, toy_model
from conversion_toys import Drawn, write_ours

from t5x_lite import config, convert, decoding, model, sharding
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.model import adapters
from t5x_lite.tokenizers import vocabularies

PATTERNS = {
    "mlp": ("decoder.layers.mlp.*",),
    "attention": ("decoder.layers.attention.*", "decoder.norm"),
    "tower": ("decoder.*",),
}
BATCH = toy_batch("encoder_decoder", rows=2)


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def toys(name: str) -> tuple[config.Model, config.Model]:
    """A model that shares, and the same one with towers of their own."""
    apart = toy_model("encoder_decoder", layers=2)
    return dataclasses.replace(apart, shared_weights=PATTERNS[name]), apart


def lively(cfg: config.Model) -> dict:
    draw = np.random.default_rng(0)

    def make(shape):
        value = (0.3 * draw.normal(size=shape.shape)).astype(np.float32)
        return jax.device_put(value, shape.sharding)

    return jax.tree.map(make, model.shapes(cfg))


def copied(cfg: config.Model, params: dict) -> dict:
    """Weights of towers of their own, in which the decoder has copies of what it shared."""
    flat = flatten_tree(params)
    leaves = flatten_tree(model.shapes(dataclasses.replace(cfg, shared_weights=())))
    values = {path: flat.get(path, flat.get(path.replace("decoder", "encoder"))) for path in leaves}
    return jax.tree.unflatten(
        jax.tree.structure(model.shapes(dataclasses.replace(cfg, shared_weights=()))),
        [values[path] for path in leaves],
    )


def loss(cfg: config.Model):
    rows = sharding.place_batch(BATCH)

    def total(params):
        logits = model.Transformer(cfg).apply({"params": params}, rows)
        return jax.numpy.sum(jax.numpy.sin(logits))

    return jax.jit(jax.value_and_grad(total))


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_outputs_are_those_of_copies_and_gradients_add_up(name):
    shared, apart = toys(name)
    params = lively(shared)
    both = copied(shared, params)
    assert sum(model.count(shared).values()) < sum(model.count(apart).values())
    value, gradient = loss(shared)(params)
    expected, separate = loss(apart)(both)
    np.testing.assert_array_equal(value, expected)
    separate, gradient = flatten_tree(separate), flatten_tree(gradient)
    for path, actual in gradient.items():
        twin = path.replace("encoder.", "decoder.", 1)
        added = separate[path]
        if path.startswith("encoder.") and twin in separate and twin not in gradient:
            assert np.any(separate[twin])
            added = added + separate[twin]
        np.testing.assert_allclose(actual, added, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_of_a_shared_matrix_is_read_by_both_towers():
    shared, apart = toys("mlp")
    params, lora = lively(shared), config.Lora(rank=2, alpha=4.0, weights=("*.mlp.*",))
    axes = flatten_tree(model.axes(shared))
    described = adapters.adapter_shapes(lora, axes, flatten_tree(model.shapes(shared)))
    assert described and all(name.startswith("encoder.") for name in described)
    draw = np.random.default_rng(1)
    values = {
        name: jax.device_put(0.3 * draw.normal(size=leaf.shape).astype(np.float32), leaf.sharding)
        for name, leaf in described.items()
    }
    twins = {name.replace("encoder", "decoder"): value for name, value in values.items()}

    rows = sharding.place_batch(BATCH)

    def differentiate(cfg, base, low_rank):
        def total(low_rank):
            attached = adapters.attach_adapters(base, nest_tree(low_rank), lora)
            logits = model.Transformer(cfg).apply({"params": attached}, rows)
            return jax.numpy.sum(jax.numpy.sin(logits))

        return jax.jit(jax.value_and_grad(total))(low_rank)

    value, gradient = differentiate(shared, params, values)
    expected, separate = differentiate(apart, copied(shared, params), values | twins)
    np.testing.assert_array_equal(value, expected)
    for name, actual in gradient.items():
        twin = separate[name.replace("encoder", "decoder")]
        assert np.any(twin)
        np.testing.assert_allclose(actual, separate[name] + twin, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_decoding_reads_what_is_shared():
    shared, _ = toys("tower")
    params = lively(shared)
    inputs, targets = [[5, 9, 33], [7, 8]], [[4, 1], [8, 9, 1]]
    actual, expected = (
        decoding.score(cfg, decoding.prepare_params(cfg, weights), inputs, targets)
        for cfg, weights in (
            (shared, params),
            (dataclasses.replace(shared, shared_weights=()), copied(shared, params)),
        )
    )
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_a_new_model_has_each_weight_once():
    shared, apart = toys("tower")
    left = set(flatten_tree(model.shapes(apart))) - set(flatten_tree(model.shapes(shared)))
    assert {path for path in left if not path.startswith("decoder.")} == set()
    kept = {path for path in flatten_tree(model.shapes(shared)) if path.startswith("decoder.")}
    assert kept and all("cross_attention" in path for path in kept)


@pytest.mark.parametrize(
    "patterns, changes, message",
    [
        (("decoder.layers.mpl.*",), {}, "'decoder.layers.mpl.*' names no weight of the decoder"),
        (("encoder.*",), {}, "'encoder.*' names no weight of the decoder"),
        (("decoder.layers.mlp.*",), {"mlp": 8}, "give both Stacks the same sizes"),
    ],
)
def test_what_cannot_be_shared_is_named(patterns, changes, message):
    shared, _ = toys("mlp")
    decoder = dataclasses.replace(shared.decoder, **changes)
    cfg = dataclasses.replace(shared, decoder=decoder, shared_weights=patterns)
    with pytest.raises(ValueError, match=message):
        model.shapes(cfg)
    with pytest.raises(ValueError, match="Model.shared_weights are those of an encoder and a"):
        dataclasses.replace(shared, encoder=None)


@pytest.mark.slow
def test_checkpoints_have_it_once_and_other_formats_twice(tmp_path):
    shared, _ = toys("mlp")
    drawn = Drawn(shared)
    folder = write_ours(tmp_path / "ours", shared, drawn)
    letters = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(folder / "vocabulary", letters, letters)
    loaded = open_checkpoint(folder).load()
    assert {path.replace("/", ".") for path in drawn.arrays} == set(flatten_tree(loaded.params))
    convert.main([f"--from={folder}", "--format=huggingface", f"--to={tmp_path / 'hf'}"])
    exported = open_checkpoint(tmp_path / "hf")
    weights = exported.weights()
    for path, leaf in weights.leaves.items():
        source = path if path in drawn.arrays else path.replace("decoder/", "encoder/", 1)
        for layer in range(leaf.shape[0]) if "layers" in path else [None]:
            np.testing.assert_array_equal(weights.read(path, layer), drawn.read(source, layer))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_layers"] == 2
    # A run that shares begins with weights of towers of their own: the encoder's stay.
    params = exported.params_for(shared, model.shapes(shared))
    for path, array in flatten_tree(params, "/").items():
        np.testing.assert_array_equal(array, drawn.arrays[path])
