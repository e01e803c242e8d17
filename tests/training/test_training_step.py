# SPDX-License-Identifier: Apache-2.0
"""Laws of a training step, with the real model on eight virtual devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES, mark_exhaustive, toy_batch, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import train_state
from t5x_lite.training import optimizer, schedules, step
from t5x_lite.training.reporting import metrics as meter

DATA = config.Mesh()
CUBE = config.Mesh(data=2, fsdp=2, tensor=2)
WEIGHTS = config.Mesh(data=1, fsdp=4, tensor=2)
LAYOUTS = ["encoder_decoder", "decoder_only", "encoder_only"]
TOYS = {layout: toy_model(layout) for layout in LAYOUTS}
TOYS["bart"] = toy_model("encoder_decoder", **FAMILIES["bart"])
# A step knows no layout: an encoder-decoder has all there is to divide.
WHOLE = mark_exhaustive(LAYOUTS, kept=["encoder_decoder"])
PAIRS = mark_exhaustive(["encoder_decoder", "bart"], kept=["encoder_decoder"])


def make_run(name="encoder_decoder", dropout=0.0, optimizer="sgd", mesh=DATA, **train):
    cfg = dataclasses.replace(TOYS[name], dropout=dropout)
    return config.Run(
        model_dir="unused",
        model=cfg,
        data=config.Data(task="unused", lengths={"inputs": 12, "targets": 12}),
        train=config.Train(steps=10, batch_size=16, **train),
        schedule=config.Schedule("constant", 0.1),
        optimizer=config.Optimizer(optimizer, options={}),
        mesh=mesh,
    )


@functools.cache
def initial(name: str):
    """New weights on the host; dropout and mesh do not change them. Biases begin away from 0."""
    sharding.use_mesh(DATA)
    draw, weights = np.random.default_rng(0), model.initialize(TOYS[name], jax.random.key(0))
    weights = jax.device_get(weights)
    if "logits_bias" in weights:
        weights["logits_bias"] = draw.normal(size=64).astype(np.float32)
    return weights


KEPT = {}


def make_update_and_step(run: config.Run):
    """Optimizer and jitted step of a run, made once."""
    if repr(run) not in KEPT:
        axes = model.axes(run.model)
        schedule = schedules.learning_rate(run.schedule, run.train.steps)
        update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
        KEPT[repr(run)] = update, step.make_step(run, update, schedule, axes)
    return KEPT[repr(run)]


def take_steps(run: config.Run, batches: list[Batch]):
    """The state after one step on each batch, and the metrics of all, on the host."""
    # First, as it has a mesh of its own.
    weights = initial("bart" if run.model.logits_bias else run.model.layout)
    sharding.use_mesh(run.mesh)
    update, advance = make_update_and_step(run)
    shapes = model.shapes(run.model)

    def place(weight, shape):
        return jax.device_put(weight, shape.sharding)

    now = train_state.begin_state(jax.tree.map(place, weights, shapes), update)
    history = []
    for batch in batches:
        placed = sharding.place_batch(batch)
        with jax.transfer_guard("disallow"):
            now, metrics = advance(now, placed)
        history.append(metrics)
    return jax.device_get(now), jax.device_get(history)


def losses_of(history) -> np.ndarray:
    return np.array([metrics.sums.loss / metrics.sums.weights for metrics in history])


def assert_same(tree, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("layout", WHOLE)
def test_many_microbatches_equal_one(layout):
    batch = toy_batch(layout, rows=16)
    # Rows without targets make the microbatches unequal in tokens.
    batch.loss_weights[:5, 3:] = 0
    one, history = take_steps(make_run(layout), [batch])
    many, many_history = take_steps(make_run(layout, microbatches=2), [batch])
    assert_same(history[0].sums, many_history[0].sums, rtol=1e-5)
    assert_same(one.params, many.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", WHOLE)
def test_every_mesh_gives_the_same_losses(layout):
    batches = [toy_batch(layout, rows=16, seed=seed) for seed in range(3)]
    _, history = take_steps(make_run(layout), batches)
    _, split = take_steps(make_run(layout, mesh=CUBE), batches)
    np.testing.assert_allclose(losses_of(history), losses_of(split), rtol=1e-5)


@pytest.mark.slow
def test_every_mesh_gives_the_same_losses_with_adafactor():
    batches = [toy_batch("encoder_decoder", rows=16, seed=seed) for seed in range(3)]
    _, history = take_steps(make_run(optimizer="adafactor"), batches)
    _, split = take_steps(make_run(optimizer="adafactor", mesh=WEIGHTS), batches)
    np.testing.assert_allclose(losses_of(history), losses_of(split), rtol=1e-5)


def unpacked(batch: Batch) -> Batch:
    """Every example of a batch in a row of its own."""
    rows = []
    for row in range(len(batch.targets)):
        for segment in (1, 2):
            one = {}
            for prefix, names in (
                ("target", ("targets", "loss_weights", "prefix")),
                ("input", ("inputs",)),
            ):
                segments = getattr(batch, f"{prefix}_segments")
                if segments is None:
                    continue
                inside = segments[row] == segment
                for name in (*names, f"{prefix}_positions", f"{prefix}_segments"):
                    if getattr(batch, name) is None:
                        continue
                    values = getattr(batch, name)[row][inside]
                    values = np.ones_like(values) if name.endswith("segments") else values
                    one[name] = np.pad(values, (0, len(inside) - len(values)))
            rows.append(one)
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_equals_unpacked(layout):
    batch = toy_batch(layout, rows=8)
    padding = jax.tree.map(np.zeros_like, batch)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), batch, padding)
    packed, history = take_steps(make_run(layout), [both])
    alone, alone_history = take_steps(make_run(layout), [unpacked(batch)])
    assert_same(history[0].sums, alone_history[0].sums, rtol=1e-5)
    assert_same(packed.params, alone.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_remat_changes_nothing_but_memory(name):
    batch = toy_batch("encoder_decoder", rows=16)
    plain, _ = take_steps(make_run(name, remat="none"), [batch])
    again, _ = take_steps(make_run(name, remat="full"), [batch])
    assert_same(plain.params, again.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", mark_exhaustive([DATA, CUBE], kept=[CUBE]), ids=["data", "cube"])
def test_a_bias_of_logits_is_trained_by_chunks_as_by_all_logits(mesh):
    batch = toy_batch("encoder_decoder", rows=16)
    smooth = dict(label_smoothing=0.1, z_loss=1e-2, mesh=mesh)
    runs = [make_run("bart", cross_entropy=kind, **smooth) for kind in ("full", "chunked")]
    (full, history), (chunked, other) = (take_steps(run, [batch]) for run in runs)
    assert_same(history[0].sums, other[0].sums, rtol=1e-5)
    assert_same(full.params, chunked.params, rtol=1e-5, atol=1e-6)
    moved = np.abs(full.params["logits_bias"] - initial("bart")["logits_bias"])
    assert moved.max() > 1e-3


@pytest.mark.slow
def test_a_step_without_finite_gradient_changes_only_counts():
    batch = toy_batch("encoder_decoder", rows=16)
    broken = batch._replace(loss_weights=np.where(batch.loss_weights, np.float32(np.inf), 0))
    run = make_run(optimizer="adamw")
    before, _ = take_steps(run, [batch])
    after, history = take_steps(run, [batch, broken, broken])
    assert_same(before.params, after.params, rtol=0)
    assert_same(before.optimizer, after.optimizer, rtol=0)
    assert (after.step, after.skipped, after.consecutive) == (3, 2, 2)
    assert [bool(metrics.skipped) for metrics in history] == [False, True, True]
    recovered, _ = take_steps(run, [broken, batch])
    assert (recovered.skipped, recovered.consecutive) == (1, 0)
    assert_same(before.params, recovered.params, rtol=1e-6)


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
    batch = toy_batch("encoder_decoder", rows=16)
    run = dataclasses.replace(
        make_run(dropout=0.5), schedule=config.Schedule("constant", peak=1e-12)
    )
    _, first = take_steps(run, [batch, batch])
    _, second = take_steps(run, [batch, batch])
    np.testing.assert_array_equal(losses_of(first), losses_of(second))
    assert losses_of(first)[0] != losses_of(first)[1]
    _, other = take_steps(dataclasses.replace(run, mesh=CUBE), [batch, batch])
    np.testing.assert_allclose(losses_of(first), losses_of(other), rtol=1e-5)


def test_optimizer_state_is_split_as_its_weights_are():
    run = make_run(mesh=WEIGHTS, optimizer="adafactor")
    cfg = dataclasses.replace(run.optimizer, options={"min_dim_factored": 8})
    sharding.use_mesh(run.mesh)
    schedule = schedules.learning_rate(run.schedule, 10)
    update = optimizer.make_optimizer(cfg, schedule, model.axes(run.model))
    shapes = train_state.state_shapes(model.shapes(run.model), update)

    def place(weight, shape):
        return jax.device_put(weight, shape.sharding)

    now = train_state.begin_state(
        jax.tree.map(place, initial("encoder_decoder"), shapes.params), update
    )
    same = jax.tree.map(lambda array, shape: array.sharding == shape.sharding, now, shapes)
    assert all(jax.tree.leaves(same))
    moment = now.optimizer[0].moments["embedding"]
    assert moment.rows.sharding.spec == sharding.spec("layers embed")
    assert moment.columns.sharding.spec == sharding.spec("vocab layers")
    assert train_state.bytes_per_device(shapes) == sum(
        part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(now)
    )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_step_without_finite_update_changes_only_counts(value):
    def update(gradient, state, weights):
        broken = jax.tree.map(lambda leaf: leaf.at[-1].set(value), gradient["b"])
        return gradient | {"b": broken}, state + 1

    rule = optax.GradientTransformation(lambda weights: jnp.zeros(()), update)
    weights = {"a": jnp.arange(4.0), "b": jnp.ones(3)}
    before = train_state.begin_state(weights, rule)
    every = step.Selection((), {"a": "norm", "b": "norm"})
    gradient = {"a": jnp.ones(4), "b": jnp.ones(3)}
    after, finite = step.apply_gradient(rule, every, before, gradient, jnp.bool_(True))
    assert not finite
    assert (after.step, after.skipped, after.consecutive) == (1, 1, 1)
    assert_same((after.params, after.optimizer), (before.params, before.optimizer), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(["sgd", "adafactor"], kept=["sgd"]))
def test_a_rate_that_overflows_changes_no_weight_and_stops_the_run(name):
    run = dataclasses.replace(
        make_run(),
        schedule=config.Schedule("constant", 3e38),
        optimizer=config.Optimizer(name, weight_decay=10.0),
    )
    after, history = take_steps(run, [toy_batch("encoder_decoder", rows=16)] * 2)
    assert_same(after.params, initial("encoder_decoder"), rtol=0)
    assert (after.step, after.skipped, after.consecutive) == (2, 2, 2)
    window = [(number, metrics) for number, metrics in enumerate(history)]
    with pytest.raises(meter.Diverged, match=r"but not the updates at a learning rate of 3e\+38"):
        meter.stop_if_diverged(window, history, most_skips=2)


def test_the_run_stops_and_says_where_the_gradient_is_not_finite():
    batch = toy_batch("encoder_decoder", rows=16)
    run = make_run()
    _, history = take_steps(run, [batch])
    squares = jax.tree.map(np.array, history[0].squares)
    squares["encoder"]["layers"]["mlp"]["up"][1] = np.nan
    assert meter.name_nonfinite(squares) == "encoder.layers.mlp.up (layers 1)"
    broken = history[0]._replace(squares=squares, consecutive=np.int32(3))
    meter.stop_if_diverged([(7, broken)], [broken], most_skips=4)
    with pytest.raises(meter.Diverged, match=r"step 7.*encoder\.layers\.mlp\.up \(layers 1\)"):
        meter.stop_if_diverged([(7, broken)], [broken], most_skips=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, microbatches",
    mark_exhaustive(
        [("encoder_decoder", 1), ("encoder_decoder", 2), ("bart", 1)],
        kept=[("encoder_decoder", 2)],
    ),
)
def test_a_step_in_bfloat16_is_near_the_one_in_float32(name, microbatches):
    exact = make_run(name, microbatches=microbatches)
    narrow = dataclasses.replace(exact, model=dataclasses.replace(exact.model, dtype="bfloat16"))
    runs = [take_steps(run, [toy_batch("encoder_decoder", rows=16)]) for run in (exact, narrow)]
    (reached, history), (near, near_history) = runs
    np.testing.assert_allclose(losses_of(near_history), losses_of(history), rtol=1e-2)

    def moved(new):
        return jax.tree.map(np.subtract, jax.device_get(new.params), initial(name))

    largest = max(map(np.linalg.norm, jax.tree.leaves(moved(reached))))
    for x, y in zip(*map(jax.tree.leaves, (moved(near), moved(reached))), strict=True):
        assert x.dtype == np.float32
        # The gradient of a key's bias is 0: what is left of it is rounding of larger numbers.
        assert np.linalg.norm(x - y) < 5e-2 * max(np.linalg.norm(y), 1e-2 * largest)
