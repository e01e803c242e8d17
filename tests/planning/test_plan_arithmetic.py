# SPDX-License-Identifier: Apache-2.0
"""Plans without a compiler: bytes of every mesh, rooflines, wires, and what a search tries."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import pytest

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.config import gin_file
from t5x_lite.planning import aot, arithmetic, chips, report, searching, steps
from t5x_lite.planning.collectives import Collective
from t5x_lite.planning.figures import Figures, Memory, estimate
from t5x_lite.training import optimizer, rollouts, schedules

SMALL = ["config.Stack.layers=2", "config.Stack.embed=64", "config.Stack.heads=8"]
SMALL += ["config.Stack.head_dim=8", "config.Stack.mlp=128", "config.Model.vocab=256"]


def run_of(*bindings: str, files=("configs/runs/pretrain.gin",)) -> config.Run:
    """Run of the tests' config, with bindings."""
    return gin_file.load_run(list(files), [*SMALL, "BATCH_SIZE=64", *bindings])


@functools.cache
def parts_of(name: str = "adafactor") -> arithmetic.StepShapes:
    """Shapes of the step with an optimizer."""
    return arithmetic.step_shapes(run_of(f'config.Optimizer.name="{name}"'))


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_bytes_of_every_mesh_are_those_of_the_arrays_themselves(sizes, name):
    run = run_of(f'config.Optimizer.name="{name}"')
    mesh = config.Mesh(*sizes)
    run = dataclasses.replace(run, mesh=mesh)
    known = parts_of(name)
    result = arithmetic.figures(
        run, chips.parse_chips(f"v5ex{math.prod(sizes)}"), known
    ).memory.kinds
    sharding.use_mesh(mesh, jax.devices()[: math.prod(sizes)])
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, model.axes(run.model))
    shapes = train_state.state_shapes(model.shapes(run.model), update)
    assert result["parameters"] == train_state.bytes_per_device(shapes.params)
    assert result["batch"] == train_state.bytes_per_device(aot.abstract_batch(run))
    assert result["optimizer state"] == train_state.bytes_per_device(shapes.optimizer)


@pytest.mark.parametrize(
    "name",
    [
        *("v5e:4x4x4", "v5e:3x3", "v5e:2x9", "v5e:0x1", "v5e:1x0", "v5e:32x32", "v5e:16x8"),
        *("v6e:2x2x1", "v6e:12x16", "v5p:0x1", "v5p:2x2", "v5p:0x4x4", "v5p:3x4x4"),
        *("v5p:4x4x32", "v4:1x1x1", "v4:4x4", "v4:4x4x20", "v4:2x2x3"),
    ],
)
def test_a_slice_that_there_is_not_is_refused_by_its_shape_at_every_door(name):
    """libtpu would end the process; by arithmetic its figures would be those of nothing."""
    words = f"--topology={name} does not exist: slices of {name.partition(':')[0]} are "
    for parse in (chips.parse_topology, chips.parse_chips):
        with pytest.raises(ValueError, match=re.escape(words)):
            parse(name)


@pytest.mark.parametrize(
    "name, count",
    [
        *(("v5e:1x1", 1), ("v5e:8x16", 128), ("v6e:16x16", 256), ("v4:2x2x1", 4)),
        *(("v4:16x16x16", 4096), ("v5p:2x4x4", 32), ("v5p:16x20x28", 8960), ("v5p:8x4x4", 128)),
    ],
)
def test_slices_that_there_are_have_their_chips(name, count):
    assert chips.parse_topology(name).count == count


def test_a_mesh_that_cannot_split_a_weight_is_refused_with_its_name():
    run = dataclasses.replace(run_of(), mesh=config.Mesh(1, 1, 16))
    with pytest.raises(ValueError, match="decoder.*8 cannot be split over 16 chips"):
        arithmetic.figures(run, chips.parse_chips("h100x16"), parts_of())


def test_slices_are_summed_over_their_network():
    result = {}
    for slices in (1, 2, 4):
        run = dataclasses.replace(run_of(), mesh=config.Mesh(4, 4, 1, slices=slices))
        figures = arithmetic.figures(run, chips.parse_chips("v6ex16"), parts_of())
        result[slices] = {each.axes[0]: each for each in figures.collectives}
    assert result[4]["fsdp"] == result[1]["fsdp"]
    alone = result[4]["data"]
    # With one chip of `data` in each slice, nothing is summed before: 12.5 GB/s, there and back.
    assert alone.seconds == pytest.approx(2 * 3 / 4 * alone.bytes / 12.5e9)
    assert result[1]["data"].seconds < result[2]["data"].seconds < alone.seconds
    with pytest.raises(ValueError, match="data-center network of TPU v4"):
        run = dataclasses.replace(run_of(), mesh=config.Mesh(4, 4, 1, slices=2))
        arithmetic.figures(run, chips.parse_chips("v4x16"), parts_of())


