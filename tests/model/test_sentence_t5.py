# SPDX-License-Identifier: Apache-2.0
"""A Sentence-T5 folder gives its vectors: read and written with its pooling."""

import dataclasses
import json

import encoder_parity
import jax
import numpy as np
import parity
import pytest
import torch
import transformers
from encoder_decoder_parity import their_inputs
from family_models import VOCAB, lone_encoder
from safetensors.numpy import save_file

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import matching, tensors
from t5x_lite.checkpoints.formats.huggingface import (
    family_for_export,
    family_of_config,
    sentence_t5,
)


@pytest.fixture
def sentence_folder(tmp_path):
    """A Sentence-T5 as sentence-transformers saves it, its T5, and the projection [out in]."""
    theirs = lone_encoder(transformers.T5EncoderModel)(6)
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
    assert read.model.readout == config.Readout("vector", "mean", project=5, normalize=True)
    cfg = dataclasses.replace(read.model, dtype="float32")
    params = parity.ours(
        read.source, cfg, family_of_config(json.loads((folder / "config.json").read_text()))
    )
    ids = encoder_parity.drawn_ids(VOCAB, 0, seed=5)
    with torch.no_grad():
        hidden = theirs(**their_inputs(ids)).last_hidden_state.numpy()
    mean = (hidden * ids.exists[:, :, None]).sum(axis=1) / ids.exists.sum(axis=1, keepdims=True)
    expected = mean @ dense.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    actual = encoder_parity.our_vectors(cfg, params, ids, model.Transformer.pooled)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "readout",
    [
        config.Readout("vector", "mean", project=5, normalize=True),
        config.Readout("vector", "first", query_prompt="query: ", document_prompt="passage: "),
        config.Readout("vector", "last", normalize=True),
    ],
)
def test_written_readout_is_read_again(readout, tmp_path):
    stack = config.Stack(layers=1, embed=6, heads=1, head_dim=4, mlp=8)
    cfg = config.Model(vocab=VOCAB, encoder=stack, tied=True, readout=readout)
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
    assert (sentence_t5.dense_file(tmp_path) is None) == (readout.project is None)


@pytest.mark.parametrize(
    "mode, kind", [("mean", "mean"), ("cls", "first"), (["lasttoken"], "last")]
)
def test_a_pooling_mode_by_name_is_read(sentence_folder, mode, kind):
    file = sentence_folder[0] / "1_Pooling/config.json"
    file.write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": mode}))
    assert tensors.open_hugging_face_tensors(sentence_folder[0]).model.readout.pooling == kind


LENGTHS = {
    "its own": ({"sentence_bert_config": {"max_seq_length": 6, "do_lower_case": False}}, 6),
    "the tokenizer's": (
        {
            "sentence_bert_config": {"max_seq_length": None},
            "tokenizer_config": {"model_max_length": 9},
        },
        9,
    ),
    "no file": ({"tokenizer_config": {"model_max_length": 9}}, 9),
    "none": ({"tokenizer_config": {"model_max_length": int(1e30)}}, None),
}


@pytest.mark.parametrize("files, longest", LENGTHS.values(), ids=LENGTHS)
def test_the_length_of_texts_is_read_and_written_back(sentence_folder, files, longest):
    folder = sentence_folder[0]
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    cfg = tensors.open_hugging_face_tensors(folder).model
    assert cfg.readout.max_length == longest
    back = sentence_t5.export_files(cfg).get("sentence_bert_config.json", {})
    assert back.get("max_seq_length") == longest


BROKEN = {
    "a max": ("1_Pooling", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}),
    "two modes": ("1_Pooling", {"pooling_mode_cls_token": True}),
    "a bias": ("2_Dense", {"bias": True}),
    "a max by name": ("1_Pooling", {"pooling_mode": "max"}),
    "two by name": ("1_Pooling", {"pooling_mode": ["mean", "cls"]}),
    "a tanh": ("2_Dense", {"activation_function": "torch.nn.modules.activation.Tanh"}),
}


@pytest.mark.parametrize("place, change", BROKEN.values(), ids=BROKEN)
def test_another_pooling_than_sentence_t5s_is_refused(sentence_folder, place, change):
    file = sentence_folder[0] / place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    value = change[list(change)[-1]]
    word = value if value == "max" else "mean, cls" if isinstance(value, list) else list(change)[-1]
    with pytest.raises(ValueError, match=f"{place}/config.json: .*{word}"):
        tensors.open_hugging_face_tensors(sentence_folder[0])


def test_another_module_is_refused(sentence_folder):
    file = sentence_folder[0] / "modules.json"
    extra = {"idx": 4, "name": "4", "path": "4_CNN", "type": "sentence_transformers.models.CNN"}
    file.write_text(json.dumps([*json.loads(file.read_text()), extra]))
    with pytest.raises(ValueError, match="CNN"):
        tensors.open_hugging_face_tensors(sentence_folder[0])


@pytest.mark.parametrize(
    "name, content",
    [
        ("modules.json", "[1]"),
        ("modules.json", "[" * 100_000),
        ("modules.json", '[{"type": "a.Transformer", "path": "../.."}]'),
        ("1_Pooling/config.json", "[]"),
        ("2_Dense/config.json", "{}"),
        ("sentence_bert_config.json", '{"max_seq_length": -1}'),
        ("sentence_bert_config.json", '{"max_seq_length": 6, "do_lower_case": true}'),
    ],
)
def test_broken_files_of_sentence_transformers_are_refused_by_name(sentence_folder, name, content):
    (sentence_folder[0] / name).write_text(content)
    with pytest.raises(ValueError, match=sentence_folder[0].name):
        tensors.open_hugging_face_tensors(sentence_folder[0])
