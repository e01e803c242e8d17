# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their weights in memory, and checkpoints of other libraries made from them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import (
    manager,
    matching,
    run_folder,
    safetensors_writer,
    transfer,
    unfinished,
    weights,
)
from t5x_lite.checkpoints.formats.huggingface import gpt2, llama, t5
from t5x_lite.checkpoints.weight_paths import flatten_tree

SMALL = dict(embed=8, heads=3, head_dim=4, mlp=16)
T5 = config.Model(
    vocab=40,
    encoder=config.Stack(layers=2, **SMALL),
    decoder=config.Stack(layers=3, **SMALL),
)
UMT5 = config.Model(
    vocab=40,
    encoder=config.Stack(layers=2, bias_per_layer=True, **SMALL),
    decoder=config.Stack(layers=3, bias_per_layer=True, **SMALL),
)
LONE = config.Model(vocab=40, decoder=config.Stack(layers=2, **SMALL), tied=True, scale_logits=True)
LLAMA = config.Model(
    vocab=40,
    decoder=config.Stack(
        layers=3,
        embed=8,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp=16,
        activation="silu",
        positions="rotary",
        query_scale=0.5,
    ),
)
GPT2 = config.Model(
    vocab=40,
    tied=True,
    add_bos=False,
    decoder=config.Stack(
        layers=3,
        embed=8,
        heads=2,
        head_dim=4,
        mlp=32,
        gated=False,
        norm="layer",
        norm_epsilon=1e-5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        max_length=16,
        query_scale=0.5,
    ),
)
FAMILIES = {"t5": (t5, T5), "umt5": (t5, UMT5), "llama": (llama, LLAMA), "gpt2": (gpt2, GPT2)}


def ignore_progress(done):
    """Progress callback that reports nothing."""


class Drawn:
    """Weights of a model, drawn by seed, in memory."""

    def __init__(self, cfg: config.Model, dtype=np.float32, seed: int = 0):
        self.leaves = matching.model_leaves(cfg)
        draw = np.random.default_rng(seed)
        self.arrays = {
            path: draw.normal(size=leaf.shape).astype(dtype) for path, leaf in self.leaves.items()
        }
        self.names = {path: (array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        array = self.arrays[path]
        return array if layer is None else array[layer]


def write_hugging_face(folder: Path, family, cfg: config.Model, drawn, limit: int = 10**9) -> Path:
    """Writes a Hugging Face folder without a tokenizer.

    Args:
      folder: folder to write.
      family: module of the conversion of the family.
      cfg: architecture.
      drawn: weights.
      limit: bytes per file.
    """
    with unfinished.unfinished_folder(folder) as partial:
        tensors = transfer.group_by_tensor(drawn, cfg, family.entries(cfg))
        names = transfer.describe_tensors(drawn, tensors, None)
        transfer.write_safetensors(drawn, tensors, partial, names, limit, ignore_progress)
        (partial / "config.json").write_text(json.dumps(family.config_json(cfg)))
    return folder


def write_ours(folder: Path, cfg: config.Model, source, dtype=None) -> Path:
    """Writes a run folder.

    Args:
      folder: folder to write.
      cfg: architecture.
      source: weights.
      dtype: their dtype on disk; None keeps that of source.
    """
    with unfinished.unfinished_folder(folder) as partial:
        run = run_folder.model_only_run(folder, cfg)
        transfer.write_run_folder(source, run, partial, dtype, ignore_progress)
    return folder


def write_safetensors(file: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Writes arrays to a .safetensors file."""
    names = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    content = safetensors_writer.encode_header(names) + b"".join(
        a.tobytes() for a in arrays.values()
    )
    file.write_bytes(content)
    return file


def assert_same(source, drawn: Drawn) -> None:
    """Every weight of source has the bits of drawn's."""
    assert source.names == drawn.names
    for path, leaf in drawn.leaves.items():
        for layer in weights.layer_numbers(leaf):
            got, wanted = source.read(path, layer), drawn.read(path, layer)
            assert weights.equal_bits(np.ascontiguousarray(got), np.ascontiguousarray(wanted)), path


def assert_restores(folder: Path, drawn: Drawn) -> None:
    """The run folder is a checkpoint that training's own reader takes, digests compared."""
    params, step = manager.load_params(folder)
    flat = flatten_tree(params, "/")
    assert step == 0 and flat.keys() == drawn.arrays.keys()
    for path, array in drawn.arrays.items():
        assert weights.equal_bits(np.asarray(flat[path]), array), path


DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
