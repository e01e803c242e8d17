# SPDX-License-Identifier: Apache-2.0
"""Laws of the losses of pairs and of samples, against float64 definitions in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch
from test_training_step import CUBE, DATA, TOYS, assert_same, initial, make_run, take_steps

from t5x_lite import config, model, sharding
from t5x_lite.batch import PairReference, SampleData
from t5x_lite.training import objective
from t5x_lite.training.losses import policy, preferences
from t5x_lite.training.optimizer.param_groups import Selection
from t5x_lite.training.step_values import StepContext

RNG = np.random.default_rng(0)
LOSSES = [
    config.Preferences("dpo", 0.3),
    config.Preferences("dpo", 0.7, length_normalized=True),
    config.Preferences("ipo", 0.2),
    config.Preferences("ipo", 0.2, length_normalized=True),
    config.Preferences("orpo", 0.5),
    config.Preferences("simpo", 2.0, gamma=0.6),
]
NAMES = ["dpo", "dpo, per token", "ipo", "ipo, per token", "orpo", "simpo"]


def softplus(x):
    return np.logaddexp(0, x)


def pair_reference(cfg, sums, lengths, reference):
    # Each paper's formula, written out.
    chosen, rejected = sums[..., 0], sums[..., 1]
    if cfg.loss in ("dpo", "ipo"):
        chosen, rejected = chosen - reference[..., 0], rejected - reference[..., 1]
    if cfg.loss in ("orpo", "simpo") or cfg.length_normalized:
        chosen, rejected = chosen / lengths[..., 0], rejected / lengths[..., 1]
    if cfg.loss == "dpo":
        return softplus(-cfg.beta * (chosen - rejected))
    if cfg.loss == "ipo":
        return (chosen - rejected - 0.5 / cfg.beta) ** 2
    if cfg.loss == "simpo":
        return softplus(-(cfg.beta * chosen - cfg.beta * rejected - cfg.gamma))
    p, q = np.exp(chosen), np.exp(rejected)
    ratio = np.log(p / (1 - p)) - np.log(q / (1 - q))
    return -chosen + cfg.beta * softplus(-ratio)


def policy_reference(cfg, new, old, reference, advantages, inside):
    # One token after another.
    total, units = 0.0, 0.0
    for row in range(len(new)):
        places = np.flatnonzero(inside[row])
        parts = []
        for t in places:
            ratio = np.exp(new[row, t] - old[row, t])
            above = cfg.clip if cfg.clip_above is None else cfg.clip_above
            bound = min(max(ratio, 1 - cfg.clip), 1 + above)
            a = advantages[row, t]
            part = -min(ratio * a, bound * a)
            if cfg.kl_weight:
                r = np.exp(reference[row, t] - new[row, t])
                part += cfg.kl_weight * (r - np.log(r) - 1)
            parts.append(part)
        if not parts:
            continue
        if cfg.average == "text":
            total, units = total + np.mean(parts), units + 1
        elif cfg.average == "token":
            total, units = total + np.sum(parts), units + len(parts)
        else:
            total, units = total + np.sum(parts) / 12, units + 1
    return total / units


def differences(f, x, epsilon=1e-6):
    """Gradient of a scalar f at x by central differences of epsilon, in float64."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = epsilon
        gradient[place] = (f(x + step) - f(x - step)) / (2 * epsilon)
    return gradient


@pytest.mark.parametrize("cfg", LOSSES, ids=NAMES)
def test_losses_of_pairs_and_their_gradients_are_those_of_the_papers(cfg):
    lengths = RNG.integers(1, 9, (2, 3, 2)).astype(np.float64)
    sums, reference = (-np.abs(RNG.normal(size=(2, 3, 2))) * lengths for _ in range(2))
    there = np.ones((2, 3), bool)

    def computed(sums):
        scores = preferences.PairScores(sums, jnp.float32(lengths), there)
        frozen = jnp.float32(reference) if cfg.has_reference else None
        return preferences.preference_losses(cfg, scores, frozen)

    losses = computed(jnp.float32(sums))
    expected = pair_reference(cfg, sums, lengths, reference)
    np.testing.assert_allclose(losses.loss, expected, rtol=2e-6)
    gradient = jax.grad(lambda x: jnp.sum(computed(x).loss))(jnp.float32(sums))
    by_hand = differences(lambda x: pair_reference(cfg, x, lengths, reference).sum(), sums)
    np.testing.assert_allclose(gradient, by_hand, rtol=2e-5, atol=1e-6)
    assert set(losses.means) == set(preferences.mean_names(cfg))
    margin = losses.means["chosen_reward"] - losses.means["rejected_reward"]
    np.testing.assert_allclose(losses.means["reward_margin"], margin, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.means["preference_accuracy"], 100.0 * (margin > 0))


