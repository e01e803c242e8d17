# SPDX-License-Identifier: Apache-2.0
"""Where every parameter lives, and its bytes on each device: readable tables, kept as golden files.

T5X_LITE_WRITE_GOLDEN=1 pytest tests/test_plan_placement.py writes them anew; read the difference.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import config, config_file, model, sharding
from t5x_lite.training import dry_run, state

GOLDEN = Path(__file__).parent / "golden"
MESHES = {"fsdp8": config.Mesh(1, 8, 1), "data2_fsdp2_tensor2": config.Mesh(2, 2, 2)}
MODELS = ["t5_1_1_small", "t5gemma_s_s"]


def placed(name: str, mesh: config.Mesh) -> tuple[config.Model, dict]:
    files = ["configs/runs/pretrain.gin", f"configs/models/{name}.gin"]
    cfg = config_file.load(files).model
    sharding.use_mesh(mesh)
    return cfg, model.shapes(cfg)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_lives_where_the_golden_table_says(name, mesh):
    cfg, params = placed(name, MESHES[mesh])
    text = "\n".join(dry_run.weights(params, model.axes(cfg))) + "\n"
    path = GOLDEN / f"placement_{name}_{mesh}.txt"
    if os.environ.get("T5X_LITE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_tables_bytes_are_those_of_real_arrays(name, mesh):
    cfg, params = placed(name, MESHES[mesh])
    rows = dry_run.weights(params, model.axes(cfg))
    told = sum(float(row.split(" MiB")[0].split()[-1].replace(",", "")) for row in rows)
    assert told == pytest.approx(state.size_per_device(params) / 2**20, abs=0.0005 * len(rows))
    leaf = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
    real = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    held = max(shard.data.nbytes for shard in real.addressable_shards)
    assert held == state.size_per_device(leaf)
