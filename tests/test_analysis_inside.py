# SPDX-License-Identifier: Apache-2.0
"""Laws of looking inside: maps are the attention paid, states are the model's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.decoding import generation
from t5x_lite.kernels import Pairs, Relative, Sight, Source, dispatch, pairs
from t5x_lite.model.inspection import Given

KINDS = {
    "t5": toy_model("pair"),
    "umt5": toy_model("pair", **FAMILIES["umt5"]),
    "t5gemma": toy_model("pair", **FAMILIES["t5gemma"]),
    "t5gemma2": toy_model("pair", **FAMILIES["t5gemma2"]),
    "gpt2": toy_model("joined", **FAMILIES["gpt2"]),
    "mistral": toy_model("joined", prefix_lm=True, **FAMILIES["mistral"]),
}


def weights_of(cfg):
    draw = np.random.default_rng(1)
    make = lambda shape: jnp.asarray(0.5 * draw.normal(size=shape.shape), jnp.float32)
    return jax.tree.map(make, model.shapes(cfg))


def given_for(cfg, rows=8, t=10, s=7):
    draw = np.random.default_rng(2)
    ids = lambda length: draw.integers(2, 64, (rows, length)).astype(np.int32)
    most = lambda low, high: draw.integers(low, high + 1, rows).astype(np.int32)
    given = Given(ids(t), most(5, t), most(1, 4))
    if cfg.encoder is None:
        return given
    return given._replace(inputs=ids(s), inputs_length=most(2, s))


def inside_of(cfg, given, method="inside"):
    params = weights_of(cfg)
    transformer = model.Inspected(cfg, scan=False)
    apply = jax.jit(lambda p, given: transformer.apply({"params": p}, given, method=method))
    return jax.device_get(apply(model.unstack(params), generation.place(given))), params


@pytest.fixture
def tensor_parallel():
    sharding.use_mesh(config.Mesh(data=4, tensor=2))


@pytest.fixture
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_map_sum_to_one_over_what_may_be_seen(tensor_parallel, name):
    cfg = KINDS[name]
    given = given_for(cfg)
    inside, _ = inside_of(cfg, given)
    merged = cfg.decoder.merged
    total = inside.decoder.sum(-1) + (inside.cross.sum(-1) if merged else 0)
    exists = np.arange(10) < given.length[:, None]
    np.testing.assert_allclose(np.moveaxis(total, 2, -1)[:, exists], 1, atol=1e-5)
    prompt = given.prompt[:, None, None] if cfg.prefix_lm else np.zeros((8, 1, 1), int)
    query, key = np.arange(10)[:, None], np.arange(10)[None]
    hidden = (key > query) & ~((key < prompt) & (query < prompt))
    assert np.all(np.moveaxis(inside.decoder, 2, -1)[:, hidden] == 0)
    if cfg.encoder is None:
        assert inside.cross is inside.encoder is None
        return
    read = np.arange(7) < given.inputs_length[:, None]
    assert np.all(np.moveaxis(inside.cross, -1, 2)[:, ~read] == 0)
    np.testing.assert_allclose(np.moveaxis(inside.encoder.sum(-1), 2, -1)[:, read], 1, atol=1e-5)
    if not merged:
        np.testing.assert_allclose(
            np.moveaxis(inside.cross.sum(-1), 2, -1)[:, exists], 1, atol=1e-5
        )


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2", "gpt2", "mistral"])
def test_the_last_state_is_what_the_logits_are_read_from(one_device, name):
    cfg = KINDS[name]
    given = given_for(cfg)
    inside, params = inside_of(cfg, given)
    assert len(inside.states) == cfg.decoder.layers + 1
    written, _ = inside_of(cfg, given, "written")
    read = jax.jit(
        lambda p, x: model.Transformer(cfg).apply({"params": p}, x, method="logits"),
    )
    last = np.asarray(read(params, sharding.place(inside.states[-1], "batch length width")))
    np.testing.assert_allclose(last, written, atol=1e-4)
    tokens, whole = np.asarray(given.tokens), cached(cfg, params, given)
    exists = np.arange(tokens.shape[1]) < given.length[:, None]
    np.testing.assert_allclose(written[exists], whole[exists], atol=1e-4)


def cached(cfg, params, given):
    """The logits of decoding's own path: inputs read once, tokens as a prompt over a cache."""
    from t5x_lite.decoding import target

    def logits(params, given):
        read = model.Read()
        if cfg.encoder:
            read = target.read(cfg, params, given.inputs, given.inputs_length)
        cache = model.empty_cache(cfg, 8, given.tokens.shape[1], scan=False)
        transformer = model.Transformer(cfg, scan=False)
        block = model.Block(given.tokens, jnp.zeros_like(given.length), prefix=given.prompt)
        x, _ = transformer.apply({"params": params}, block, cache, read, method="decode")
        return transformer.apply({"params": params}, x, method="logits")

    return np.asarray(jax.jit(logits)(model.unstack(params), generation.place(given)))


@pytest.mark.parametrize("name", ["t5", "t5gemma"])
def test_an_encoder_cut_after_a_layer_gives_that_layer_s_state(one_device, name):
    cfg = KINDS[name]
    given = given_for(cfg)
    states, params = inside_of(cfg, given, "encoded_by_layer")
    stack = dataclasses.replace(cfg.encoder, layers=1)
    short = dataclasses.replace(cfg, encoder=stack)
    cut = dict(params, encoder=dict(params["encoder"]))
    cut["encoder"]["layers"] = jax.tree.map(lambda x: x[:1], params["encoder"]["layers"])
    placed = generation.place(given)
    segments = (np.arange(7) < given.inputs_length[:, None]).astype(np.int32)
    where = sharding.place(np.where(segments, np.arange(7), 0).astype(np.int32), "batch length")
    segments = sharding.place(segments, "batch length")
    encode = jax.jit(
        lambda p, *rows: model.Transformer(short).apply({"params": p}, *rows, method="encode")
    )
    expected = np.asarray(encode(cut, placed.inputs, segments, where))
    read = np.arange(7) < given.inputs_length[:, None]
    np.testing.assert_allclose(states[1][read], expected[read], atol=1e-5)


@pytest.mark.parametrize("softcap, merged", [(None, False), (2.0, False), (2.0, True)])
def test_values_in_these_shares_are_what_attention_gives(one_device, softcap, merged):
    draw = np.random.default_rng(3)
    make = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    q, k, v = make(2, 6, 2, 3, 8), make(2, 2, 6, 8), make(2, 2, 6, 8)
    segments = jnp.array([[1, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 1]])
    sight = pairs.pairs(Sight(segments, segments, causal=True))
    bias = None if merged else pairs.bias(Relative(make(8, 6), 16, False), sight)
    sources = (Source(k, v, sight, bias),)
    if merged:
        seen = Pairs(jnp.array([[[True, False, True]], [[True] * 3]]), jnp.zeros((1, 3), int))
        sources += (Source(make(2, 2, 3, 8), make(2, 2, 3, 8), seen),)
    shares = dispatch.probabilities(q, sources, softcap)
    values = jnp.concatenate([source.values for source in sources], axis=2)
    shares = shares.reshape(2, 2, 3, 6, -1)
    context = np.einsum("bkgts,bksh->btkgh", shares, values)
    np.testing.assert_allclose(context, dispatch.attend(q, sources, softcap), atol=1e-5)
    assert np.all(np.asarray(shares)[0, ..., 5, :6] == 0)