def test_odds_are_finite_at_the_ends():
    x = jnp.float32([-1e-30, 0.0, -1e-6, -0.69, -0.7, -30.0, -200.0])
    gradient = jax.vmap(jax.grad(preferences.log_odds))(x)
    assert np.all(np.isfinite(preferences.log_odds(x))) and np.all(np.isfinite(gradient))
    inside = np.float64(x[2:])
    expected = inside - np.log(-np.expm1(inside))
    np.testing.assert_allclose(preferences.log_odds(x[2:]), expected, rtol=1e-5)


@pytest.mark.parametrize("average", ["text", "token", "constant"])
@pytest.mark.parametrize("above", [None, 0.5])
def test_the_policy_loss_and_its_gradient_are_those_of_the_definition(average, above):
    cfg = config.Grpo("exact_match", clip=0.2, clip_above=above, kl_weight=0.3, average=average)
    shape = (4, 12)
    new, old, reference = (-np.abs(RNG.normal(size=shape)) for _ in range(3))
    inside = (np.arange(12) < np.array([[12], [3], [7], [0]])).astype(np.float64)
    advantages = RNG.normal(size=(4, 1)) * inside
    samples = SampleData(*(jnp.float32(x) for x in (advantages, old, reference)))
    flags = jnp.float32(inside)

    def computed(new):
        losses = policy.policy_losses(cfg, new, samples.old, samples)
        weighted = losses.loss * policy.token_weights(cfg, flags, 12)
        return jnp.sum(weighted) / policy.count_units(cfg, flags)

    def by_hand(new):
        return policy_reference(cfg, new, old, reference, advantages, inside)

    value, gradient = jax.value_and_grad(computed)(jnp.float32(new))
    np.testing.assert_allclose(value, by_hand(new), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, differences(by_hand, new), rtol=1e-4, atol=1e-6)


