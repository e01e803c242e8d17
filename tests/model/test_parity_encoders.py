# SPDX-License-Identifier: Apache-2.0
"""Lone encoders give transformers' numbers, and a Sentence-T5 folder its vectors."""

import dataclasses
import json

import jax
import numpy as np
import parity
import pytest
import torch
import transformers
from decoder_parity import ours
from safetensors.numpy import save_file
from test_parity_t5 import their_config
from test_parity_t5gemma import their_half

from t5x_lite import config, sharding
from t5x_lite.checkpoints import matching, tensors
from t5x_lite.checkpoints.formats.huggingface import (
    family_for_export,
    family_of_config,
    sentence_t5,
)

VOCAB = 31


def their_encoder(kind: type, seed: int) -> torch.nn.Module:
    """A random encoder of transformers."""
    if kind is transformers.T5GemmaEncoderModel:
        halves = {"encoder": their_half(np.random.default_rng(seed))}
        described = kind.config_class(**halves, is_encoder_decoder=False, vocab_size=VOCAB)
    else:
        described = their_config(kind, seed, vocab_size=VOCAB, feed_forward_proj="gated-gelu")
    return parity.shaken(kind._from_config(described, attn_implementation="eager"), seed)


def our_vectors(cfg: config.Model, params, ids: parity.Ids, method: str) -> np.ndarray:
    """Result of a method that takes inputs, segments and positions.

    Args:
      cfg: architecture.
      params: weights.
      ids: token ids.
      method: name of a method of Transformer.
    """
    apply = jax.jit(lambda params, *args: parity.apply(cfg, params, *args, method=method))
    batch = parity.batch_of(ids)
    return np.asarray(apply(params, batch.inputs, batch.input_segments, batch.input_positions))


@pytest.mark.parametrize(
    "kind",
    [
        transformers.T5EncoderModel,
        transformers.MT5EncoderModel,
        transformers.UMT5EncoderModel,
        transformers.T5GemmaEncoderModel,
    ],
)
def test_lone_encoders_give_the_vectors_of_transformers(kind, tmp_path):
    pair = parity.read(their_encoder(kind, 3), tmp_path / "theirs")
    assert pair.cfg.layout == "encoder_only" and pair.cfg.pooling == config.Pooling()
    cfg = pair.cfg
    if kind is transformers.T5GemmaEncoderModel:  # see test_parity_t5gemma.py
        encoder = dataclasses.replace(cfg.encoder, window_form="within")
        cfg = dataclasses.replace(cfg, encoder=encoder)
    ids = parity.drawn_ids(VOCAB, 0, seed=5)
    with torch.no_grad():
        expected = pair.theirs(**parity.their_inputs(ids)).last_hidden_state.numpy()
    actual = our_vectors(cfg, pair.params, ids, "encode")
    np.testing.assert_allclose(actual[ids.exists], expected[ids.exists], atol=1e-4, rtol=0)
    loads = transformers.T5EncoderModel if kind is transformers.MT5EncoderModel else kind
    parity.assert_there_and_back(pair, loads, tmp_path / "ours")


@pytest.fixture
def sentence_folder(tmp_path):
    """A Sentence-T5 as sentence-transformers saves it, its T5, and the projection [out in]."""
    theirs = their_encoder(transformers.T5EncoderModel, 6)
    theirs.save_pretrained(tmp_path)
    width = theirs.config.d_model
    dense = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    kinds["3_Normalize"] = "Normalize"
    described = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "2_Dense/config.json": {
            "in_features": width,
            "out_features": 5,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }
    for name, content in described.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    save_file({"linear.weight": dense}, tmp_path / "2_Dense" / "model.safetensors")
    return tmp_path, theirs, dense


def test_sentence_t5_gives_the_mean_projected_and_normalized(sentence_folder):
    folder, theirs, dense = sentence_folder
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    read = tensors.open_hugging_face_tensors(folder)
    assert read.model.pooling == config.Pooling("mean", project=5, normalize=True)
    cfg = dataclasses.replace(read.model, dtype="float32")
    params = ours(
        read.source, cfg, family_of_config(json.loads((folder / "config.json").read_text()))
    )
    ids = parity.drawn_ids(VOCAB, 0, seed=5)
    with torch.no_grad():
        hidden = theirs(**parity.their_inputs(ids)).last_hidden_state.numpy()
    mean = (hidden * ids.exists[:, :, None]).sum(axis=1) / ids.exists.sum(axis=1, keepdims=True)
    expected = mean @ dense.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    actual = our_vectors(cfg, params, ids, "pooled")
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "pooling",
    [
        config.Pooling("mean", project=5, normalize=True),
        config.Pooling("first"),
        config.Pooling("last", normalize=True),
    ],
)
def test_written_pooling_is_read_again(pooling, tmp_path):
    stack = config.Stack(layers=1, embed=6, heads=1, head_dim=4, mlp=8)
    cfg = config.Model(vocab=VOCAB, encoder=stack, tied=True, pooling=pooling)
    family = family_for_export(cfg)
    for name, content in sentence_t5.export_files(cfg).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    names = [
        piece.theirs
        for piece in matching.map_weights(cfg, family.entries(cfg), matching.model_leaves(cfg))
    ]
    config_json = sentence_t5.add_modules(tmp_path, family.config_json(cfg))
    assert family.parse_config(config_json, names) == cfg
    assert (sentence_t5.dense_file(tmp_path) is None) == (pooling.project is None)


BROKEN = {
    "a max": ("1_Pooling", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}),
    "two modes": ("1_Pooling", {"pooling_mode_cls_token": True}),
    "a bias": ("2_Dense", {"bias": True}),
    "a tanh": ("2_Dense", {"activation_function": "torch.nn.modules.activation.Tanh"}),
}


@pytest.mark.parametrize("place, change", BROKEN.values(), ids=BROKEN)
def test_another_pooling_than_sentence_t5s_is_refused(sentence_folder, place, change):
    file = sentence_folder[0] / place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{place}/config.json: .*{list(change)[-1]}"):
        tensors.open_hugging_face_tensors(sentence_folder[0])


def test_another_module_is_refused(sentence_folder):
    file = sentence_folder[0] / "modules.json"
    extra = {"idx": 4, "name": "4", "path": "4_CNN", "type": "sentence_transformers.models.CNN"}
    file.write_text(json.dumps([*json.loads(file.read_text()), extra]))
    with pytest.raises(ValueError, match="CNN"):
        tensors.open_hugging_face_tensors(sentence_folder[0])