def test_more_kept_is_more_memory_and_microbatches_are_less():
    known = parts_of()
    slice_ = chips.parse_chips("h100x8")

    def kept(*changes):
        return arithmetic.figures(run_of(*changes), slice_, known).memory.kinds

    by_remat = [kept(f'config.Train.remat="{each}"')["activations"] for each in searching.REMATS]
    assert by_remat == sorted(by_remat, reverse=True)
    by_micro = [kept(f"config.Train.microbatches={each}")["activations"] for each in (1, 2, 4)]
    assert by_micro == sorted(by_micro, reverse=True)


PREFERRED = ["config.Run.preferences=@config.Preferences()", "config.Data.objective=None"]
PREFERRED += ["MIXTURE_OR_TASK_NAME=@config.Files()", 'config.Files.name="pairs"']
PREFERRED += ['config.Files.train="pairs.jsonl"', 'config.Files.rejected="rejected"']
PREFERRED += ["config.Files.vocabulary=@config.Vocabulary()", 'config.Vocabulary.kind="bytes"']
REWARDED = ["config.Run.grpo=@config.Grpo()", 'config.Grpo.reward="per"', "config.Grpo.samples=4"]
REWARDED += ["config.Data.objective=None"]
STARTED = ['INITIAL_CHECKPOINT_PATH="runs/before"']
FLOAT32 = ['config.Model.dtype="float32"', "config.Model.dropout=0.0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bindings, rows, passes",
    [
        pytest.param([*PREFERRED, *STARTED], 64, 4, id="pairs"),
        pytest.param([*PREFERRED, 'config.Preferences.loss="simpo"'], 64, 3, id="no reference"),
        pytest.param([*REWARDED, *STARTED, "config.Grpo.updates=2"], 256, 3, id="rewards"),
    ],
)
def test_a_plan_of_preferences_has_their_reference_and_all_samples(bindings, rows, passes):
    run = run_of(*bindings, *FLOAT32, 'config.Train.remat="none"')
    shapes = arithmetic.step_shapes(run)
    figures = arithmetic.figures(run, chips.parse_chips("h100x8"), shapes)
    kinds = figures.memory.kinds
    compared = "simpo" not in str(run.preferences)
    assert kinds.get("reference weights") == (kinds["parameters"] if compared else None)
    assert figures.tokens == rows * (512 + 114)
    assert figures.flops * 8 == pytest.approx(figures.model_flops * passes / 3, rel=1e-6)
    step = steps.training(run, jax.devices()[:8])
    assert step.kinds.get("reference weights") == kinds.get("reference weights")
    # The program of a step does not read the reference that scores its samples before.
    assert step.resident == (0 if run.grpo is None else kinds["reference weights"])
    if run.grpo is not None:
        drawn = rollouts.Sampler(run, (None, None)).empty_batch()
        planned = aot.abstract_batch(run)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
            lambda x: (x.shape, x.dtype), planned
        )


def test_flops_of_all_chips_are_the_models():
    for name in ("h100x8", "v5e:4x4", "v5p:4x4x4"):
        run, slice_ = run_of(), chips.parse_chips(name)
        result = arithmetic.figures(run, slice_, parts_of())
        assert result.flops * slice_.count == pytest.approx(result.model_flops, rel=1e-6)
        assert result.tokens == 64 * (512 + 114)


def figures(collectives=(), flops=10**12, moved=10**9) -> Figures:
    """Figures of a step on 16 chips.

    Args:
      collectives: of the step.
      flops: of one chip.
      moved: bytes of HBM traffic of one chip.
    """
    slice_ = chips.parse_topology("v5e:4x4")
    memory = Memory({}, 0, slice_.chip.memory)
    sizes = {"data": 16, "fsdp": 1, "tensor": 1}
    known = ("training step", "compiled", slice_, sizes, memory, 1000, 8 * 10**12)
    return Figures(*known, flops=flops, moved=moved, collectives=tuple(collectives))


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("seconds", [1e-6, 1e-3, 1.0])
def test_a_step_takes_between_its_longest_part_and_the_sum(seconds, overlapped):
    wait = Collective("all-reduce", 100, 16, ("data",), 3, seconds, overlapped)
    result = estimate(figures([wait]), price=3.6)
    assert result.overlapped <= result.scheduled <= result.summed
    assert result.interconnect == pytest.approx(3 * seconds)
    longest = max(result.compute, result.memory, result.interconnect)
    assert result.overlapped == longest
    alone = max(result.compute, result.memory) + result.interconnect
    assert result.scheduled == pytest.approx(longest if overlapped else alone)
    assert result.mfu <= result.mfu_bound <= 1
    # 16 chips at 3.6 an hour: 16 thousandths for every second.
    assert result.cost == pytest.approx(1e9 / 1000 * result.scheduled * 16 * 0.001)


