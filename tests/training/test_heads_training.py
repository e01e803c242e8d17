# SPDX-License-Identifier: Apache-2.0
"""Laws of training heads: what each predicts, on which mesh, and what a frozen trunk keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model
from test_training_step import CUBE, DATA, assert_same

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.training import objective, optimizer, schedules, step
from t5x_lite.training.step_values import StepContext

SHAPES = ("stern", "block_diagonal", "medusa", "hydra")


def headed(shape="block_diagonal", layout="encoder_decoder", block=4, **changes) -> config.Model:
    return toy_model(layout, draft_heads=config.DraftHeads(block, shape), layers=1, **changes)


def make_run(cfg: config.Model, loss=None, **train) -> config.Run:
    train_config = config.Train(
        steps=10,
        batch_size=16,
        draft_head_loss=loss or config.DraftHeadLoss("all"),
        z_loss=0.0,
        **train,
    )
    return config.Run(
        model_dir="unused",
        model=cfg,
        data=config.Data(task="unused", lengths={"inputs": 12, "targets": 12}),
        train=train_config,
        schedule=config.Schedule("constant", 0.1),
        optimizer=config.Optimizer("sgd"),
    )


def lively(cfg: config.Model, seed=1):
    """Weights with which no head is the identity any more."""
    sharding.use_mesh(DATA)
    draw = np.random.default_rng(seed)

    def make(shape):
        return (0.3 * draw.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map(make, model.shapes(cfg))


def take_steps(run: config.Run, weights, batches, mesh=DATA):
    """The state after a step on each batch, and the metrics of all, on the host.

    Args:
      run: the run.
      weights: weights to begin with.
      batches: a batch for each step.
      mesh: the mesh.
    """
    sharding.use_mesh(mesh)
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    advance = step.make_step(run, update, schedule, axes)

    def place(weight, shape):
        return jax.device_put(weight, shape.sharding)

    now = train_state.begin_state(jax.tree.map(place, weights, model.shapes(run.model)), update)
    results = []
    for batch in batches:
        now, metrics = advance(now, sharding.place_batch(batch))
        results.append(metrics)
    return jax.device_get(now), jax.device_get(results)


def sums_of(run: config.Run, weights, batch, *keys):
    """LossSums of a step of a run on a batch for each of keys, without its gradient, with weights;
    and the hidden states."""
    sharding.use_mesh(DATA)
    transformer = model.Transformer(run.model, remat="none")

    @jax.jit
    def sums_and_hidden(params, rows, key):
        hidden = transformer.apply({"params": params}, rows, method=model.Transformer.hidden)
        return objective.token_sums(transformer, run, params, rows, StepContext(key), None), hidden

    placed = sharding.place_batch(batch)
    return jax.device_get([sums_and_hidden(weights, placed, key) for key in keys or (None,)])


def reference(cfg: config.Model, weights, hidden, batch, table):
    """Objective and right predictions of every head, target by target, in float64.

    Args:
      cfg: the model.
      weights: its weights.
      hidden: [b t d] hidden states.
      batch: the rows that were read.
      table: embedding and head, in float64.
    """
    head_weights = {
        name: np.asarray(weight, np.float64) for name, weight in weights["heads"].items()
    }
    sums = np.zeros((cfg.draft_heads.count, 2))
    counts = np.zeros(cfg.draft_heads.count)
    for row, place in np.ndindex(batch.targets.shape):
        for head in range(cfg.draft_heads.count):
            wanted = place + head + 1
            if wanted >= batch.targets.shape[1]:
                continue
            same = batch.target_segments[row, wanted] == batch.target_segments[row, place]
            if not same or not batch.loss_weights[row, wanted]:
                continue
            since = batch.targets[row, place:wanted]
            x = head_hidden(cfg, head_weights, hidden[row, place], head, table["embedding"][since])
            logits = x @ table["head"]
            target = batch.targets[row, wanted]
            sums[head, 0] += np.log(np.exp(logits).sum()) - logits[target]
            sums[head, 1] += logits[target] >= logits.max()
            counts[head] += 1
    return sums, counts


def head_hidden(cfg, head_weights, x, head, since):
    """Hidden state that the logits of a head are read from, as the papers define it.

    Args:
      cfg: the model.
      head_weights: weights of the heads, in float64.
      x: [d] hidden state of the trunk.
      head: number of the head.
      since: [head + 1, d] embeddings of the targets since then.
    """

    def silu(y):
        return y / (1 + np.exp(-y))

    if cfg.draft_heads.shape == "stern":
        units = np.maximum(np.concatenate([x @ part for part in head_weights["inward"]]), 0)
        width = head_weights["outward"].shape[-1]
        return x + units @ head_weights["outward"][:, :, head].reshape(-1, width)
    if cfg.draft_heads.shape == "block_diagonal":
        return x + np.maximum(x @ head_weights["inward"][head], 0) @ head_weights["outward"][head]
    y = x @ head_weights["square"][head]
    if cfg.draft_heads.shape == "hydra":
        first = sum(range(1, head + 1))
        y = y + sum(e @ head_weights["tokens"][first + j] for j, e in enumerate(since))
    return x + silu(y)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_objective_is_that_of_a_loop_over_targets(shape):
    cfg = headed(shape)
    weights, batch = lively(cfg), toy_batch("encoder_decoder", rows=16)
    loss = config.DraftHeadLoss("all", main_loss_weight=2.0, decay=0.5)
    ((results, hidden),) = sums_of(make_run(cfg, loss), weights, batch)
    table = {name: np.asarray(weights[name], np.float64) for name in ("embedding", "head")}
    sums, counts = reference(cfg, weights, hidden.astype(np.float64), batch, table)
    factors = np.array([2.0, 1.0, 0.5, 0.25]) / 3.75
    expected = factors[0] * results.loss + factors[1:] @ sums[:, 0]
    np.testing.assert_allclose(results.objective, expected, rtol=1e-5)
    assert results.head_correct == sums[:, 1].sum()
    assert results.head_targets == counts.sum()


@pytest.mark.slow
def test_a_new_head_says_what_the_model_says():
    sharding.use_mesh(DATA)
    for shape in ("block_diagonal", "hydra"):
        cfg = headed(shape)
        params = model.initialize(cfg, jax.random.key(0))
        hidden = jax.random.normal(jax.random.key(1), (8, 3, 16))
        hidden = jax.device_put(hidden, sharding.named_sharding("batch length width"))
        since = jnp.ones((8, 3, 1), jnp.int32, out_sharding=sharding.spec("batch length whole"))
        apply = functools.partial(model.Transformer(cfg).apply, {"params": params})
        first = apply(hidden, slice(0, 1), since, method=model.Transformer.draft_hidden)[:, :, 0]
        np.testing.assert_array_equal(first, hidden)


@pytest.mark.slow
def test_the_own_loss_is_bitwise_that_of_a_model_without_heads():
    cfg = headed("hydra")
    weights, batch = lively(cfg), toy_batch("encoder_decoder", rows=16)
    ((results, _),) = sums_of(make_run(cfg), weights, batch)
    bare = dataclasses.replace(cfg, draft_heads=None)
    trunk = {name: part for name, part in weights.items() if name != "heads"}
    ((alone, _),) = sums_of(make_run(bare), trunk, batch)
    assert results.loss == alone.loss == alone.objective != results.objective
    assert alone.head_correct is None and results.head_targets > 0


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["all", "random"])
def test_a_frozen_trunk_keeps_every_bit_and_its_heads_learn(heads):
    cfg = headed(dropout=0.1)
    parts = (config.ParamGroup(("heads.*",)), config.ParamGroup(("*",), rate=0))
    run = make_run(cfg, config.DraftHeadLoss(heads, main_loss_weight=0), param_groups=parts)
    weights, batch = lively(cfg), toy_batch("encoder_decoder", rows=16)
    after, results = take_steps(run, weights, [batch] * 6)
    for name, part in weights.items():
        same = [np.array_equal(a, b) for a, b in pairs(part, after.params[name])]
        assert not any(same) if name == "heads" else all(same)
    if heads == "all":
        assert results[-1].sums.objective < results[0].sums.objective


def pairs(tree, other):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


@pytest.mark.slow
def test_without_heads_in_the_objective_the_trunk_trains_as_ever():
    """own alone counts: the trunk's gradient is that of a model without heads."""
    cfg, plain = headed(), toy_model("encoder_decoder", layers=1)
    weights = lively(cfg)
    batch = toy_batch("encoder_decoder", rows=16)
    loss = config.DraftHeadLoss("all", main_loss_weight=1e9)
    with_heads, (results,) = take_steps(make_run(cfg, loss), weights, [batch])
    trunk = {name: part for name, part in weights.items() if name != "heads"}
    without, (other_results,) = take_steps(make_run(plain), trunk, [batch])
    params = {name: part for name, part in with_heads.params.items() if name != "heads"}
    assert_same(params, without.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results.sums.loss, other_results.sums.loss, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", mark_exhaustive(["stern", "hydra"], kept=["hydra"]))
def test_a_mesh_changes_neither_loss_nor_weights(shape):
    cfg = headed(shape)
    run = make_run(cfg)
    weights, batches = (
        lively(cfg),
        [toy_batch("encoder_decoder", rows=16, seed=seed) for seed in range(2)],
    )
    expected, plain = take_steps(run, weights, batches)
    sums_and_hidden, split = take_steps(run, weights, batches, CUBE)
    assert_same(sums_and_hidden.params, expected.params, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(split, plain, strict=True):
        np.testing.assert_allclose(ours.sums.objective, theirs.sums.objective, rtol=1e-5)


@pytest.mark.slow
def test_many_microbatches_equal_one():
    cfg = headed("hydra", layout="decoder_only")
    batch = toy_batch("decoder_only", rows=16)
    one, (results,) = take_steps(make_run(cfg), lively(cfg), [batch])
    many, (other_results,) = take_steps(make_run(cfg, microbatches=2), lively(cfg), [batch])
    assert_same(many.params, one.params, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other_results.sums.objective, results.sums.objective, rtol=1e-5)
    assert other_results.sums.head_targets == results.sums.head_targets


@pytest.mark.slow
def test_the_random_head_stands_for_all_on_average():
    """Every head is drawn, by its factor: the mean of many draws is the sum of all."""
    cfg = headed()
    weights, batch = lively(cfg), toy_batch("encoder_decoder", rows=16)
    loss = config.DraftHeadLoss("random", main_loss_weight=1.0, decay=0.5)
    keys = list(jax.random.split(jax.random.key(0), 200))
    drawn = [sums.objective for sums, _ in sums_of(make_run(cfg, loss), weights, batch, *keys)]
    every = dataclasses.replace(loss, heads="all")
    ((whole, _),) = sums_of(make_run(cfg, every), weights, batch)
    assert len(np.unique(np.round(drawn, 3))) == cfg.draft_heads.count
    assert abs(np.mean(drawn) - whole.objective) < 4 * np.std(drawn) / len(drawn) ** 0.5


@pytest.mark.slow
def test_pieces_and_whole_logits_give_the_same():
    cfg = headed("stern")
    weights, batch = lively(cfg), toy_batch("encoder_decoder", rows=16)
    runs = [make_run(cfg, cross_entropy=kind) for kind in ("chunked", "full")]
    (pieces, _), (whole, _) = (sums_of(run, weights, batch)[0] for run in runs)
    assert_same(pieces, whole, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: config.DraftHeads(1), r"DraftHeads.block must be in \[2, 64\]"),
        (lambda: config.DraftHeads(4, "medusa", mlp=8), "DraftHeads.mlp is for stern"),
        (lambda: config.DraftHeads(4, "eagle"), "DraftHeads.shape must be one of"),
        (lambda: config.DraftHeadLoss(decay=0.0), "DraftHeadLoss.decay"),
        (lambda: toy_model("encoder_only", draft_heads=config.DraftHeads(2)), "writes nothing"),
        (lambda: model.initialize(headed_mlp(3), jax.random.key(0)), "Model.draft_heads.mlp=3"),
    ],
)
def test_what_cannot_be_says_why(make, message):
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=message):
        make()


def headed_mlp(mlp: int) -> config.Model:
    return toy_model("encoder_decoder", draft_heads=config.DraftHeads(4, mlp=mlp))
