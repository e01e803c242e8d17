# SPDX-License-Identifier: Apache-2.0
"""Placement of every parameter, and its bytes on each device: readable tables in golden files.

T5X_LITE_WRITE_GOLDEN=1 pytest tests/planning/test_plan_placement.py writes them; read the diff.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.config import gin_file
from t5x_lite.training.reporting import dry_run

GOLDEN = Path(__file__).parents[1] / "golden"
MESHES = {"fsdp8": config.Mesh(1, 8, 1), "data2_fsdp2_tensor2": config.Mesh(2, 2, 2)}
MODELS = ["t5_1_1_small", "t5gemma_s_s"]


def placed(name: str, mesh: config.Mesh) -> tuple[config.Model, dict]:
    files = ["configs/runs/pretrain.gin", f"configs/models/{name}.gin"]
    cfg = gin_file.load_run(files).model
    sharding.use_mesh(mesh)
    return cfg, model.shapes(cfg)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_lives_where_the_golden_table_says(name, mesh):
    cfg, params = placed(name, MESHES[mesh])
    text = "\n".join(dry_run.weight_lines(params, model.axes(cfg))) + "\n"
    path = GOLDEN / f"placement_{name}_{mesh}.txt"
    if os.environ.get("T5X_LITE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_tables_bytes_are_those_of_real_arrays(name, mesh):
    cfg, params = placed(name, MESHES[mesh])
    rows = dry_run.weight_lines(params, model.axes(cfg))
    table_bytes = sum(float(row.split(" MiB")[0].split()[-1].replace(",", "")) for row in rows)
    assert table_bytes == pytest.approx(
        train_state.bytes_per_device(params) / 2**20, abs=0.0005 * len(rows)
    )
    leaf = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
    real = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    chip_bytes = max(shard.data.nbytes for shard in real.addressable_shards)
    assert chip_bytes == train_state.bytes_per_device(leaf)
