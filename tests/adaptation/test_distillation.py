# SPDX-License-Identifier: Apache-2.0
"""Laws of distillation in the step: divergences, what a teacher reads, and the mixed objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model
from test_training_step import CUBE, DATA, assert_same, initial, make_run, take_steps, unpacked

from t5x_lite import config, decoding, model, sharding
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation.distilled_batches import TeacherBatchBuilder
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import train_state
from t5x_lite.training import optimizer, schedules, step
from t5x_lite.training.losses import distillation

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def reference(logits, teacher, temperature, ids=None):
    """KL [b t] in float64 from a teacher's logits at a temperature; with ids, all others are one
    class."""
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


def drawn(vocab=11, teacher_vocab=9, scale=3.0):
    logits = scale * RNG.normal(size=(2, 3, vocab))
    return logits, scale * RNG.normal(size=(2, 3, teacher_vocab))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_those_of_the_definition(mesh, temperature):
    logits, teacher = drawn()

    def computed(x):
        return distillation.full_divergence(x, jnp.float32(teacher), temperature)

    x = jnp.float32(logits)
    kl, gradient = computed(x), jax.grad(lambda x: jnp.sum(computed(x)))(x)
    np.testing.assert_allclose(kl, reference(logits, teacher, temperature), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        gradient, differences(lambda x: reference(x, teacher, temperature), logits), atol=1e-6
    )


def differences(f, x, epsilon=1e-6):
    """The gradient at x of the sum of f, by central differences of epsilon in float64."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = epsilon
        gradient[place] = (f(x + step).sum() - f(x - step).sum()) / (2 * epsilon)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 4])
def test_divergence_of_the_best_ids_counts_all_others_as_one(mesh, temperature, count):
    logits, teacher = drawn()
    ids, log_p = distillation.top_k_log_probabilities(jnp.float32(teacher), count, temperature)
    np.testing.assert_array_equal(ids, np.argsort(-teacher, -1)[..., :count])
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-6)

    def computed(x):
        return distillation.top_k_divergence(x, ids, log_p, temperature)

    def wanted(x):
        return reference(x, teacher, temperature, np.asarray(ids))

    np.testing.assert_allclose(computed(jnp.float32(logits)), wanted(logits), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(computed(x)))(jnp.float32(logits))
    np.testing.assert_allclose(gradient, differences(wanted, logits), atol=2e-6)
    assert (wanted(logits) <= reference(logits, teacher, temperature) + 1e-9).all()


@pytest.mark.parametrize("vocab", [9, 11])
def test_all_ids_as_the_best_are_the_whole_distribution(mesh, vocab):
    logits, teacher = (jnp.float32(each) for each in drawn(vocab))
    ids, log_p = distillation.top_k_log_probabilities(teacher, 9, 1.5)

    def some(x):
        return distillation.top_k_divergence(x, ids, log_p, 1.5)

    def every(x):
        return distillation.full_divergence(x, teacher, 1.5)

    np.testing.assert_allclose(some(logits), every(logits), rtol=1e-5, atol=1e-6)
    slopes = [jax.grad(lambda x, f=f: jnp.sum(f(x)))(logits) for f in (some, every)]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_equal_distributions_have_no_divergence_and_no_gradient(mesh):
    logits = jnp.float32(drawn(scale=30.0)[0])
    ids, log_p = distillation.top_k_log_probabilities(logits, 3, 1.0)
    for computed in (
        lambda x: distillation.full_divergence(x, logits, 1.0),
        lambda x: distillation.top_k_divergence(x, ids, log_p, 1.0),
    ):
        np.testing.assert_allclose(computed(logits), 0, atol=1e-6)
        np.testing.assert_allclose(
            jax.grad(lambda x, f=computed: jnp.sum(f(x)))(logits), 0, atol=1e-6
        )


def test_a_rest_that_is_almost_nothing_keeps_its_digits(mesh):
    logits = jnp.float32([[[40.0, 0.0, 1.0, -2.0]]])
    teacher = jnp.float32([[[35.0, 1.0, 0.0, 3.0]]])
    ids, log_p = distillation.top_k_log_probabilities(teacher, 1, 1.0)
    rest = np.log(np.exp([1.0, 0.0, 3.0]).sum()) - 35
    np.testing.assert_allclose(log_p[..., 1], rest, rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(distillation.top_k_divergence(x, ids, log_p, 1.0)))(
        logits
    )
    assert np.isfinite(gradient).all()


