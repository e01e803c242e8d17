# SPDX-License-Identifier: Apache-2.0
"""The training step compiles for TPUs that are not there: libtpu needs no chip for that."""

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import config, config_file, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.training import optimizer, schedules, state, step

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


def abstract_batch(run: config.Run) -> Batch:
    """The shapes of a batch, placed on the mesh in force."""
    rows, lengths = run.train.batch_size, run.data.lengths
    array = lambda length, dtype: jax.ShapeDtypeStruct(
        (rows, length), dtype, sharding=sharding.named("batch length")
    )
    if run.model.layout == "joined":
        ids = [array(sum(lengths.values()), jnp.int32)] * 3
        weights, prefix = (array(sum(lengths.values()), kind) for kind in (jnp.float32, bool))
        return Batch(*ids, weights, prefix=prefix)
    targets, inputs = ([array(lengths[name], jnp.int32)] * 3 for name in ("targets", "inputs"))
    return Batch(*targets, array(lengths["targets"], jnp.float32), *inputs)


def compiled(run: config.Run, devices: list):
    """The training step of run, compiled for devices; nothing is computed."""
    sharding.use_mesh(run.mesh, devices)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = model.axes(run.model)
    update = optimizer.make(run.optimizer, schedule, axes)
    shapes = state.shapes(model.shapes(run.model), update)
    made = step.make(run, update, schedule, axes)
    return made.trace(shapes, abstract_batch(run)).lower().compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, bindings",
    [
        (["configs/runs/pretrain.gin"], []),
        (
            ["configs/runs/pretrain.gin", "configs/models/decoder_small.gin"],
            ["config.Model.encoder=None", "config.Model.prefix_lm=True"],
        ),
        # Windows, softcaps, two tables; then one softmax over past and inputs, in two layers.
        (["configs/runs/pretrain.gin", "configs/models/t5gemma_s_s.gin"], SHORT),
        (
            ["configs/runs/pretrain.gin", "configs/models/t5gemma2_4b.gin"],
            [*SHORT, "config.Model.eoi=5"],
        ),
    ],
)
def test_the_training_step_compiles_for_tpu_and_fits(topology, files, bindings):
    mesh = ["config.Mesh.fsdp=2", "config.Mesh.tensor=2"]
    bindings = [*bindings, *mesh, "BATCH_SIZE=16"]
    run = config_file.load(files, bindings)
    memory = compiled(run, list(topology.devices)).memory_analysis()
    assert 0 < memory.peak_memory_in_bytes < 16e9  # a v5e chip has 16 GB
