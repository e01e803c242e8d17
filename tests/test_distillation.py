# SPDX-License-Identifier: Apache-2.0
"""Laws of distillation in the step: divergences, what a teacher reads, and the mixed objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch, toy_model
from test_training_step import CUBE, DATA, assert_same, initial, make_run, take_steps, unpacked

from t5x_lite import config, decoding, model, sharding
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation.distillation import Reading
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch
from t5x_lite.training import divergence, optimizer, schedules, state, step

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def reference(logits, teacher, temperature, ids=None):
    """KL [b t] in float64; with ids, all others are one class."""
    log_q, log_p = log_softmax(logits / temperature), log_softmax(teacher / temperature)
    if ids is not None:
        both = []
        for each in (log_q, log_p):
            chosen = np.take_along_axis(each, ids, -1)
            others = np.exp(each).sum(-1) - np.exp(chosen).sum(-1)
            both.append(np.concatenate([chosen, np.log(others)[..., None]], -1))
        log_q, log_p = both
    log_q = log_q[..., : log_p.shape[-1]]
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.fixture
def mesh():
    return sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def drawn(vocab=11, taught=9, scale=3.0):
    logits = scale * RNG.normal(size=(2, 3, vocab))
    return logits, scale * RNG.normal(size=(2, 3, taught))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_those_of_the_definition(mesh, temperature):
    logits, teacher = drawn()
    found = lambda x: divergence.whole(x, jnp.float32(teacher), temperature)
    x = jnp.float32(logits)
    kl, slope = found(x), jax.grad(lambda x: jnp.sum(found(x)))(x)
    np.testing.assert_allclose(kl, reference(logits, teacher, temperature), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        slope, differences(lambda x: reference(x, teacher, temperature), logits), atol=1e-6
    )


def differences(f, x, epsilon=1e-6):
    """The gradient of the sum of f, by central differences in float64."""
    slope = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = epsilon
        slope[place] = (f(x + step).sum() - f(x - step).sum()) / (2 * epsilon)
    return slope


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 4])
def test_divergence_of_the_best_ids_counts_all_others_as_one(mesh, temperature, count):
    logits, teacher = drawn()
    ids, log_p = divergence.best(jnp.float32(teacher), count, temperature)
    np.testing.assert_array_equal(ids, np.argsort(-teacher, -1)[..., :count])
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-6)
    found = lambda x: divergence.of_best(x, ids, log_p, temperature)
    wanted = lambda x: reference(x, teacher, temperature, np.asarray(ids))
    np.testing.assert_allclose(found(jnp.float32(logits)), wanted(logits), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(found(x)))(jnp.float32(logits))
    np.testing.assert_allclose(slope, differences(wanted, logits), atol=2e-6)
    assert (wanted(logits) <= reference(logits, teacher, temperature) + 1e-9).all()


@pytest.mark.parametrize("vocab", [9, 11])
def test_all_ids_as_the_best_are_the_whole_distribution(mesh, vocab):
    logits, teacher = (jnp.float32(each) for each in drawn(vocab))
    ids, log_p = divergence.best(teacher, 9, 1.5)
    some = lambda x: divergence.of_best(x, ids, log_p, 1.5)
    every = lambda x: divergence.whole(x, teacher, 1.5)
    np.testing.assert_allclose(some(logits), every(logits), rtol=1e-5, atol=1e-6)
    slopes = [jax.grad(lambda x, f=f: jnp.sum(f(x)))(logits) for f in (some, every)]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_equal_distributions_have_no_divergence_and_no_gradient(mesh):
    logits = jnp.float32(drawn(scale=30.0)[0])
    ids, log_p = divergence.best(logits, 3, 1.0)
    for found in (
        lambda x: divergence.whole(x, logits, 1.0),
        lambda x: divergence.of_best(x, ids, log_p, 1.0),
    ):
        np.testing.assert_allclose(found(logits), 0, atol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda x, f=found: jnp.sum(f(x)))(logits), 0, atol=1e-6)


def test_a_rest_that_is_almost_nothing_keeps_its_digits(mesh):
    logits = jnp.float32([[[40.0, 0.0, 1.0, -2.0]]])
    teacher = jnp.float32([[[35.0, 1.0, 0.0, 3.0]]])
    ids, log_p = divergence.best(teacher, 1, 1.0)
    rest = np.log(np.exp([1.0, 0.0, 3.0]).sum()) - 35
    np.testing.assert_allclose(log_p[..., 1], rest, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(divergence.of_best(x, ids, log_p, 1.0)))(logits)
    assert np.isfinite(slope).all()


def texts(batch, layout):
    """Every text of a batch as (row, inputs, targets)."""
    for row in range(len(batch.targets)):
        for segment in range(1, batch.target_segments[row].max(initial=0) + 1):
            inside = batch.target_segments[row] == segment
            if layout == "joined":
                first = inside & batch.prefix[row]
                yield row, batch.targets[row][first], np.flatnonzero(inside & ~batch.prefix[row])
            else:
                read = batch.input_segments[row] == segment
                yield row, batch.inputs[row][read], np.flatnonzero(inside)


@pytest.mark.parametrize("layout", ["pair", "joined"])
@pytest.mark.parametrize("starts", [True, False])
def test_a_teacher_reads_each_text_alone_and_in_order(layout, starts):
    cfg = toy_model("joined", starts_prompts=starts, start=1)
    batch = toy_batch(layout)
    # One row begins with the start, as some vocabularies have inputs begin.
    first = batch.targets if layout == "joined" else batch.inputs
    first[0, 0] = 1
    lesson = Reading(cfg, 64).lesson(batch)
    for row, inputs, where in texts(batch, layout):
        own = [] if starts and inputs[:1] == [1] else inputs[:1].tolist()
        whole = [*own, *inputs[1:], *batch.targets[row][where]]
        for i, target in enumerate(where):
            before = len(whole) - len(where) + i
            place = lesson.places[row, target]
            context = [1, *whole[:before]] if starts else whole[:before]
            assert lesson.known[row, target] == bool(context)
            begin = place - lesson.positions[row, place]
            assert lesson.positions[row, place] == len(context) - 1
            assert lesson.tokens[row, begin : place + 1].tolist() == context
            assert len(set(lesson.segments[row, begin : place + 1].tolist())) == 1
    assert not lesson.known[batch.target_segments == 0].any()


def test_ids_that_the_teacher_lacks_are_told():
    with pytest.raises(ValueError, match="knows 20 ids"):
        Reading(toy_model("joined"), 20).lesson(toy_batch("pair"))


TEACHER = toy_model("joined", kv_heads=2, positions="rotary", start=1)


def taught_run(layout="pair", **changes):
    fields = {
        name: changes.pop(name) for name in ("weight", "temperature", "top_k") if name in changes
    }
    run = make_run(layout, **changes)
    return dataclasses.replace(run, distillation=config.Distillation("unused", **fields))


def take(run, batches, cfg=TEACHER, params=None, weights=None):
    """State and metrics after steps on batches, with a teacher of `cfg`."""
    sharding.use_mesh(DATA)
    params = jax.device_get(model.initialize(cfg, jax.random.key(3))) if params is None else params
    sharding.use_mesh(run.mesh)
    put = lambda weight, shape: jax.device_put(weight, shape.sharding)
    params = jax.tree.map(put, params, model.shapes(cfg))
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make(run.optimizer, schedule, axes, run.train.parts)
    reading = Reading(cfg, cfg.vocab)
    advance = step.make(run, update, schedule, axes, Teacher("toy", cfg, None, cfg.vocab))
    first = initial(run.model.layout) if weights is None else weights
    now = state.begin(jax.tree.map(put, first, model.shapes(run.model)), update)
    told = []
    for batch in batches:
        placed = sharding.place_batch(batch._replace(lesson=reading.lesson(batch)))
        with jax.transfer_guard("disallow"):
            now, metrics = advance(now, placed, params)
        told.append(metrics)
    return jax.device_get(now), jax.device_get(told)


@pytest.mark.parametrize("layout", ["pair", "joined"])
def test_the_objective_is_the_mixture_that_the_config_says(layout):
    run = taught_run(layout, weight=0.3, temperature=2.0)
    batch = toy_batch(layout, rows=16)
    _, (told,) = take(run, [batch])
    sharding.use_mesh(DATA)
    lesson = Reading(TEACHER, 64).lesson(batch)
    said = texts_alone(batch, layout)
    weights = jax.tree.map(jnp.asarray, initial(layout))
    student = forward(run.model, weights, sharding.place_batch(batch))
    kl = reference(np.asarray(student, np.float64), said, 2.0) * batch.loss_weights
    np.testing.assert_allclose(told.sums.divergence, kl.sum(), rtol=1e-4)
    assert told.sums.taught == (batch.loss_weights * lesson.known).sum()
    plain = dataclasses.replace(run, distillation=None)
    alone = take_steps(plain, [batch])[1][0].sums
    wanted = 0.7 * alone.objective + 0.3 * 4 * kl.sum()
    np.testing.assert_allclose(told.sums.objective, wanted, rtol=1e-4)
    np.testing.assert_allclose(told.sums.loss, alone.loss, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, batch):
    return model.Transformer(cfg).apply({"params": params}, batch)


def texts_alone(batch, layout):
    """The teacher's logits [b t v], every text read by itself as the model reads a joined row."""
    sharding.use_mesh(DATA)
    params = model.initialize(TEACHER, jax.random.key(3))
    found = np.zeros((*batch.targets.shape, 64))
    for row, inputs, where in texts(batch, layout):
        whole = np.concatenate([inputs, batch.targets[row][where]])
        # Padded, so that one program reads them all.
        ids = np.pad(whole, (0, 24 - len(whole)))[None].repeat(8, 0)
        places = np.arange(24)[None].repeat(8, 0)
        alone = Batch(ids, np.ones_like(ids), places, np.ones_like(ids, np.float32))
        logits = forward(TEACHER, params, sharding.place_batch(alone))
        found[row, where] = np.asarray(logits)[0, len(inputs) : len(whole)]
    return found


