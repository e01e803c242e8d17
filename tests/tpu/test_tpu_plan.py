# SPDX-License-Identifier: Apache-2.0
"""Plans of TPU slices that are not there, by libtpu's own programs: tiny models, v5e and others."""

import json

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import plan
from t5x_lite.config import gin_file
from t5x_lite.planning import chips, collectives, compiled, counted, hlo, steps, trips

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

FILE = "configs/runs/pretrain.gin"
TINY = [
    "config.Model.encoder=None",
    "config.Model.vocab=512",
    "config.Stack.embed=128",
    "config.Stack.heads=4",
    "config.Stack.head_dim=32",
    "config.Stack.mlp=256",
    "config.Stack.layers=3",
    "BATCH_SIZE=16",
    'TASK_FEATURE_LENGTHS={"inputs":128,"targets":128}',
    "config.Mesh.fsdp=2",
    "config.Mesh.tensor=2",
]
FLAGS = [f"--gin.{binding}" for binding in TINY]


def work(executable) -> counted.ProgramCost:
    """Cost of an executable's program."""
    module = hlo.parse_module(executable.as_text())
    return counted.program_cost(module, trips.executions(module))


@pytest.fixture(autouse=True)
def no_mesh_left():
    yield
    jax.set_mesh(None)


@pytest.mark.slow
def test_a_scanned_step_counts_as_its_unrolled_twin_and_as_the_compiler_counts_that():
    devices = compiled.devices(chips.parse_topology("v5e:2x2"))
    # Without recomputation: an unrolled program shares it with the forward pass, a scan cannot.
    result = []
    for unroll in (1, 3):
        changes = ['config.Train.remat="none"', f"config.Train.unroll={unroll}"]
        run = gin_file.load_run([FILE], [*TINY, *changes])
        executable = steps.training(run, devices).trace.lower().compile()
        result.append(work(executable).flops)
    assert result[0] == result[1]
    # The compiler adds what is not a product: a few percent at this width.
    analysed = executable.cost_analysis()["flops"]
    assert 0.95 * analysed < result[1] <= analysed


@pytest.mark.slow
def test_bytes_are_the_compilers_where_nothing_fits_fast_memory_and_loops_multiply_them():
    devices = compiled.devices(chips.parse_topology("v5e:1x1"))
    mesh = jax.make_mesh((1,), ("x",), devices=devices)
    jax.set_mesh(mesh)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    def once(x, w):
        return jnp.maximum(x @ w, 0)

    single = jax.jit(once).trace(shape(16384, 8192), shape(8192, 8192)).lower().compile()
    assert work(single).moved == single.cost_analysis()["bytes accessed"]

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (once(x, w), None), x, ws)[0]

    many = jax.jit(scanned, donate_argnums=0).trace(shape(16384, 8192), shape(4, 8192, 8192))
    moved = work(many.lower().compile()).moved
    # Each turn copies its carry, which the product cannot overwrite while it reads it.
    carry = 2 * 16384 * 8192 * 2
    assert moved == pytest.approx(4 * (work(single).moved + carry), rel=1e-6)


@pytest.mark.slow
def test_the_command_plans_a_training_step(tmp_path, capsys):
    path = tmp_path / "plans" / "step.json"
    flags = ["--topology=v5e:2x2", "--price=1.2", f"--json={path}"]
    assert plan.main([f"--gin_file={FILE}", *FLAGS, *flags]) == 0
    output = capsys.readouterr().out
    for words in ("FITS", "optimizer state", "all-reduce", "tensor", "tokens/s", "10^9 tokens"):
        assert words in output
    record = json.loads(path.read_text())
    assert record["memory"]["fits"] and record["chips"] == 4
    assert record["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    # In bfloat16, and half of it on each side of `tensor`: both passes gather the matrices of every
    # layer; the embedding table and the head are gathered once.
    layers, tables = 3 * 128 * (4 * 4 * 32 + 3 * 256), 2 * 512 * 128
    by_kind = {}
    for row in record["collectives"]:
        if row["axes"] == ["fsdp"]:
            by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["bytes"]
    assert by_kind["all-gather"] == (2 * layers + tables) * 2 // 2
    estimate = record["estimate"]
    assert estimate["overlapped"] <= estimate["scheduled"] <= estimate["summed"]
    assert estimate["cost"] > 0 and not record["unknown_loops"]


@pytest.mark.slow
def test_the_command_says_by_how_much_a_step_does_not_fit(capsys):
    much = ["--gin.BATCH_SIZE=40000", "--gin.config.Train.remat=none"]
    assert plan.main([f"--gin_file={FILE}", *FLAGS, *much, "--topology=v5e:2x2"]) == 1
    output = capsys.readouterr().out
    assert "DOES NOT FIT" in output and "of 15.75 GiB" in output and "Train.microbatches" in output


@pytest.mark.slow
@pytest.mark.parametrize("pair", [True, False])
def test_the_command_plans_a_decode_step(tmp_path, capsys, pair):
    path = tmp_path / "step.json"
    flags = ["--decode", "--decode_rows=8", "--decode_length=100", "--topology=v5e:2x2"]
    model_flags = [flag for flag in FLAGS if not (pair and "encoder" in flag)]
    assert plan.main([f"--gin_file={FILE}", *model_flags, *flags, f"--json={path}"]) == 0
    assert "decode step" in capsys.readouterr().out
    record = json.loads(path.read_text())
    # Per chip half of the rows and of the heads: keys and values of every slot and input.
    slots = 1 + 128 + 1 if pair else 128 + 128 + 1
    crossed = 128 if pair else 0
    cache = 2 * 3 * 4 * 2 * 32 * 2 * (slots + crossed)
    assert record["memory"]["kinds"]["cache"] == cache
    assert record["tokens"] == 8 and not record["unknown_loops"]


def test_slices_have_a_device_for_every_chip_and_their_places():
    for name in ("v5e:4x4", "v6e:2x4", "v5p:2x2x4", "v4:2x2x2"):
        slice_ = chips.parse_topology(name)
        devices = compiled.devices(slice_)
        assert len(devices) == slice_.count and devices[0].device_kind.startswith("TPU")
        mesh = jax.make_mesh((1, slice_.count), ("data", "fsdp"), devices=devices)
        where = collectives.mesh_wiring(mesh, slice_)
        assert len({tuple(place) for place in where.places}) == slice_.count
        assert (where.places.max(axis=0) + 1).tolist() == list(slice_.sides)


def test_a_slice_that_cannot_be_is_refused(capsys):
    for name in ("v5e:3x3", "v5e:2x9"):
        with pytest.raises(SystemExit) as end:
            plan.main([f"--gin_file={FILE}", f"--topology={name}"])
        assert end.value.code == 2
        assert f"--topology={name} does not exist" in capsys.readouterr().err


def test_sizes_of_the_compilers_messages_are_read():
    chip = chips.CHIPS["v5e"]
    newer = "RESOURCE_EXHAUSTED: temporaries (18.31G) exceeds available HBM (15.75G). HLO"
    older = "RESOURCE_EXHAUSTED: Used 21.30G of 15.75G hbm. Exceeded hbm capacity by 5.55G."
    assert compiled.amounts(newer, chip) == (int(18.31 * 2**30), int(15.75 * 2**30))
    assert compiled.amounts(older, chip) == (int(21.3 * 2**30), int(15.75 * 2**30))
    needed, available = compiled.amounts("RESOURCE_EXHAUSTED: hbm", chip)
    assert needed > available == chip.memory