def test_advantages_are_by_group_and_exactly_zero_where_rewards_are_equal():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 2.0, 2.0]])
    divided = policy.group_advantages(rewards, divide=True)
    assert (divided[1] == 0).all()
    np.testing.assert_allclose(divided.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(divided[[0, 2]].std(axis=1, ddof=1), 1, atol=1e-5)
    centered = policy.group_advantages(rewards, divide=False)
    np.testing.assert_allclose(centered, rewards - rewards.mean(axis=1, keepdims=True), atol=1e-12)


def pair_run(cfg: config.Preferences, name="encoder_decoder", mesh=DATA, **train) -> config.Run:
    run = make_run(name, mesh=mesh, **train)
    data = dataclasses.replace(
        run.data, task=config.Files("x", "x", config.Vocabulary("bytes"), rejected="rejected")
    )
    initial = config.Checkpoint(initial="unused")
    return dataclasses.replace(run, data=data, preferences=cfg, checkpoint=initial)


def grpo_run(name="encoder_decoder", mesh=DATA, samples=4, microbatches=1, **fields) -> config.Run:
    run = make_run(name, mesh=mesh, microbatches=microbatches)
    train = dataclasses.replace(run.train, batch_size=16 // samples)
    grpo = config.Grpo("exact_match", samples=samples, **fields)
    initial = config.Checkpoint(initial="unused")
    return dataclasses.replace(run, train=train, grpo=grpo, checkpoint=initial)


def token_log_probabilities(params, cfg, batch) -> np.ndarray:
    # From the logits of the whole model.
    logits = np.float64(model.Transformer(cfg).apply({"params": params}, batch))
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return chosen - np.log(np.exp(logits).sum(axis=-1))


def texts_of(values, batch) -> np.ndarray:
    """Sums of tokens' values by text [b 1 2], where each row has two."""
    flags = [batch.loss_weights * (batch.target_segments == segment) for segment in (1, 2)]
    return np.stack([(values * flag).sum(axis=1) for flag in flags], axis=-1)[:, None]


def objective_of(run, params, batch, reference=None):
    # Value, sums and gradient for one microbatch.
    axes = model.axes(run.model)
    function = objective.make_objective(run, Selection((), axes), None)
    units = objective.count_units(run, batch)

    def value(slots):
        return function(slots, batch, StepContext(), units, frozen=(slots, reference, None))

    return jax.value_and_grad(value, has_aux=True)(params)


def weights_on_one_device(name: str):
    """New weights, on the mesh of one device, which is set."""
    weights = initial(name)
    sharding.use_mesh(DATA, jax.devices()[:1])
    return weights


def pairs_batch(name: str):
    """Four rows of a pair, each text with a target at least."""
    batch = toy_batch(name, rows=4)
    if batch.prefix is None:
        return batch
    prefix = batch.prefix & (batch.target_positions < 1)
    weights = (batch.target_segments > 0) & ~prefix
    return batch._replace(prefix=prefix, loss_weights=weights.astype(np.float32))


def perturbed(params, scale=0.3):
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + scale * draw.normal(size=x.shape).astype(x.dtype), params)


# Every loss is compared with its paper above; here each layout has one with a reference and one
# without, per text and per token.
WHERE = [(name, layout) for name in NAMES for layout in ("encoder_decoder", "decoder_only")]
SOMEWHERE = [("dpo", "encoder_decoder"), ("orpo", "encoder_decoder")]
SOMEWHERE += [("ipo, per token", "decoder_only"), ("simpo", "decoder_only")]


@pytest.mark.slow
@pytest.mark.parametrize("loss, name", mark_exhaustive(WHERE, kept=SOMEWHERE))
def test_the_objective_of_packed_pairs_is_the_loss_of_their_log_probabilities(loss, name):
    cfg, params = LOSSES[NAMES.index(loss)], weights_on_one_device(name)
    run, batch, other = pair_run(cfg, name), pairs_batch(name), perturbed(params)
    log_p = token_log_probabilities(params, run.model, batch)
    frozen = texts_of(token_log_probabilities(other, run.model, batch), batch)
    lengths = np.maximum(texts_of(np.ones_like(log_p), batch), 1)

    def by_hand(log_p):
        return pair_reference(cfg, texts_of(log_p, batch), lengths, frozen).mean()

    (value, sums), gradient = objective_of(run, params, batch, other)
    np.testing.assert_allclose(value, by_hand(log_p), rtol=1e-5)
    assert float(sums.units) == 4
    # The chain rule: the definition's slope for each token, taken back through the model.
    slope = jnp.float32(differences(by_hand, log_p))

    def through(params):
        logits = model.Transformer(run.model).apply({"params": params}, batch)
        here = jnp.arange(logits.shape[-1]) == batch.targets[..., None]
        return jnp.sum(jnp.where(here, jax.nn.log_softmax(logits), 0).sum(-1) * slope)

    assert_same(gradient, jax.grad(through)(params), rtol=2e-3, atol=2e-5)
    scored = batch._replace(teacher_data=PairReference(np.pad(frozen[:, 0], ((0, 0), (0, 10)))))
    if cfg.has_reference and name == "encoder_decoder":
        (again, _), _ = objective_of(run, params, jax.tree.map(jnp.asarray, scored))
        np.testing.assert_allclose(again, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_the_loss_at_the_reference_is_log_2(name):
    params = weights_on_one_device(name)
    run, batch = pair_run(config.Preferences("dpo", 0.1), name), pairs_batch(name)
    (value, sums), _ = objective_of(run, params, batch, params)
    assert np.float32(value) == np.float32(np.log(2))
    assert float(sums.means["reward_margin"]) == 0 == float(sums.means["kl"])


def samples_batch(name="encoder_decoder", advantage=None, seed=0):
    # A sample in each row, with random advantages, unless they are named, and log-probabilities.
    batch, draw = toy_batch(name, rows=16, seed=seed), np.random.default_rng(seed)
    one = batch.target_segments == 1
    batch = batch._replace(
        loss_weights=batch.loss_weights * one,
        target_segments=one.astype(np.int32),
        targets=batch.targets * one,
    )
    inside = batch.loss_weights > 0
    drawn = draw.normal(size=(16, 1)) if advantage is None else np.full((16, 1), advantage)
    old, reference = (-3 - np.abs(draw.normal(size=inside.shape)) for _ in range(2))
    samples = (drawn * inside, old * inside, reference * inside)
    return batch._replace(teacher_data=SampleData(*(x.astype(np.float32) for x in samples)))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", mark_exhaustive(["adamw", "adafactor"], kept=["adamw"]))
def test_samples_of_equal_reward_change_no_bit_of_the_weights(optimizer):
    run = dataclasses.replace(
        grpo_run(kl_weight=0.0, updates=2), optimizer=config.Optimizer(optimizer)
    )
    state, history = take_steps(run, [samples_batch(advantage=0.0)])
    jax.tree.map(np.testing.assert_array_equal, state.params, initial("encoder_decoder"))
    assert int(state.step) == 1 and not history[0].skipped
    moved, _ = take_steps(run, [samples_batch()])
    assert any(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (moved.params, state.params)), strict=True)
    )


