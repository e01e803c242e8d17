# SPDX-License-Identifier: Apache-2.0
"""Measured blocks: found for their chip and shape, used by the kernel, refused where broken."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import config, tune
from t5x_lite.config import gin_file
from t5x_lite.kernels import tile_table
from t5x_lite.kernels.backend import INTERPRETED, Backend
from t5x_lite.kernels.flash import api as flash_attention
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.tile_table import AttentionShape, MeasuredBlocks
from t5x_lite.training import tune_attention

SHAPE = AttentionShape("TPU v9", 2048, 2048, 64, 2, True, False)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv(tile_table.TABLE_VARIABLE, str(tmp_path / "of" / "tiles.json"))
    tile_table.read_table.cache_clear()
    return tile_table.table_path()


def test_blocks_are_those_of_the_nearest_lengths_of_the_same_kind(table):
    assert tile_table.fastest_blocks(SHAPE) is None
    longer = dataclasses.replace(SHAPE, queries=16384, keys=16384)
    tile_table.write_table(
        table, [MeasuredBlocks(SHAPE, 256, 512, 1.0), MeasuredBlocks(longer, 1024, 512, 9.0)]
    )
    near = dataclasses.replace(SHAPE, queries=1500, keys=3000)
    far = dataclasses.replace(SHAPE, queries=9000, keys=30000)
    assert tile_table.fastest_blocks(near) == (256, 512)
    assert tile_table.fastest_blocks(far) == (1024, 512)
    for change in ({"chip": "TPU v8"}, {"biased": False}, {"bytes": 4}, {"head_dim": 128}):
        assert tile_table.fastest_blocks(dataclasses.replace(SHAPE, **change)) is None


def test_a_new_measurement_replaces_the_old_and_leaves_the_others(table):
    other = dataclasses.replace(SHAPE, causal=True)
    tile_table.write_table(
        table, [MeasuredBlocks(SHAPE, 256, 512, 1.0), MeasuredBlocks(other, 128, 128, 2.0)]
    )
    tile_table.write_table(table, [MeasuredBlocks(SHAPE, 512, 512, 0.5)])
    assert tile_table.fastest_blocks(SHAPE) == (512, 512)
    assert tile_table.fastest_blocks(other) == (128, 128)


def test_a_broken_table_is_named(table):
    table.parent.mkdir()
    for text in ("no json", '[{"query": 1}]', "[3]"):
        table.write_text(text)
        tile_table.read_table.cache_clear()
        with pytest.raises(ValueError, match="tiles.json is not a table of tiles"):
            tile_table.fastest_blocks(SHAPE)


def test_the_kernel_takes_measured_blocks(table):
    tile_table.write_table(
        table, [MeasuredBlocks(dataclasses.replace(SHAPE, biased=False), 128, 256, 1.0)]
    )
    q, k = jnp.zeros((1, 2048, 2, 1, 64), jnp.bfloat16), jnp.zeros((1, 2, 2048, 64), jnp.bfloat16)
    row = jnp.ones((1, 2048), jnp.int32)
    sources = (flash_attention.AttentionSource(k, k, Mask(row, row)),)

    def sizes(backend):
        return flash_attention.make_config(q, sources, None, backend, None).block_sizes

    assert sizes(Backend("tpu", 5, "TPU v9")) == BlockSizes(128, 256)
    assert sizes(Backend("tpu", 5, "TPU v5 lite")) == BlockSizes(512, 512)


@pytest.mark.slow
def test_every_kind_of_attention_of_a_run_is_measured(table):
    files, lengths = ["configs/runs/pretrain.gin"], '{"inputs": 200, "targets": 130}'
    short = ["config.Stack.heads=2", "BATCH_SIZE=8", f"TASK_FEATURE_LENGTHS={lengths}"]
    run = gin_file.load_run(files, short)
    names = [case.name for case in tune_attention.cases(run)]
    assert names == ["encoder", "decoder", "cross"]
    best = tune_attention.tune_run(run, [128, 256], 1, INTERPRETED)
    assert [(row.shape.queries, row.shape.keys) for row in best] == [
        (200,) * 2,
        (130,) * 2,
        (130, 200),
    ]
    assert [row.shape.biased for row in best] == [True, True, False]
    assert all(row.query in (128, 256) and row.milliseconds > 0 for row in best)


def test_without_a_tpu_nothing_is_measured(table, capsys):
    assert jax.default_backend() == "cpu"
    with pytest.raises(SystemExit) as end:
        tune.main(["--gin_file=configs/runs/pretrain.gin"])
    assert end.value.code == 2 and "there is no TPU here" in capsys.readouterr().err
    assert not table.exists()


def test_a_decoder_alone_has_one_kind():
    alone = config.Model(64, decoder=config.Stack(1, 16, 2, 8, 32))
    run = gin_file.load_run(["configs/runs/pretrain.gin"], [])
    assert [case.name for case in tune_attention.cases(dataclasses.replace(run, model=alone))] == [
        "decoder"
    ]
