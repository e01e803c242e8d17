# SPDX-License-Identifier: Apache-2.0
"""Laws of Stack.chunk: an encoder that reads its inputs in chunks, at linear cost."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import toy_batch, toy_model, toy_stack

from t5x_lite import config, model, sharding
from t5x_lite.kernels import api as kernels
from t5x_lite.kernels import local
from t5x_lite.training import flops

LENGTH = 24
# A bias of all layers and of each, rotations, windows, embeddings.
STACKS = {
    "relative": dict(positions="relative", buckets=8, max_distance=9),
    "per layer": dict(bias_per_layer=True, buckets=8, max_distance=9),
    "rotary": dict(positions="rotary", kv_heads=2, pattern=("full", "sliding"), window=2),
    "alibi": dict(positions="alibi", softcap=5.0),
    "learned": dict(positions="learned", max_length=24),
}


@pytest.fixture(autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def params_of(cfg: config.Model) -> dict:
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.4 * draw.normal(size=leaf.shape)).astype(np.float32), model.shapes(cfg)
    )


def encoder(cfg: config.Model, chunk: int | None):
    """A compiled encoder with the weights of a model."""
    cfg = dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, chunk=chunk))
    apply = functools.partial(model.Transformer(cfg).apply, method=model.Transformer.encode)
    return jax.jit(functools.partial(apply, {"params": params_of(cfg)}))


def place(*rows):
    return [sharding.place(np.asarray(each, np.int32), "batch length") for each in rows]


@pytest.mark.parametrize("name", STACKS)
def test_a_chunk_is_read_as_a_text_of_its_own_packed_or_not(name):
    """Blocks begin in the middle of chunks, chunks end in the middle of texts."""
    cfg, chunk = toy_model("encoder_only", **STACKS[name]), 5
    batch = toy_batch("encoder_only", rows=2, length=LENGTH)
    inputs, segments, where = batch[4:7]
    states = np.asarray(encoder(cfg, chunk)(*place(inputs, segments, where)))
    begins = [(row, s, c) for row in range(2) for s in (1, 2) for c in range(0, LENGTH, chunk)]
    pieces = [
        inputs[row][(segments[row] == s) & (where[row] >= c) & (where[row] < c + chunk)]
        for row, s, c in begins
    ]
    alone = np.stack([np.pad(piece, (0, chunk - len(piece))) for piece in pieces])
    exists = np.arange(chunk) < np.array([len(piece) for piece in pieces])[:, None]
    places = np.arange(chunk) * exists
    expected = np.asarray(encoder(cfg, None)(*place(alone, exists, places)))
    for (row, s, c), one, count in zip(begins, expected, exists.sum(axis=1), strict=True):
        here = (segments[row] == s) & (where[row] >= c) & (where[row] < c + chunk)
        np.testing.assert_allclose(states[row][here], one[:count], atol=2e-5)


def test_a_chunk_that_holds_the_whole_row_changes_no_bit():
    cfg = toy_model("encoder_only", layers=1)
    batch = toy_batch("encoder_only", rows=2, length=LENGTH)
    rows = place(*batch[4:7])
    whole = np.asarray(encoder(cfg, None)(*rows))
    for chunk in (LENGTH, LENGTH + 1):
        np.testing.assert_array_equal(encoder(cfg, chunk)(*rows), whole)
    assert np.abs(np.asarray(encoder(cfg, 3)(*rows)) - whole)[:, :3].max() > 1e-3


def test_operations_grow_with_the_length_not_with_its_square():
    cfg, counts = toy_model("encoder_only", layers=1, heads=8), {}
    for chunk in (8, None):
        for length in (128, 256):
            batch = toy_batch("encoder_only", rows=1, length=length)
            program = encoder(cfg, chunk).lower(*place(*batch[4:7])).compile()
            counts[chunk, length] = program.cost_analysis()["flops"]
    assert counts[8, 256] < 2.1 * counts[8, 128] < 1.1 * counts[None, 128]
    assert counts[None, 256] > 2.5 * counts[None, 128]
    stack = toy_stack(chunk=8)
    planned = [flops.self_attention_and_mlp_flops(stack, length) for length in (128, 256)]
    assert planned[1] == 2 * planned[0]


def test_gradients_of_blocks_are_those_of_all_pairs(monkeypatch):
    cfg = toy_model("encoder_decoder", layers=1)
    cfg = dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, chunk=5))
    params = params_of(cfg)
    batch = sharding.place_batch(toy_batch("encoder_decoder", rows=2, length=LENGTH))

    def gradient():
        def loss(params):
            return (model.Transformer(cfg).apply({"params": params}, batch) ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    blocks = gradient()
    monkeypatch.setattr(local, "saves_work", lambda mask: False)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), blocks, gradient()
    )


def test_rows_are_whole_where_blocks_would_save_nothing():
    ones = np.ones((1, 12), np.int32)
    for span, kind in ((4, kernels.DenseMask), (3, local.LocalMask), (None, kernels.DenseMask)):
        mask = kernels.Mask(*place(ones, ones), span=span)
        assert type(kernels.prepare_mask(mask, None)) is kind


def test_a_decoder_has_no_chunks():
    with pytest.raises(ValueError, match="Stack.chunk is for an encoder"):
        toy_model("decoder_only", chunk=4)