@pytest.mark.slow
def test_the_ratio_of_the_first_update_is_1_and_later_ones_move():
    batch = samples_batch()
    sums = [
        take_steps(grpo_run(updates=updates), [batch])[1][0].sums.means["ratio"]
        for updates in (1, 2)
    ]
    np.testing.assert_allclose(sums[0], 16, rtol=1e-6)
    # The second update has ratios of its own, against log-probabilities that were drawn at random.
    assert abs(sums[1] - 32) > 0.1


@pytest.mark.slow
def test_a_second_update_is_a_step_from_the_first_ones_weights():
    """With old log-probabilities of the first weights, two updates are two steps of one batch whose
    second has the ratio of both weights."""
    run, batch = grpo_run(updates=2, kl_weight=0.0, clip=0.9), samples_batch()
    weights = weights_on_one_device("encoder_decoder")
    old = token_log_probabilities(weights, run.model, batch).astype(np.float32)
    known = batch.teacher_data._replace(old=old * (batch.loss_weights > 0))
    state, _ = take_steps(run, [batch._replace(teacher_data=known)])
    once, _ = take_steps(grpo_run(kl_weight=0.0, clip=0.9), [batch])
    # By hand: the slope of the second update, with the ratio of the weights after the first.
    sharding.use_mesh(DATA, jax.devices()[:1])
    first = once.params
    cfg, flags = run.grpo, jnp.float32(batch.loss_weights)

    def second(params):
        logits = model.Transformer(run.model).apply({"params": params}, batch)
        here = jnp.arange(logits.shape[-1]) == batch.targets[..., None]
        new = jnp.where(here, jax.nn.log_softmax(logits), 0).sum(-1)
        losses = policy.policy_losses(cfg, new, known.old, known)
        return jnp.sum(losses.loss * policy.token_weights(cfg, flags, 12)) / 16

    expected = jax.tree.map(lambda x, g: x - 0.1 * g, first, jax.grad(second)(first))
    assert_same(state.params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_and_microbatches_compute_what_one_does():
    batches = [samples_batch(seed=seed) for seed in range(2)]
    expected, history = take_steps(grpo_run(updates=2), batches)
    for run in (grpo_run(updates=2, mesh=CUBE), grpo_run(updates=2, microbatches=2)):
        state, again = take_steps(run, batches)
        assert_same(again[-1].sums, history[-1].sums, rtol=1e-4, atol=1e-5)
        assert_same(state.params, expected.params, rtol=1e-4, atol=1e-5)
    simpo, pairs = config.Preferences("simpo", 2.0), [toy_batch("encoder_decoder", rows=16)]
    expected, history = take_steps(pair_run(simpo), pairs)
    for run in (pair_run(simpo, mesh=CUBE), pair_run(simpo, microbatches=2)):
        state, again = take_steps(run, pairs)
        assert_same(again[-1].sums, history[-1].sums, rtol=1e-5, atol=1e-5)
        assert_same(state.params, expected.params, rtol=1e-4, atol=1e-5)
    assert TOYS["encoder_decoder"].dropout == 0
