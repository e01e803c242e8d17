# SPDX-License-Identifier: Apache-2.0
"""Laws of training heads: what each is asked for, on which mesh, and what a frozen trunk keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch, toy_model
from test_training_step import CUBE, DATA, assert_same

from t5x_lite import config, model, sharding
from t5x_lite.training import optimizer, schedules, state, step

SHAPES = ("stern", "block_diagonal", "medusa", "hydra")


def headed(shape="block_diagonal", layout="pair", block=4, **changes) -> config.Model:
    return toy_model(layout, blockwise=config.Heads(block, shape), layers=1, **changes)


def make_run(cfg: config.Model, loss=None, **train) -> config.Run:
    made = config.Train(
        steps=10, batch_size=16, heads=loss or config.HeadLoss("all"), z_loss=0.0, **train
    )
    return config.Run(
        model_dir="unused",
        model=cfg,
        data=config.Data(task="unused", lengths={"inputs": 12, "targets": 12}),
        train=made,
        schedule=config.Schedule("constant", 0.1),
        optimizer=config.Optimizer("sgd"),
    )


def lively(cfg: config.Model, seed=1):
    """Weights with which no head is the identity any more."""
    sharding.use_mesh(DATA)
    draw = np.random.default_rng(seed)
    make = lambda shape: (0.3 * draw.normal(size=shape.shape)).astype(np.float32)
    return jax.tree.map(make, model.shapes(cfg))


def take_steps(run: config.Run, weights, batches, mesh=DATA):
    """The state after a step on each batch, and the metrics of all, on the host."""
    sharding.use_mesh(mesh)
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make(run.optimizer, schedule, axes, run.train.parts)
    advance = step.make(run, update, schedule, axes)
    place = lambda weight, shape: jax.device_put(weight, shape.sharding)
    now = state.begin(jax.tree.map(place, weights, model.shapes(run.model)), update)
    told = []
    for batch in batches:
        now, metrics = advance(now, sharding.place_batch(batch))
        told.append(metrics)
    return jax.device_get(now), jax.device_get(told)


def sums_of(run: config.Run, weights, batch, *keys):
    """What a step sums up, for each key, without its gradient; and the hidden states."""
    sharding.use_mesh(DATA)
    transformer = model.Transformer(run.model, remat="none")

    @jax.jit
    def found(params, rows, key):
        hidden = transformer.apply({"params": params}, rows, method="hidden")
        return step.token_sums(transformer, run, params, rows, step.Moment(key), None), hidden

    placed = sharding.place_batch(batch)
    return jax.device_get([found(weights, placed, key) for key in keys or (None,)])


def reference(cfg: config.Model, weights, hidden, batch, table):
    """Objective and right guesses of every head, target by target, in float64."""
    own = {name: np.asarray(weight, np.float64) for name, weight in weights["heads"].items()}
    sums = np.zeros((cfg.blockwise.count, 2))
    counts = np.zeros(cfg.blockwise.count)
    for row, place in np.ndindex(batch.targets.shape):
        for head in range(cfg.blockwise.count):
            wanted = place + head + 1
            if wanted >= batch.targets.shape[1]:
                continue
            same = batch.target_segments[row, wanted] == batch.target_segments[row, place]
            if not same or not batch.loss_weights[row, wanted]:
                continue
            since = batch.targets[row, place:wanted]
            x = guess(cfg, own, hidden[row, place], head, table["embedding"][since])
            logits = x @ table["head"]
            target = batch.targets[row, wanted]
            sums[head, 0] += np.log(np.exp(logits).sum()) - logits[target]
            sums[head, 1] += logits[target] >= logits.max()
            counts[head] += 1
    return sums, counts


def guess(cfg, own, x, head, since):
    """What head's logits are read from, from its own words in the papers."""
    silu = lambda y: y / (1 + np.exp(-y))
    if cfg.blockwise.shape == "stern":
        units = np.maximum(np.concatenate([x @ part for part in own["inward"]]), 0)
        width = own["outward"].shape[-1]
        return x + units @ own["outward"][:, :, head].reshape(-1, width)
    if cfg.blockwise.shape == "block_diagonal":
        return x + np.maximum(x @ own["inward"][head], 0) @ own["outward"][head]
    y = x @ own["square"][head]
    if cfg.blockwise.shape == "hydra":
        first = sum(range(1, head + 1))
        y = y + sum(e @ own["tokens"][first + j] for j, e in enumerate(since))
    return x + silu(y)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_objective_is_that_of_a_loop_over_targets(shape):
    cfg = headed(shape)
    weights, batch = lively(cfg), toy_batch("pair", rows=16)
    loss = config.HeadLoss("all", own=2.0, decay=0.5)
    ((told, hidden),) = sums_of(make_run(cfg, loss), weights, batch)
    table = {name: np.asarray(weights[name], np.float64) for name in ("embedding", "head")}
    sums, counts = reference(cfg, weights, hidden.astype(np.float64), batch, table)
    factors = np.array([2.0, 1.0, 0.5, 0.25]) / 3.75
    expected = factors[0] * told.loss + factors[1:] @ sums[:, 0]
    np.testing.assert_allclose(told.objective, expected, rtol=1e-5)
    assert told.guessed == sums[:, 1].sum()
    assert told.guesses == counts.sum()