@pytest.mark.parametrize("top_k", [None, 5])
def test_packing_microbatches_and_meshes_change_nothing(top_k):
    batch = toy_batch("pair", rows=8)
    padding = jax.tree.map(np.zeros_like, batch)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), batch, padding)
    both.loss_weights[:3, 4:] = 0
    one, told = take(taught_run(top_k=top_k), [both])
    cases = [
        (taught_run(top_k=top_k), unpacked(jax.tree.map(lambda rows: rows[:8], both))),
        (taught_run(top_k=top_k, microbatches=2), both),
        (taught_run(top_k=top_k, mesh=CUBE), both),
    ]
    for run, rows in cases:
        other, told_other = take(run, [rows])
        assert_same(told[0].sums, told_other[0].sums, rtol=1e-4)
        assert_same(one.params, other.params, rtol=1e-4, atol=2e-6)


def test_a_student_that_is_its_teacher_has_no_divergence():
    run = taught_run("joined", weight=1.0)
    weights = initial("joined")
    cfg = run.model
    _, (told,) = take(run, [toy_batch("joined", rows=16)], cfg, weights)
    np.testing.assert_allclose(told.sums.divergence, 0, atol=1e-4)
    np.testing.assert_allclose(told.gradient_norm, 0, atol=1e-5)