def test_no_price_no_cost_and_a_chip_at_its_peak_is_used_whole():
    result = estimate(figures(flops=197 * 10**12 // 10, moved=0))
    assert result.cost is None and result.compute == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name, spans, members, links",
    [
        ("v5e:4x4", (4, 1), 4, 1),  # a row without wrap: one link at its ends
        ("v5e:16x16", (16, 1), 16, 2),  # a ring: both directions
        ("v5e:16x16", (16, 16), 256, 4),
        ("v5e:16x16", (16, 16), 128, 2),  # two groups share the links of all
        ("v5p:4x4x4", (4, 4, 4), 64, 6),  # a cube wraps along every side
        ("v5p:2x2x4", (2, 2, 4), 16, 3),  # less than a cube does not
    ],
)
def test_groups_have_the_links_of_their_sides(name, spans, members, links):
    slice_ = chips.parse_topology(name)
    result = chips.ring_bandwidth(slice_, spans, members)
    assert result == pytest.approx(links * slice_.chip.link)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v9:4x4", "h100:2x2", "v5e:4", "v5e:4x4x4x4", "v5e:4 x4", "Ⅴ5e:4x4"]
)
def test_a_slice_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="v5e:4x4"):
        chips.parse_topology(name)


@pytest.mark.parametrize("name", ["", "h100", "h100x", "h100x0", "b9x8", "x8", "h100x-1"])
def test_chips_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="h100x8"):
        chips.parse_chips(name)


@pytest.mark.parametrize("count", [1, 2, 6, 8, 12, 16, 256])
def test_a_search_tries_every_mesh_once(count):
    result = searching.meshes(count)
    brute = [s for s in itertools.product(range(1, count + 1), repeat=2) if count % (s[0] * s[1])]
    assert len(result) == count * count - len(brute)
    assert all(math.prod(mesh.values()) == count for mesh in result)
    assert len({tuple(mesh.values()) for mesh in result}) == len(result)


def test_what_is_searched_can_be_run_and_the_fastest_comes_first():
    slice_ = chips.parse_topology("v5e:2x4")
    ways = searching.candidates(run_of(), slice_)
    assert len(ways) > 30
    seconds = [way.seconds for way in ways]
    assert seconds == sorted(seconds)
    for way in ways:
        train, mesh = way.run.train, way.run.mesh
        assert train.batch_size % (train.microbatches * mesh.data * mesh.fsdp) == 0
    files = ["configs/runs/pretrain.gin"]
    flags = [word.removeprefix("--gin.") for word in ways[3].bindings.split()]
    again = gin_file.load_run(files, [*SMALL, "BATCH_SIZE=64", *flags])
    assert again == ways[3].run


class Stub:
    """Compiles by arithmetic, and stops where it is set to."""

    def __init__(self, slice_, stop=None):
        self.slice, self.stop, self.runs = slice_, stop, []

    def __call__(self, run):
        if len(self.runs) == self.stop:
            raise KeyboardInterrupt
        self.runs.append(run)
        return arithmetic.figures(run, self.slice, parts_of())


def test_a_search_that_was_ended_goes_on_where_it_was(tmp_path):
    slice_, kept = chips.parse_topology("v5e:2x4"), tmp_path / "of" / "plans.json"
    ways = searching.candidates(run_of(), slice_)
    quiet = report.Console(quiet=True)
    first = Stub(slice_, stop=2)
    with pytest.raises(KeyboardInterrupt):
        searching.search(ways, 4, first, kept, quiet)
    second = Stub(slice_)
    result = searching.search(ways, 4, second, kept, quiet)
    assert len(first.runs) == 2 and len(second.runs) == 2 and len(result) == 4
    assert [way.run for way in ways[:4]] == first.runs + second.runs
    third = Stub(slice_)
    assert searching.search(ways, 4, third, kept, quiet) == result and not third.runs
    longer = dataclasses.replace(ways[0].run, seed=1)
    other = searching.Candidate(longer, ways[0].figures)
    assert searching.identity(other) != searching.identity(ways[0])


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"a": {}}', '{"a": 3}', "\x00\xff"])
def test_a_file_that_holds_no_plans_is_named_and_left(tmp_path, text):
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="plans.json is not a file of plans"):
        searching.read_results(path)
    assert path.read_text() == text
