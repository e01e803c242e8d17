# SPDX-License-Identifier: Apache-2.0
"""Random adapters of toys: in memory, and as folders of peft."""

import dataclasses
import json

import numpy as np
from conversion_toys import write_safetensors

from t5x_lite import config, model
from t5x_lite.checkpoints import adapters as saved_adapters
from t5x_lite.checkpoints import matching
from t5x_lite.checkpoints.formats.huggingface import peft, t5
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.model import adapters

LORA = config.Lora(rank=2, alpha=4.0, weights=("*.query", "*.out", "*.gate"))
# Of several ranks and matrices.
LORAS = {
    "low": config.Lora(rank=2, alpha=4.0),
    "dora": config.Lora(rank=3, alpha=2.0, dora=True),
    "few": config.Lora(rank=1, alpha=3.0, weights=("decoder.*.attention.query",)),
}


def draw_adapter(cfg: config.Model, name: str) -> dict:
    """Random arrays of an adapter, large enough to change every logit.

    Args:
      cfg: the model.
      name: one of LORAS.
    """
    draw, lora = np.random.default_rng(sum(map(ord, name))), LORAS[name]
    shapes, axes = flatten_tree(model.shapes(cfg)), flatten_tree(model.axes(cfg))
    described = adapters.adapter_shapes(lora, axes, shapes)
    arrays = {
        path: (0.3 * draw.normal(size=each.shape) + path.endswith("magnitude")).astype(np.float32)
        for path, each in described.items()
    }
    return nest_tree(arrays)


def draw_adapters(folder, cfg, seed: int, dora: bool = False):
    """Writes a folder of peft with random adapters of the toy in folder / "hf".

    Args:
      folder: folder of the toys.
      cfg: architecture of the toy.
      seed: seed of the draw.
      dora: adapters with magnitudes.
    """
    draw = np.random.default_rng(seed)
    lora = dataclasses.replace(LORA, dora=dora)
    axes = saved_adapters.model_axes(cfg)
    table = peft.adapter_entries(t5.entries(cfg), lora, axes)
    leaves = saved_adapters.adapter_leaves(cfg, lora)
    arrays = {
        mapping.theirs: draw.normal(size=mapping.tensor_shape).astype(np.float32)
        for mapping in matching.map_weights(cfg, table, leaves)
    }
    path = folder / f"peft_{seed}"
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", arrays)
    fields = peft.adapter_config(lora, str(folder / "hf"), cfg, t5.entries(cfg))
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path
