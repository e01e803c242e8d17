# SPDX-License-Identifier: Apache-2.0
"""The training step compiles for TPUs that are not there: libtpu needs no chip for that."""

import pytest

from t5x_lite.config import gin_file
from t5x_lite.planning import aot

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")


@pytest.fixture(scope="module")
def topology():
    """Four v5e chips, described."""
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:2x2", platform="tpu")


# Two layers: the scan compiles them as it does many.
SHORT = [
    "encoder/config.Stack.layers=2",
    "decoder/config.Stack.layers=2",
    "config.Model.vocab=4096",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, bindings",
    [
        (["configs/runs/pretrain.gin"], []),
        # Its layers are those of the encoder-decoder's decoder; the kernels of a prefix compile in
        # test_tpu_kernels_flash.
        pytest.param(
            ["configs/runs/pretrain.gin", "configs/models/decoder_small.gin"],
            ["config.Model.encoder=None", "config.Model.prefix_lm=True"],
            marks=pytest.mark.exhaustive,
        ),
        # Windows, softcaps, two tables, in two layers. All that, and one softmax over past and
        # inputs, is in T5Gemma 2's step, which test_tpu_adaptation.py compiles.
        pytest.param(
            ["configs/runs/pretrain.gin", "configs/models/t5gemma_s_s.gin"],
            SHORT,
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_the_training_step_compiles_for_tpu_and_fits(topology, files, bindings):
    mesh = ["config.Mesh.fsdp=2", "config.Mesh.tensor=2"]
    bindings = [*bindings, *mesh, "BATCH_SIZE=16"]
    run = gin_file.load_run(files, bindings)
    memory = aot.trace_step(run, list(topology.devices)).lower().compile().memory_analysis()
    assert 0 < memory.peak_memory_in_bytes < 16e9  # a v5e chip has 16 GB