def test_a_student_comes_nearer_to_its_teacher():
    run = taught_run(weight=1.0)
    run = dataclasses.replace(run, optimizer=config.Optimizer("adamw"))
    run = dataclasses.replace(run, schedule=config.Schedule("constant", 0.01))
    batch = toy_batch("pair", rows=16)
    _, told = take(run, [batch] * 8)
    per_token = [metrics.sums.divergence / metrics.sums.taught for metrics in told]
    assert per_token[-1] < 0.6 * per_token[0]


@pytest.mark.parametrize("starts", [True, False])
def test_a_teacher_finds_texts_as_probable_as_decoding_does(starts):
    cfg = dataclasses.replace(TEACHER, starts_prompts=starts)
    sharding.use_mesh(DATA)
    params = model.initialize(cfg, jax.random.key(3))
    batch = toy_batch("pair")
    lesson = sharding.place_batch(Reading(cfg, 64).lesson(batch))
    said = log_softmax(teachers.logits(Teacher("toy", cfg, None, 64), params, lesson))
    found = list(texts(batch, "pair"))
    pairs = [(inputs.tolist(), batch.targets[row][where].tolist()) for row, inputs, where in found]
    scores = decoding.score(
        cfg, decoding.prepare(cfg, params), *map(list, zip(*pairs, strict=True))
    )
    for (row, _, where), (_, targets), tokens in zip(found, pairs, scores.tokens, strict=True):
        ours = said[row, where, targets]
        np.testing.assert_allclose(ours, tokens[: len(where)], rtol=1e-4, atol=1e-5)