def texts(batch, layout):
    """Every text of a batch as (row, inputs, targets)."""
    for row in range(len(batch.targets)):
        for segment in range(1, batch.target_segments[row].max(initial=0) + 1):
            inside = batch.target_segments[row] == segment
            if layout == "decoder_only":
                first = inside & batch.prefix[row]
                yield row, batch.targets[row][first], np.flatnonzero(inside & ~batch.prefix[row])
            else:
                read = batch.input_segments[row] == segment
                yield row, batch.inputs[row][read], np.flatnonzero(inside)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("starts", [True, False])
def test_a_teacher_reads_each_text_alone_and_in_order(layout, starts):
    cfg = toy_model("decoder_only", add_bos=starts, decoder_start_token_id=1)
    batch = toy_batch(layout)
    # One row begins with the start, as some vocabularies have inputs begin.
    first = batch.targets if layout == "decoder_only" else batch.inputs
    first[0, 0] = 1
    teacher_data = TeacherBatchBuilder(cfg, 64).teacher_data(batch)
    for row, inputs, where in texts(batch, layout):
        start = [] if starts and inputs[:1] == [1] else inputs[:1].tolist()
        whole = [*start, *inputs[1:], *batch.targets[row][where]]
        for i, target in enumerate(where):
            before = len(whole) - len(where) + i
            place = teacher_data.places[row, target]
            context = [1, *whole[:before]] if starts else whole[:before]
            assert teacher_data.known[row, target] == bool(context)
            begin = place - teacher_data.positions[row, place]
            assert teacher_data.positions[row, place] == len(context) - 1
            assert teacher_data.tokens[row, begin : place + 1].tolist() == context
            assert len(set(teacher_data.segments[row, begin : place + 1].tolist())) == 1
    assert not teacher_data.known[batch.target_segments == 0].any()


def test_ids_that_the_teacher_lacks_are_reported():
    with pytest.raises(ValueError, match="knows 20 ids"):
        builder = TeacherBatchBuilder(toy_model("decoder_only"), 20)
        builder.teacher_data(toy_batch("encoder_decoder"))


TEACHER = toy_model("decoder_only", kv_heads=2, positions="rotary", decoder_start_token_id=1)


def taught_run(layout="encoder_decoder", **changes):
    fields = {
        name: changes.pop(name) for name in ("weight", "temperature", "top_k") if name in changes
    }
    run = make_run(layout, **changes)
    return dataclasses.replace(run, distillation=config.Distillation("unused", **fields))


def take(run, batches, cfg=TEACHER, params=None, weights=None):
    """State and metrics after steps of a run on batches, with a teacher of cfg.

    Args:
      run: the run.
      batches: a batch for each step.
      cfg: model of the teacher.
      params: weights of the teacher; None draws them.
      weights: weights of the student to begin with; None for those that all tests share.
    """
    sharding.use_mesh(DATA)
    params = jax.device_get(model.initialize(cfg, jax.random.key(3))) if params is None else params
    sharding.use_mesh(run.mesh)

    def put(weight, shape):
        return jax.device_put(weight, shape.sharding)

    params = jax.tree.map(put, params, model.shapes(cfg))
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    reading = TeacherBatchBuilder(cfg, cfg.vocab)
    advance = step.make_step(run, update, schedule, axes, Teacher("toy", cfg, None, cfg.vocab))
    first = initial(run.model.layout) if weights is None else weights
    now = train_state.begin_state(jax.tree.map(put, first, model.shapes(run.model)), update)
    reported = []
    for batch in batches:
        placed = sharding.place_batch(batch._replace(teacher_data=reading.teacher_data(batch)))
        with jax.transfer_guard("disallow"):
            now, metrics = advance(now, placed, params)
        reported.append(metrics)
    return jax.device_get(now), jax.device_get(reported)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_the_objective_is_the_mixture_that_the_config_says(layout):
    run = taught_run(layout, weight=0.3, temperature=2.0)
    batch = toy_batch(layout, rows=16)
    _, (reported,) = take(run, [batch])
    sharding.use_mesh(DATA)
    teacher_data = TeacherBatchBuilder(TEACHER, 64).teacher_data(batch)
    teacher_scores = texts_alone(batch, layout)
    weights = jax.tree.map(jnp.asarray, initial(layout))
    student = forward(run.model, weights, sharding.place_batch(batch))
    kl = reference(np.asarray(student, np.float64), teacher_scores, 2.0) * batch.loss_weights
    np.testing.assert_allclose(reported.sums.divergence, kl.sum(), rtol=1e-4)
    assert reported.sums.teacher_tokens == (batch.loss_weights * teacher_data.known).sum()
    plain = dataclasses.replace(run, distillation=None)
    alone = take_steps(plain, [batch])[1][0].sums
    wanted = 0.7 * alone.objective + 0.3 * 4 * kl.sum()
    np.testing.assert_allclose(reported.sums.objective, wanted, rtol=1e-4)
    np.testing.assert_allclose(reported.sums.loss, alone.loss, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, batch):
    return model.Transformer(cfg).apply({"params": params}, batch)


