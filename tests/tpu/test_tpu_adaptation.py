# SPDX-License-Identifier: Apache-2.0
"""The steps of large adaptations compile for TPU: towers short here, of the sizes' own widths."""

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import config, model, sharding
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import TeacherBatch
from t5x_lite.checkpoints import train_state
from t5x_lite.config import gin_file
from t5x_lite.planning import aot
from t5x_lite.training import optimizer, schedules, step

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

# A scan compiles two layers as it does many; six are one turn of Gemma 3's pattern.
LAYERS = {"gemma2_2b_2b": 2, "gemma2_9b_2b": 2, "gemma3_t5gemma2_270m": 6, "gemma3_t5gemma2_4b": 6}
# Each model is compiled once: these with a teacher, the others with UL2. All but the smallest take
# minutes of a core.
TEACHERS = {"gemma2_9b_2b": "gemma2_9b", "gemma3_t5gemma2_270m": "gemma3_270m"}
RUN = """
include "models/{}.gin"
config.Run.model_dir = "none"
config.Run.model = @config.Model()
"""


@pytest.fixture(scope="module")
def topology():
    """Sixteen v5e chips, described."""
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:4x4", platform="tpu")


def short(towers: tuple[str, ...], layers: int | None) -> list[str]:
    """Bindings that leave these towers `layers` (None: all) layers."""
    return [f"{tower}/config.Stack.layers={layers}" for tower in towers if layers]


def teacher_of(name: str, layers: int | None, folder) -> Teacher:
    """A teacher without a checkpoint.

    Args:
      name: of the preset.
      layers: of each stack; None for all.
      folder: of its config.
    """
    path = folder / "teacher.gin"
    path.write_text(RUN.format(TEACHERS[name]))
    cfg = gin_file.load_run([str(path)], short(("decoder",), layers)).model
    return Teacher("none", cfg, None, cfg.vocab)


def teacher_data(run: config.Run) -> TeacherBatch:
    """The shapes of what a teacher reads."""
    rows, lengths = run.train.batch_size, run.data.lengths

    def array(length, kind):
        return jax.ShapeDtypeStruct(
            (rows, length), kind, sharding=sharding.named_sharding("batch length")
        )

    read = [array(sum(lengths.values()), jnp.int32)] * 3
    return TeacherBatch(
        *read, array(lengths["targets"], jnp.int32), array(lengths["targets"], bool)
    )


def peak(run: config.Run, devices: list, teacher: Teacher | None = None) -> int:
    """Peak bytes of the training step on each device; nothing is computed.

    Args:
      run: config of the run.
      devices: to compile for.
      teacher: of the distillation, or None.
    """
    sharding.use_mesh(run.mesh, devices)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = model.axes(run.model)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    shapes = train_state.state_shapes(model.shapes(run.model), update)
    batch = aot.abstract_batch(run)
    teacher_params = None
    if teacher is not None:
        batch = batch._replace(teacher_data=teacher_data(run))
        kept = jnp.dtype(teacher.model.dtype)

        def narrow(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)

        teacher_params = jax.tree.map(narrow, model.shapes(teacher.model))
    stepper = step.make_step(run, update, schedule, axes, teacher)
    compiled = stepper.trace(shapes, batch, teacher_params).lower().compile()
    return compiled.memory_analysis().peak_memory_in_bytes


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(LAYERS.keys() - TEACHERS.keys()))
def test_the_step_of_an_adaptation_compiles_for_tpu_and_fits(topology, name):
    bindings = [*short(("encoder", "decoder"), LAYERS[name]), "BATCH_SIZE=16"]
    run = gin_file.load_run([f"configs/runs/adapt_ul2_{name}.gin"], bindings)
    assert run.adaptation is not None
    assert 0 < peak(run, list(topology.devices)) < 16e9  # a v5e chip has 16 GB


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("gemma2_9b_2b", marks=pytest.mark.exhaustive), "gemma3_t5gemma2_270m"]
)
def test_the_step_with_a_teacher_compiles_for_tpu_and_fits(topology, name, tmp_path):
    bindings = [*short(("encoder", "decoder"), LAYERS[name]), "BATCH_SIZE=16"]
    run = gin_file.load_run([f"configs/runs/adapt_prefixlm_distill_{name}.gin"], bindings)
    teacher = teacher_of(name, LAYERS[name], tmp_path)
    assert 0 < peak(run, list(topology.devices), teacher) < 16e9