def test_a_new_head_says_what_the_model_says():
    sharding.use_mesh(DATA)
    for shape in ("block_diagonal", "hydra"):
        cfg = headed(shape)
        params = model.initialize(cfg, jax.random.key(0))
        hidden = jax.random.normal(jax.random.key(1), (8, 3, 16))
        hidden = jax.device_put(hidden, sharding.named("batch length width"))
        since = jnp.ones((8, 3, 1), jnp.int32, out_sharding=sharding.spec("batch length whole"))
        apply = functools.partial(model.Transformer(cfg).apply, {"params": params})
        first = apply(hidden, slice(0, 1), since, method="guess")[:, :, 0]
        np.testing.assert_array_equal(first, hidden)


@pytest.mark.parametrize("heads", ["all", "random"])
def test_a_frozen_trunk_keeps_every_bit_and_its_heads_learn(heads):
    cfg = headed(dropout=0.1)
    parts = (config.Part(("heads.*",)), config.Part(("*",), rate=0))
    run = make_run(cfg, config.HeadLoss(heads, own=0), parts=parts)
    weights, batch = lively(cfg), toy_batch("pair", rows=16)
    after, told = take_steps(run, weights, [batch] * 6)
    for name, part in weights.items():
        same = [np.array_equal(a, b) for a, b in pairs(part, after.params[name])]
        assert not any(same) if name == "heads" else all(same)
    if heads == "all":
        assert told[-1].sums.objective < told[0].sums.objective


def pairs(tree, other):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


def test_without_heads_in_the_objective_the_trunk_trains_as_ever():
    """own alone counts: the trunk's gradient is that of a model without heads."""
    cfg, plain = headed(), toy_model("pair", layers=1)
    weights = lively(cfg)
    batch = toy_batch("pair", rows=16)
    loss = config.HeadLoss("all", own=1e9)
    with_heads, (told,) = take_steps(make_run(cfg, loss), weights, [batch])
    trunk = {name: part for name, part in weights.items() if name != "heads"}
    without, (said,) = take_steps(make_run(plain), trunk, [batch])
    params = {name: part for name, part in with_heads.params.items() if name != "heads"}
    assert_same(params, without.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told.sums.loss, said.sums.loss, rtol=1e-6)


@pytest.mark.parametrize("shape", ["stern", "hydra"])
def test_a_mesh_changes_neither_loss_nor_weights(shape):
    cfg = headed(shape)
    run = make_run(cfg)
    weights, batches = lively(cfg), [toy_batch("pair", rows=16, seed=seed) for seed in range(2)]
    expected, plain = take_steps(run, weights, batches)
    found, split = take_steps(run, weights, batches, CUBE)
    assert_same(found.params, expected.params, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(split, plain, strict=True):
        np.testing.assert_allclose(ours.sums.objective, theirs.sums.objective, rtol=1e-5)


def test_many_microbatches_equal_one():
    cfg = headed("hydra", layout="joined")
    batch = toy_batch("joined", rows=16)
    one, (told,) = take_steps(make_run(cfg), lively(cfg), [batch])
    many, (said,) = take_steps(make_run(cfg, microbatches=2), lively(cfg), [batch])
    assert_same(many.params, one.params, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said.sums.objective, told.sums.objective, rtol=1e-5)
    assert said.sums.guesses == told.sums.guesses


def test_the_random_head_stands_for_all_on_average():
    """Every head is drawn, by its factor: the mean of many draws is the sum of all."""
    cfg = headed()
    weights, batch = lively(cfg), toy_batch("pair", rows=16)
    loss = config.HeadLoss("random", own=1.0, decay=0.5)
    keys = list(jax.random.split(jax.random.key(0), 200))
    drawn = [sums.objective for sums, _ in sums_of(make_run(cfg, loss), weights, batch, *keys)]
    every = dataclasses.replace(loss, heads="all")
    ((whole, _),) = sums_of(make_run(cfg, every), weights, batch)
    assert len(np.unique(np.round(drawn, 3))) == cfg.blockwise.count
    assert abs(np.mean(drawn) - whole.objective) < 4 * np.std(drawn) / len(drawn) ** 0.5


def test_pieces_and_whole_logits_give_the_same():
    cfg = headed("stern")
    weights, batch = lively(cfg), toy_batch("pair", rows=16)
    runs = [make_run(cfg, cross_entropy=kind) for kind in ("pieces", "whole")]
    (pieces, _), (whole, _) = (sums_of(run, weights, batch)[0] for run in runs)
    assert_same(pieces, whole, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: config.Heads(1), "Heads.block must be at least 2"),
        (lambda: config.Heads(4, "medusa", mlp=8), "Heads.mlp is for stern"),
        (lambda: config.Heads(4, "eagle"), "Heads.shape must be one of"),
        (lambda: config.HeadLoss(decay=0.0), "HeadLoss.decay"),
        (lambda: toy_model("aligned", blockwise=config.Heads(2)), "writes nothing"),
        (lambda: model.initialize(headed_mlp(3), jax.random.key(0)), "Model.blockwise.mlp=3"),
    ],
)
def test_what_cannot_be_says_why(make, message):
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=message):
        make()


def headed_mlp(mlp: int) -> config.Model:
    return toy_model("pair", blockwise=config.Heads(4, mlp=mlp))