def texts_alone(batch, layout):
    """The teacher's logits [b t v], every text read by itself as the model reads a joined row."""
    sharding.use_mesh(DATA)
    params = model.initialize(TEACHER, jax.random.key(3))
    computed = np.zeros((*batch.targets.shape, 64))
    for row, inputs, where in texts(batch, layout):
        whole = np.concatenate([inputs, batch.targets[row][where]])
        # Padded, so that one program reads them all.
        ids = np.pad(whole, (0, 24 - len(whole)))[None].repeat(8, 0)
        places = np.arange(24)[None].repeat(8, 0)
        alone = Batch(ids, np.ones_like(ids), places, np.ones_like(ids, np.float32))
        logits = forward(TEACHER, params, sharding.place_batch(alone))
        computed[row, where] = np.asarray(logits)[0, len(inputs) : len(whole)]
    return computed


@pytest.mark.slow
@pytest.mark.parametrize("top_k", mark_exhaustive([None, 5], kept=[5]))
def test_packing_microbatches_and_meshes_change_nothing(top_k):
    batch = toy_batch("encoder_decoder", rows=8)
    padding = jax.tree.map(np.zeros_like, batch)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), batch, padding)
    both.loss_weights[:3, 4:] = 0
    one, reported = take(taught_run(top_k=top_k), [both])
    cases = [
        (taught_run(top_k=top_k), unpacked(jax.tree.map(lambda rows: rows[:8], both))),
        (taught_run(top_k=top_k, microbatches=2), both),
        (taught_run(top_k=top_k, mesh=CUBE), both),
    ]
    for run, rows in cases:
        other, told_other = take(run, [rows])
        assert_same(reported[0].sums, told_other[0].sums, rtol=1e-4)
        assert_same(one.params, other.params, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_no_divergence():
    run = taught_run("decoder_only", weight=1.0)
    weights = initial("decoder_only")
    cfg = run.model
    _, (reported,) = take(run, [toy_batch("decoder_only", rows=16)], cfg, weights)
    np.testing.assert_allclose(reported.sums.divergence, 0, atol=1e-4)
    np.testing.assert_allclose(reported.gradient_norm, 0, atol=1e-5)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher():
    run = taught_run(weight=1.0)
    run = dataclasses.replace(run, optimizer=config.Optimizer("adamw"))
    run = dataclasses.replace(run, schedule=config.Schedule("constant", 0.01))
    batch = toy_batch("encoder_decoder", rows=16)
    _, reported = take(run, [batch] * 8)
    per_token = [metrics.sums.divergence / metrics.sums.teacher_tokens for metrics in reported]
    assert per_token[-1] < 0.6 * per_token[0]


@pytest.mark.slow
@pytest.mark.parametrize("starts", [True, False])
def test_a_teacher_finds_texts_as_probable_as_decoding_does(starts):
    cfg = dataclasses.replace(TEACHER, add_bos=starts)
    sharding.use_mesh(DATA)
    params = model.initialize(cfg, jax.random.key(3))
    batch = toy_batch("encoder_decoder")
    teacher_data = sharding.place_batch(TeacherBatchBuilder(cfg, 64).teacher_data(batch))
    teacher_scores = log_softmax(
        teachers.compute_logits(Teacher("toy", cfg, None, 64), params, teacher_data)
    )
    computed = list(texts(batch, "encoder_decoder"))
    pairs = [
        (inputs.tolist(), batch.targets[row][where].tolist()) for row, inputs, where in computed
    ]
    scores = decoding.score(
        cfg, decoding.prepare_params(cfg, params), *map(list, zip(*pairs, strict=True))
    )
    for (row, _, where), (_, targets), tokens in zip(computed, pairs, scores.tokens, strict=True):
        ours = teacher_scores[row, where, targets]
        np.testing.assert_allclose(ours, tokens[: len(where)], rtol=1e-4, atol=1e-5)
