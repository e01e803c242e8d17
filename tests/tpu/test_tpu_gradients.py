# SPDX-License-Identifier: Apache-2.0
"""Reads of split weights in a step compiled for TPU, and sums of their gradients: no whole copy,
and each device takes its part. The update by the optimizer after that.
"""

import functools
import re

import jax
import pytest

from t5x_lite.config import gin_file
from t5x_lite.planning import chips, collectives, compiled, hlo, steps, trips

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

TINY = [
    "config.Model.encoder=None",
    "config.Model.vocab=512",
    "config.Stack.embed=256",
    "config.Stack.heads=4",
    "config.Stack.head_dim=32",
    "config.Stack.mlp=256",
    "config.Stack.layers=2",
    "BATCH_SIZE=16",
    'TASK_FEATURE_LENGTHS={"inputs":64,"targets":64}',
    "config.Mesh.data=-1",
]
SPLIT = "config.Mesh.fsdp=2"


@pytest.fixture(autouse=True)
def no_mesh_left():
    yield
    jax.set_mesh(None)


@functools.cache
def program(*bindings: str):
    """The compiled step: its text, and the mesh's wiring."""
    run = gin_file.load_run(["configs/runs/pretrain.gin"], [*TINY, *bindings])
    slice_ = chips.parse_topology("v5e:2x2")
    step = steps.training(run, compiled.devices(slice_))
    where = collectives.mesh_wiring(jax.sharding.get_mesh(), slice_)
    return compiled.compile_program(step.trace.lower())[1], where


@pytest.mark.slow
def test_gradients_of_split_weights_are_reduce_scattered_not_summed_whole():
    text, where = program(SPLIT)
    module = hlo.parse_module(text)
    sums = {"reduce-scatter": 0, "all-reduce": 0}
    for each in collectives.collectives(module, trips.executions(module), where):
        if each.kind in sums and "fsdp" in each.axes:
            sums[each.kind] += each.times * each.bytes
    # In bfloat16: four matrices of attention and three of the MLP in both layers, and the head.
    head = 2 * 512 * 256
    matrices = 2 * 2 * (4 * 4 * 32 * 256 + 3 * 256 * 256) + head
    assert sums["reduce-scatter"] == matrices
    # The embedding's table, whose gradient XLA scatters and sums; norms, biases, statistics.
    assert head <= sums["all-reduce"] < 1.1 * head


@pytest.mark.slow
def test_layers_are_read_as_they_are_kept():
    loops = re.findall(r"= \((.*)\) while\(.*op_name=\"([^\"]*)\"", program(SPLIT)[0])
    forward = [arrays for arrays, name in loops if "jvp" in name and "transpose" not in name]
    assert len(forward) == 1
    # Two layers of this device's half of the MLP: float32, and no copy in bfloat16 beside them.
    for shape in ("2,128,256", "2,256,128", "2,128,4,32"):
        assert f"f32[{shape}]" in forward[0] and f"bf16[{shape}]" not in forward[0]


@pytest.mark.slow
def test_the_optimizer_reads_gradients_as_they_are():
    """In bfloat16 and in the order of the weights: none is written out again before it is used."""
    entry = program()[0].split("\nENTRY ")[1]
    for shape in ("2,256,256", "2,256,4,32", "2,4,32,256", "512,256", "256,512"):
        again = rf"= \w+\[{shape}\]\S* (copy|convert)\("
        assert f"f32[{shape}]" in entry and not re.search(again, entry), shape
