# SPDX-License-Identifier: Apache-2.0
"""Laws of Stack.causal: layers that attend to no later token beside layers that do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch, toy_model

from t5x_lite import config, decoding, model, sharding
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.data import layout as row_layout
from t5x_lite.kernels import api as kernels
from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.layer_config import layer_configs

MIXED = dict(
    layers=3,
    positions="rotary",
    pattern=("full", "sliding", "full"),
    window=3,
    causal=(True, False, False),
)
LENGTHS = (9, 5)


@pytest.fixture(autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def params_of(cfg):
    draw = np.random.default_rng(0)

    def make(shape):
        return (0.3 * draw.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map(make, model.shapes(cfg))


def two_rows(seed=0):
    """Two rows of ids of different lengths, with segments and positions."""
    ids = np.random.default_rng(seed).integers(2, 64, (len(LENGTHS), max(LENGTHS)))
    exists = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    segments = exists.astype(np.int32)
    return (ids * exists).astype(np.int32), segments, np.arange(max(LENGTHS)) * segments


def states_of(cfg, params, rows):
    """States of every token: of the encoder, or of the lone decoder that reads ids as they are.

    Args:
      cfg: architecture.
      params: weights.
      rows: ids, segments and positions.
    """

    def read(transformer, ids, segments, where):
        if cfg.encoder is not None:
            return transformer.encode(ids, segments, where)
        mask = transformer.mask(segments, segments, causal=cfg.causal_decoder)
        context = AttentionContext(where, mask, backend=transformer.backend)
        return transformer.decoder(transformer.embed(ids), context)

    rows = [jnp.asarray(each) for each in rows]
    return np.asarray(
        jax.jit(model.Transformer(cfg).apply, static_argnames="method")(
            {"params": params}, *rows, method=read
        )
    )


@pytest.mark.parametrize("form", ["below", "within", "halved"])
@pytest.mark.parametrize("causal", [None, (True,), (False,), (True, False, False)])
def test_each_layers_mask_is_the_dense_one(form, causal):
    fields = dict(MIXED, layers=4, causal=causal, window=4, window_form=form)
    for tower, both_sides in (("encoder_only", True), ("decoder_only", False)):
        cfg = toy_model(tower, **fields)
        stack = cfg.last_stack
        shared = both_sides or not cfg.causal_decoder
        segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
        mask = kernels.Mask(jnp.array(segments), jnp.array(segments), causal=not shared)
        windows = layer_configs(stack, shared).window_size
        distance = np.arange(11)[:, None] - np.arange(11)
        same = (segments[0][:, None] == segments[0]) & (segments[0] > 0)
        left, right = {"below": (3, 3), "within": (4, 4), "halved": (1, 2)}[form]
        cycle = (not both_sides,) if causal is None else causal
        for layer in range(4):
            alone = cycle[layer % len(cycle)]
            wanted = same & ((distance >= 0) | (not alone))
            if layer % 3 == 1:  # sliding: a causal layer sees distances 0 to 3
                wanted &= (distance <= (3 if alone else left)) & (distance >= -right)
            actual = mask.with_window(None if windows is None else windows[layer]).materialize()[0]
            np.testing.assert_array_equal(np.asarray(actual), wanted, err_msg=f"{tower} {layer}")


@pytest.mark.slow
def test_a_causal_encoder_is_a_decoder_and_a_decoder_that_looks_ahead_an_encoder():
    rows, states = two_rows(), {}
    for tower in ("encoder", "decoder"):
        for causal in ((True,), (False,), (True, False, False)):
            cfg = toy_model(f"{tower}_only", **dict(MIXED, causal=causal))
            params = params_of(toy_model("encoder_only", **MIXED))
            params[tower] = params.pop("encoder")
            states[tower, causal] = states_of(cfg, params, rows)
    exists = rows[1] > 0
    for causal in ((True,), (False,), (True, False, False)):
        one, other = states["encoder", causal], states["decoder", causal]
        np.testing.assert_allclose(one[exists], other[exists], atol=1e-5)
    assert np.abs(states["encoder", (True,)] - states["encoder", (False,)])[exists].max() > 1e-2


def test_a_layer_that_looks_ahead_lets_later_tokens_in_and_a_causal_one_does_not():
    cfg = toy_model("encoder_only", **dict(MIXED, layers=1, causal=(True,)))
    params, (ids, segments, where) = params_of(cfg), two_rows()
    changed = ids.copy()
    changed[0, 5] = 1 + ids[0, 5] % 60
    for causal, first in ((True, 5), (False, 0)):
        stack = dataclasses.replace(cfg.last_stack, causal=(causal,))
        other = dataclasses.replace(cfg, encoder=stack)
        before = states_of(other, params, (ids, segments, where))
        after = states_of(other, params, (changed, segments, where))
        moved = np.flatnonzero(np.abs(before - after)[0].max(axis=-1) > 1e-6)
        assert moved[0] == first


@pytest.mark.slow
def test_kernels_give_what_plain_attention_gives_in_mixed_layers(monkeypatch):
    states = {}
    cfg = toy_model("encoder_only", **dict(MIXED, positions="relative"))
    for kind in ("reference", "pallas"):
        monkeypatch.setenv("T5X_LITE_ATTENTION", kind)
        states[kind] = states_of(cfg, params_of(cfg), two_rows())
    exists = two_rows()[1] > 0
    np.testing.assert_allclose(states["pallas"][exists], states["reference"][exists], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["encoder_only", "decoder_only"])
def test_packed_texts_get_the_states_they_get_alone(tower):
    cfg = toy_model(tower, **MIXED)
    params, batch = params_of(cfg), toy_batch("encoder_only")
    packed = states_of(cfg, params, batch[4:7])[3]
    for segment in (1, 2):
        here = batch.input_segments[3] == segment
        single = [rows[3][here][None] for rows in batch[4:7]]
        np.testing.assert_allclose(packed[here], states_of(cfg, params, single)[0], atol=2e-5)


def test_a_decoder_that_looks_ahead_writes_nothing():
    cfg = toy_model("decoder_only", **MIXED)
    with pytest.raises(ValueError, match=r"Stack.causal = \(True, False, False\) writes no text"):
        decoding.make_request(cfg, [[3, 4]], config.Decode(max_new_tokens=1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"causal": ()}, "Stack.causal is empty"),
        ({"prefix_lm": True}, "Model.prefix_lm is for a decoder whose layers are all causal"),
    ],
)
def test_what_contradicts_causality_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        toy_model("decoder_only", **dict(MIXED, **fields))


def test_a_hidden_token_of_a_decoder_is_predicted_from_the_state_before_it():
    """Masked next-token prediction: the mask stands one place after the state that predicts."""
    cfg = toy_model("decoder_only", **MIXED)
    batch = row_layout.empty_batch(1, config.windows.LengthLimits(0, 6, "encoder_only"))
    targets, masked = np.array([[10, 11, 12, 13, 14, 15]]), np.array([[10, 11, 63, 13, 14, 15]])
    ones, where = np.ones((1, 6), np.int32), np.arange(6)[None]
    batch = batch._replace(
        targets=targets,
        target_segments=ones,
        target_positions=where,
        inputs=masked,
        input_segments=ones,
        input_positions=where,
    )
    params = params_of(cfg)

    def hidden(batch):
        return model.Transformer(cfg).apply(
            {"params": params}, jax.tree.map(jnp.asarray, batch), method=model.Transformer.hidden
        )

    # The state at place i reads input i - 1 as a causal language model does: the start token and
    # all of the masked text but its last token.
    read = np.concatenate([[[cfg.decoder_start_token_id]], masked[:, :-1]], axis=1)
    np.testing.assert_allclose(
        hidden(batch), states_of(cfg, params, (read, ones, where)), atol=1e-6
    )
    other = batch._replace(targets=targets + 1)
    np.testing.assert_array_equal(hidden(batch), hidden(other))


@pytest.mark.parametrize("tower, causal", [("encoder", (True,)), ("decoder", (True, False))])
def test_no_other_library_gets_a_model_whose_layers_it_would_compute_otherwise(tower, causal):
    cfg = toy_model("encoder_decoder", causal=causal)
    usual = {"encoder": (False,), "decoder": (True,)}
    for name in usual.keys() - {tower}:
        stack = dataclasses.replace(getattr(cfg, name), causal=usual[name])
        cfg = dataclasses.replace(cfg, **{name: stack})
    with pytest.raises(ValueError, match=rf"cannot express Stack.causal = .* of the {tower}"):
        huggingface.family_for_export(cfg)
    usual = dataclasses.replace(getattr(cfg, tower), causal=usual[tower])
    huggingface.family_for_export(dataclasses.replace(cfg, **{tower: usual}))
