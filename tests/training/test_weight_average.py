# SPDX-License-Identifier: Apache-2.0
"""Laws of Train.average: the copy that a step moves, what it costs, how it is saved and read."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch
from test_training_parts import CROSS
from test_training_run import make_run as make_whole_run
from test_training_step import WEIGHTS, initial, make_run

from t5x_lite import average, config, model, sharding
from t5x_lite.checkpoints import averaging, checkpoint_io, train_state
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.train_state import TrainState, tree_bytes
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.checkpoints.weights import layer_numbers
from t5x_lite.config import gin_file
from t5x_lite.training import loop, optimizer, schedules, setup, step, weight_average
from t5x_lite.training.reporting import overview

UNIFORM = config.WeightAverage("uniform", last=3, every=2)
EXPONENTIAL = config.WeightAverage("exponential", decay=0.9, warmup=4)


def walk(rule: config.WeightAverage, weights: list, skipped: tuple[int, ...] = (), steps: int = 8):
    """Copies before and after each step.

    Args:
      rule: the kind of average.
      weights: initial weights, and those after steps 1, 2 ...
      skipped: steps whose gradient was not finite.
      steps: length of the run.
    """
    cfg = config.Train(steps=steps, batch_size=1, average=rule)
    zero, copy = jnp.int32(0), {"w": jnp.float32(weights[0])}
    state, copies = TrainState(zero, None, None, zero, zero), []
    for done, weight in enumerate(weights[1:], 1):
        finite = jnp.bool_(done not in skipped)
        state = state._replace(step=jnp.int32(done), skipped=state.skipped + ~finite)
        moved = weight_average.move_average(cfg, copy, {"w": jnp.float32(weight)}, state, finite)
        copies.append((np.asarray(copy["w"]), np.asarray(moved["w"])))
        copy = moved
    return copies


def drawn(count: int = 9):
    draw = np.random.default_rng(0)
    return np.cumsum(draw.normal(size=(count, 50)), 0).astype(np.float32)


def assert_moved(moved, before, weights, share):
    """The copy is that of float64 but for half a unit of each of its float32 operations.

    Args:
      moved: the copy after a step.
      before: the copy before it.
      weights: weights after it.
      share: how far the copy moves to them.
    """
    delta = weights.astype(np.float64) - before
    exact = before + share * delta
    # The difference, the share and their product are rounded, and then the sum.
    bound = 2.0**-24 * (np.abs(exact) + 3.001 * share * np.abs(delta))
    assert np.all(np.abs(moved - exact) <= bound + 1e-30)


def test_the_uniform_copy_is_the_mean_of_the_weights_of_its_window():
    weights = drawn()
    copies = walk(UNIFORM, list(weights))
    # Steps 4, 6 and 8 of 8; until step 4 the copy is the weights.
    for done in (1, 2, 3, 4):
        np.testing.assert_array_equal(copies[done - 1][1], weights[done])
    for done in (5, 7):
        np.testing.assert_array_equal(*copies[done - 1])
    for done, count in ((6, 2), (8, 3)):
        before, moved = copies[done - 1]
        assert_moved(moved, before, weights[done], 1 / count)
    mean = weights[[4, 6, 8]].astype(np.float64).mean(0)
    np.testing.assert_allclose(copies[-1][1], mean, rtol=1e-6, atol=1e-6)


def test_the_exponential_copy_follows_its_recursion_and_skips_skipped_steps():
    weights = drawn()
    weights[5] = weights[4]  # a skipped step changes no weight
    copies = walk(EXPONENTIAL, list(weights), skipped=(5,))
    updates = 0
    for done in range(1, 9):
        before, moved = copies[done - 1]
        if done == 5:
            np.testing.assert_array_equal(before, moved)
            continue
        decay = min(0.9, (1 + updates) / (4 + updates))
        assert_moved(moved, before, weights[done], 1 - decay)
        updates += 1


@pytest.mark.parametrize("rule", [UNIFORM, EXPONENTIAL], ids=["uniform", "exponential"])
def test_the_copy_of_weights_that_stay_has_their_bits(rule):
    weight = drawn(1)[0]
    for _, moved in walk(rule, [weight] * 9):
        np.testing.assert_array_equal(moved, weight)


def test_without_warm_up_the_decay_holds_from_the_first_update_on():
    rule = dataclasses.replace(EXPONENTIAL, warmup=0)
    weights = drawn(2)
    assert_moved(walk(rule, list(weights))[0][1], *weights, 1 - 0.9)


def with_average(run: config.Run, rule=EXPONENTIAL) -> config.Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, average=rule))


def shapes_of(run: config.Run) -> TrainState:
    sharding.use_mesh(run.mesh)
    return setup.state_shapes(run, setup.make_update(run)[1])


def test_the_copy_is_of_what_trains_and_placed_as_that():
    lora = config.Lora(rank=2, alpha=4.0)
    adapted = dataclasses.replace(
        make_run(), lora=lora, checkpoint=config.Checkpoint(initial="unused")
    )
    adapted = shapes_of(with_average(adapted))
    assert flatten_tree(adapted.average).keys() == flatten_tree(adapted.params).keys()
    assert {name.rpartition(".")[2] for name in flatten_tree(adapted.average)} == {"a", "b"}
    frozen = make_run(param_groups=(config.ParamGroup(CROSS, rate=0),), mesh=WEIGHTS)
    shapes = shapes_of(with_average(frozen))
    params = flatten_tree(shapes.params)
    kept = {name for name in params if "cross_attention" not in name}
    assert flatten_tree(shapes.average).keys() == kept and len(kept) < len(params)
    for name, leaf in flatten_tree(shapes.average).items():
        assert leaf.sharding == params[name].sharding and leaf.shape == params[name].shape
    assert shapes_of(frozen).average is None


def compile_step(run: config.Run):
    """The compiled step, the state before it, and a batch."""
    weights = initial("encoder_decoder")
    sharding.use_mesh(run.mesh)
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    shapes = setup.state_shapes(run, update)

    def place(weight, shape):
        return jax.device_put(weight, shape.sharding)

    params = jax.tree.map(place, weights, shapes.params)
    state = train_state.begin_state(params, update, weight_average.averaged_weights(run))
    batch = sharding.place_batch(toy_batch("encoder_decoder", rows=16))
    compiled = step.make_step(run, update, schedule, axes).lower(state, batch).compile()
    return compiled, state, batch, shapes


@pytest.mark.slow
def test_the_copy_costs_its_bytes_and_changes_nothing_else():
    run = make_run(mesh=WEIGHTS)
    (before, *rest), (after, state, batch, shapes) = map(compile_step, (run, with_average(run)))
    memory, more = before.memory_analysis(), after.memory_analysis()
    bytes_of_copy = train_state.bytes_per_device(shapes.average)
    assert bytes_of_copy == train_state.bytes_per_device(shapes.params)
    assert more.argument_size_in_bytes - memory.argument_size_in_bytes == bytes_of_copy
    # A table of pointers to the outputs, eight bytes each, is among them.
    pointers = 8 * len(jax.tree.leaves(shapes.average))
    grown = more.output_size_in_bytes - memory.output_size_in_bytes
    assert bytes_of_copy <= grown <= bytes_of_copy + pointers
    assert more.temp_size_in_bytes <= memory.temp_size_in_bytes + pointers
    one, _ = before(rest[0], rest[1])
    other, _ = after(state, batch)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    jax.tree.map(np.testing.assert_array_equal, one.optimizer, other.optimizer)
    placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, other.average, other.params)
    assert all(jax.tree.leaves(placed))


def window_run(path: Path, name: str) -> config.Run:
    """A run of six steps whose copy is the mean of the last three, all of which are saved."""
    run = make_whole_run(
        path,
        path / name,
        steps=6,
        evaluate=config.Evaluate(every=4, examples=4, batches=1, batch_size=8),
        checkpoint=config.Checkpoint(every=1, keep=9, metric="average/loss"),
    )
    return with_average(run, config.WeightAverage("uniform", last=3, every=1, evaluate=True))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("averaged")
    run = window_run(path, "run")
    return run, loop.train(run)


def read_whole(source) -> dict[str, np.ndarray]:
    return {
        path: np.stack([source.read(path, layer) for layer in layer_numbers(leaf)])
        for path, leaf in source.leaves.items()
    }


@pytest.mark.slow
def test_the_copy_of_a_run_is_the_mean_of_its_checkpoints_and_is_evaluated(averaged, tmp_path):
    run, report = averaged
    source = f"--from={run.model_dir}"
    assert average.main([source, "--copy", f"--to={tmp_path / 'copy'}"]) == 0
    assert average.main([source, "--steps=4,5,6", f"--to={tmp_path / 'mean'}"]) == 0
    assert average.main([source, "--last=3", f"--to={tmp_path / 'last'}"]) == 0
    copy, mean, last = (
        read_whole(open_checkpoint(tmp_path / name).weights()) for name in ("copy", "mean", "last")
    )
    for path, array in mean.items():
        np.testing.assert_array_equal(array, last[path])
        np.testing.assert_allclose(copy[path], array, rtol=1e-6, atol=1e-7)
    saved = read_whole(averaging.select_weights(open_checkpoint(run.model_dir), averaged=True))
    jax.tree.map(np.testing.assert_array_equal, copy, saved)
    assert json.loads((tmp_path / "copy/average.json").read_text())["averaged_copies"]
    # What the run measured is what the copy has.
    assert report["average/loss"] != report["loss"]
    written = gin_file.from_text((tmp_path / "copy/config.gin").read_text())
    loaded = open_checkpoint(tmp_path / "copy").load()
    evaluated = setup.make_evaluator(written).losses(loaded.params)
    np.testing.assert_allclose(evaluated["loss"], report["average/loss"], rtol=1e-6)
    predictions = {path.name for path in Path(run.model_dir, "predictions").iterdir()}
    assert {"validation-6.jsonl", "average-validation-6.jsonl"} <= predictions
    metadata = checkpoint_io.read_metadata(Path(run.model_dir, "checkpoints/4"))
    # The window begins with step 4, where the copy is the weights.
    assert metadata.metrics["average/loss"] == metadata.metrics["loss"]


@pytest.mark.slow
def test_a_resumed_copy_has_the_bits_of_an_uninterrupted_one(averaged, tmp_path):
    run, report = averaged
    shutil.copytree(run.model_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    (tmp_path / "run/report.json").unlink()
    resumed = dataclasses.replace(run, model_dir=str(tmp_path / "run"))
    again = loop.train(resumed)
    assert again["average/loss"] == report["average/loss"] and again["loss"] == report["loss"]
    digests = [
        checkpoint_io.read_metadata(Path(folder, "checkpoints/6")).arrays
        for folder in (run.model_dir, tmp_path / "run")
    ]
    assert digests[0] == digests[1]
    assert any(name.startswith("average.") for name in digests[0]["rest"])


def test_a_run_that_becomes_longer_begins_its_window_anew(monkeypatch):
    def at(done: int, steps: int):
        train = config.Train(steps=steps, batch_size=8, average=UNIFORM)
        run = dataclasses.replace(make_run(), train=train)
        before = dataclasses.replace(run, train=dataclasses.replace(train, steps=8))
        note = types.SimpleNamespace(step=done, config=gin_file.to_text(before))
        params = {"w": jnp.full(2, 7.0)}
        state = TrainState(jnp.int32(done), params, None, 0, 0, {"w": jnp.zeros(2)})
        return weight_average.check_window(run, state, note).average["w"]

    monkeypatch.setattr(weight_average, "averaged_weights", lambda run: lambda tree: tree)
    assert at(8, steps=8)[0] == 0 and at(6, steps=8)[0] == 0  # the same run goes on
    assert at(8, steps=12)[0] == 7 and at(8, steps=20)[0] == 7  # a later window
    with pytest.raises(ValueError, match=r"begins with step 6, .* Bind TRAIN_STEPS = 8, or 12 or"):
        at(8, steps=10)


def test_a_window_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="reach further back than the run's 4 steps"):
        config.Train(steps=4, batch_size=1, average=UNIFORM)
    assert config.Train(steps=5, batch_size=1, average=UNIFORM).average.first_step(5) == 1


def test_the_copy_is_a_part_of_the_memory_that_a_run_needs():
    run = with_average(make_run())
    shapes = shapes_of(run)
    parts = overview.state_bytes(run, shapes)
    assert parts["averaged copy"] == parts["weights"] == tree_bytes(shapes.params)
    assert "averaged copy" in overview.bytes_text(run, shapes)
