# SPDX-License-Identifier: Apache-2.0
"""Laws of T5s in .gguf files: the model and the ids that their Hugging Face folder has."""

import dataclasses

import encoder_decoder_parity
import gguf
import gguf_t5_toys as toys
import gguf_toys
import jax
import numpy as np
import parity
import pytest

from t5x_lite import sharding
from t5x_lite.checkpoints import tensors, weights
from t5x_lite.checkpoints.formats import gguf as source
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.tokenizers.errors import GgufError


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def read_t5(path):
    """Config and params of a file."""
    mapped = tensors.map_gguf_tensors(source.GgufTensors(path))
    cfg = dataclasses.replace(mapped.model, dtype="float32", dropout=0.0)
    return cfg, weights.place_weights(mapped._replace(model=cfg).weights(), cfg)


@pytest.mark.parametrize("name", [*toys.TOYS, "encoder"])
def test_a_t5s_file_holds_the_model_of_its_hugging_face_folder(name, tmp_path):
    theirs = toys.lone_toy(1) if name == "encoder" else toys.TOYS[name](1)
    pair = parity.read(theirs, tmp_path / "folder")
    architecture = "t5encoder" if name == "encoder" else "t5"
    cfg, params = read_t5(toys.write_t5(tmp_path / "toy.gguf", theirs, architecture))
    # transformers 5.23 scales the logits of every umT5; no released one was trained so.
    scaled = pair.cfg.scale_logits and name != "umt5"
    assert cfg == dataclasses.replace(pair.cfg, scale_logits=scaled)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


@pytest.mark.slow
def test_a_t5s_file_gives_the_outputs_of_transformers(tmp_path):
    theirs = toys.TOYS["gated"](2)
    cfg, params = read_t5(toys.write_t5(tmp_path / "toy.gguf", theirs))
    pair = parity.Pair(theirs, None, cfg, params)
    encoder_decoder_parity.assert_alike(
        pair, encoder_decoder_parity.drawn_ids(cfg.vocab, cfg.decoder_start_token_id, seed=5)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_tensors_of_a_t5_are_dequantized_by_the_package(kind, tmp_path):
    theirs = toys.TOYS["gated"](3)
    quantized = gguf.GGMLQuantizationType[kind]
    path = toys.write_t5(tmp_path / "toy.gguf", theirs, kind=quantized)
    rounded = {}
    for name, array in toys.t5_tensors(theirs).items():
        raw = array.ndim == 1 or array.shape[-1] % 32
        packed = array if raw else gguf.quants.quantize(array, quantized)
        rounded[name] = array if raw else gguf.quants.dequantize(packed, quantized)
    gguf_toys.write(
        tmp_path / "rounded.gguf", "t5", rounded, fields=toys.t5_metadata(theirs.config)
    )
    opened = source.GgufTensors(path)
    assert {
        opened.kinds["enc.blk.0.attn_q.weight"],
        opened.kinds["enc.blk.0.attn_rel_b.weight"],
    } == {
        kind,
        "F32",
    }
    flat, wanted = (
        flatten_tree(read_t5(tmp_path / file)[1], "/") for file in ("toy.gguf", "rounded.gguf")
    )
    for name in wanted:
        np.testing.assert_array_equal(flat[name], wanted[name])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_block_count": 5}, "t5.decoder_block_count is 5, but .* 3 layers"),
        ({"block_count": 5}, "t5.block_count is 5, but .* 2 layers"),
        ({"attention.relative_buckets_count": 0}, "relative_buckets_count is 0"),
        ({"attention.scale": 1.0}, "t5.attention.scale = 1.0 is not implemented"),
        ({"embedding_length": 64}, "t5.embedding_length is 64"),
    ],
)
def test_a_t5s_broken_metadata_is_named(changes, message, tmp_path):
    theirs = toys.TOYS["gated"](1)
    fields = toys.t5_metadata(theirs.config) | changes
    gguf_toys.write(tmp_path / "toy.gguf", "t5", toys.t5_tensors(theirs), fields=fields)
    with pytest.raises(GgufError, match=message):
        tensors.map_gguf_tensors(source.GgufTensors(tmp_path / "toy.gguf"))
