# SPDX-License-Identifier: Apache-2.0
"""Laws of inspection: maps are the model's attention, states are the model's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.decoding import generation
from t5x_lite.kernels import dense_mask, dispatch
from t5x_lite.kernels.api import AttentionSource, DenseMask, Mask, RelativePositionBias
from t5x_lite.model.inspection import InspectionInputs

KINDS = {
    "t5": toy_model("encoder_decoder"),
    "umt5": toy_model("encoder_decoder", **FAMILIES["umt5"]),
    "t5gemma": toy_model("encoder_decoder", **FAMILIES["t5gemma"]),
    "t5gemma2": toy_model("encoder_decoder", **FAMILIES["t5gemma2"]),
    "gpt2": toy_model("decoder_only", **FAMILIES["gpt2"]),
    "mistral": toy_model("decoder_only", prefix_lm=True, **FAMILIES["mistral"]),
}


def weights_of(cfg):
    draw = np.random.default_rng(1)

    def make(shape):
        return jnp.asarray(0.5 * draw.normal(size=shape.shape), jnp.float32)

    return jax.tree.map(make, model.shapes(cfg))


def given_for(cfg, rows=8, t=10, s=7):
    draw = np.random.default_rng(2)

    def ids(length):
        return draw.integers(2, 64, (rows, length)).astype(np.int32)

    def most(low, high):
        return draw.integers(low, high + 1, rows).astype(np.int32)

    inspected = InspectionInputs(ids(t), most(5, t), most(1, 4))
    if cfg.encoder is None:
        return inspected
    return inspected._replace(inputs=ids(s), inputs_length=most(2, s))


def inside_of(cfg, inspected, method=model.Inspected.inside):
    params = weights_of(cfg)
    transformer = model.Inspected(cfg, scan=False)
    apply = jax.jit(lambda p, inspected: transformer.apply({"params": p}, inspected, method=method))
    return jax.device_get(apply(model.unstack(params), generation.shard_rows(inspected))), params


@pytest.fixture
def tensor_parallel():
    sharding.use_mesh(config.Mesh(data=4, tensor=2))


@pytest.fixture
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_map_sum_to_one_over_what_may_be_seen(tensor_parallel, name):
    cfg = KINDS[name]
    inspected = given_for(cfg)
    inside, _ = inside_of(cfg, inspected)
    merged = cfg.decoder.merged
    total = inside.decoder.sum(-1) + (inside.cross.sum(-1) if merged else 0)
    exists = np.arange(10) < inspected.length[:, None]
    np.testing.assert_allclose(np.moveaxis(total, 2, -1)[:, exists], 1, atol=1e-5)
    prompt = inspected.prompt[:, None, None] if cfg.prefix_lm else np.zeros((8, 1, 1), int)
    query, key = np.arange(10)[:, None], np.arange(10)[None]
    hidden = (key > query) & ~((key < prompt) & (query < prompt))
    assert np.all(np.moveaxis(inside.decoder, 2, -1)[:, hidden] == 0)
    if cfg.encoder is None:
        assert inside.cross is inside.encoder is None
        return
    read = np.arange(7) < inspected.inputs_length[:, None]
    assert np.all(np.moveaxis(inside.cross, -1, 2)[:, ~read] == 0)
    np.testing.assert_allclose(np.moveaxis(inside.encoder.sum(-1), 2, -1)[:, read], 1, atol=1e-5)
    if not merged:
        np.testing.assert_allclose(
            np.moveaxis(inside.cross.sum(-1), 2, -1)[:, exists], 1, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2", "gpt2", "mistral"])
def test_the_last_state_is_what_the_logits_are_read_from(one_device, name):
    cfg = KINDS[name]
    inspected = given_for(cfg)
    inside, params = inside_of(cfg, inspected)
    assert len(inside.states) == cfg.decoder.layers + 1
    written, _ = inside_of(cfg, inspected, model.Inspected.next_token_logits)
    read = jax.jit(
        lambda p, x: model.Transformer(cfg).apply(
            {"params": p}, x, method=model.Transformer.logits
        ),
    )
    last = np.asarray(read(params, sharding.place(inside.states[-1], "batch length width")))
    np.testing.assert_allclose(last, written, atol=1e-4)
    tokens, whole = np.asarray(inspected.tokens), cached(cfg, params, inspected)
    exists = np.arange(tokens.shape[1]) < inspected.length[:, None]
    np.testing.assert_allclose(written[exists], whole[exists], atol=1e-4)


def cached(cfg, params, inspected):
    """The logits of decoding's own path: inputs read once, tokens as a prompt over a cache.

    Args:
      cfg: the model.
      params: its weights.
      inspected: InspectionInputs of eight rows.
    """
    from t5x_lite.decoding import target

    def logits(params, inspected):
        read = model.EncoderMemory()
        if cfg.encoder:
            read = target.encode_inputs(cfg, params, inspected.inputs, inspected.inputs_length)
        cache = model.empty_cache(cfg, 8, inspected.tokens.shape[1], scan=False)
        transformer = model.Transformer(cfg, scan=False)
        block = model.TokenBlock(
            inspected.tokens, jnp.zeros_like(inspected.length), prefix=inspected.prompt
        )
        x, _ = transformer.apply(
            {"params": params}, block, cache, read, method=model.Transformer.decode
        )
        return transformer.apply({"params": params}, x, method=model.Transformer.logits)

    return np.asarray(jax.jit(logits)(model.unstack(params), generation.shard_rows(inspected)))


@pytest.mark.parametrize("name", ["t5", "t5gemma"])
def test_an_encoder_cut_after_a_layer_gives_that_layer_s_state(one_device, name):
    cfg = KINDS[name]
    inspected = given_for(cfg)
    states, params = inside_of(cfg, inspected, model.Inspected.encoded_by_layer)
    stack = dataclasses.replace(cfg.encoder, layers=1)
    short = dataclasses.replace(cfg, encoder=stack)
    cut = dict(params, encoder=dict(params["encoder"]))
    cut["encoder"]["layers"] = jax.tree.map(lambda x: x[:1], params["encoder"]["layers"])
    placed = generation.shard_rows(inspected)
    segments = (np.arange(7) < inspected.inputs_length[:, None]).astype(np.int32)
    where = sharding.place(np.where(segments, np.arange(7), 0).astype(np.int32), "batch length")
    segments = sharding.place(segments, "batch length")
    encode = jax.jit(
        lambda p, *rows: model.Transformer(short).apply(
            {"params": p}, *rows, method=model.Transformer.encode
        )
    )
    expected = np.asarray(encode(cut, placed.inputs, segments, where))
    read = np.arange(7) < inspected.inputs_length[:, None]
    np.testing.assert_allclose(states[1][read], expected[read], atol=1e-5)


@pytest.mark.parametrize("softcap, merged", [(None, False), (2.0, False), (2.0, True)])
def test_values_in_these_shares_are_what_attention_gives(one_device, softcap, merged):
    draw = np.random.default_rng(3)

    def make(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    q, k, v = make(2, 6, 2, 3, 8), make(2, 2, 6, 8), make(2, 2, 6, 8)
    segments = jnp.array([[1, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 1]])
    mask = dense_mask.materialize_mask(Mask(segments, segments, causal=True))
    bias = (
        None
        if merged
        else dense_mask.materialize_bias(RelativePositionBias(make(8, 6), 16, False), mask)
    )
    sources = (AttentionSource(k, v, mask, bias),)
    if merged:
        visible = DenseMask(
            jnp.array([[[True, False, True]], [[True] * 3]]), jnp.zeros((1, 3), int)
        )
        sources += (AttentionSource(make(2, 2, 3, 8), make(2, 2, 3, 8), visible),)
    shares = dispatch.attention_probs(q, sources, softcap)
    values = jnp.concatenate([source.values for source in sources], axis=2)
    shares = shares.reshape(2, 2, 3, 6, -1)
    context = np.einsum("bkgts,bksh->btkgh", shares, values)
    np.testing.assert_allclose(
        context, dispatch.dot_product_attention(q, sources, softcap), atol=1e-5
    )
    assert np.all(np.asarray(shares)[0, ..., 5, :6] == 0)
