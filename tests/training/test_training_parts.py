# SPDX-License-Identifier: Apache-2.0
"""Laws of Train.param_groups: weights that are frozen, begin later, or have their own rate."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import mark_exhaustive, toy_batch
from test_training_step import (
    CUBE,
    assert_same,
    losses_of,
    make_run,
    make_update_and_step,
    take_steps,
)

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.training import optimizer, schedules
from t5x_lite.training.optimizer import param_groups
from t5x_lite.training.reporting import dry_run, overview

CROSS = ("decoder.layers.cross_attention.*",)


def with_parts(*cfgs: config.ParamGroup, optimizer="adamw", clip=None, options=None, **changes):
    run = make_run(param_groups=cfgs, **changes)
    rule = config.Optimizer(optimizer, clip_norm=clip, weight_decay=0.1, options=options or {})
    return dataclasses.replace(run, optimizer=rule)


def named(tree) -> dict[str, np.ndarray]:
    return flatten_tree(tree)


def split(params) -> tuple[dict, dict]:
    """The weights of cross-attention, and all others."""
    cross = {name: w for name, w in named(params).items() if "cross_attention" in name}
    return cross, {name: w for name, w in named(params).items() if name not in cross}


def batches(count: int):
    return [toy_batch("encoder_decoder", rows=16, seed=seed) for seed in range(count)]


def begun(run):
    return take_steps(run, [])[0].params


@pytest.mark.slow
@pytest.mark.parametrize("rule", mark_exhaustive(["adamw", "adafactor"], kept=["adafactor"]))
def test_frozen_weights_keep_every_bit_and_have_no_optimizer_state(rule):
    run = with_parts(config.ParamGroup(CROSS, rate=0), optimizer=rule)
    after, history = take_steps(run, batches(3))
    cross, others = split(after.params)
    cross_before, others_before = split(begun(run))
    assert all(np.array_equal(cross[name], cross_before[name]) for name in cross)
    assert not any(np.array_equal(others[name], others_before[name]) for name in others)
    assert not any("cross_attention" in name for name in flatten_tree(after.optimizer))
    assert not any("cross_attention" in name for name in flatten_tree(history[0].squares))
    plain, _ = take_steps(with_parts(optimizer=rule), batches(1))
    once, _ = take_steps(run, batches(1))
    assert_same(split(plain.params)[1], split(once.params)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_parts_that_ask_for_nothing_change_nothing():
    rule = dict(optimizer="adafactor", clip=0.1)
    plain, history = take_steps(with_parts(**rule), batches(4))
    parted = with_parts(config.ParamGroup(CROSS), config.ParamGroup(("*norm*",)), **rule)
    after, group_history = take_steps(parted, batches(4))
    assert_same(plain.params, after.params, rtol=1e-5, atol=1e-6)
    assert_same(history[-1].gradient_norm, group_history[-1].gradient_norm, rtol=1e-5)


@pytest.mark.slow
def test_a_part_stands_still_until_it_begins_and_then_is_as_a_fresh_one():
    run = with_parts(config.ParamGroup(CROSS), config.ParamGroup(("*",), begin=2))
    before, _ = take_steps(run, batches(2))
    frozen, _ = take_steps(
        with_parts(config.ParamGroup(CROSS), config.ParamGroup(("*",), rate=0)), batches(2)
    )
    jax.tree.map(np.testing.assert_array_equal, before.params, frozen.params)
    assert_same(split(before.params)[1], split(begun(run))[1], rtol=0)
    waiting = jax.tree.leaves(before.optimizer.groups["part1"])
    assert all(not np.any(leaf) for leaf in waiting)
    # From the third step on its optimizer is a new one's, the weights being where they are.
    plain = with_parts()
    update, advance = make_update_and_step(plain)
    sharding.use_mesh(plain.mesh)

    def place(weight, shape):
        return jax.device_put(weight, shape.sharding)

    fresh = train_state.begin_state(
        jax.tree.map(place, before.params, model.shapes(plain.model)), update
    )
    fresh, _ = advance(fresh, sharding.place_batch(batches(3)[2]))
    after, _ = take_steps(run, batches(3))
    assert_same(split(after.params)[1], split(jax.device_get(fresh).params)[1], rtol=1e-6)
    assert not np.array_equal(after.params["embedding"], before.params["embedding"])


@pytest.mark.slow
def test_a_rate_multiplies_the_step_and_a_warm_up_rises_to_it():
    plain, _ = take_steps(with_parts(optimizer="sgd"), batches(1))

    def moved(after, run):
        return {name: w - named(begun(run))[name] for name, w in split(after.params)[0].items()}

    for part, share in (
        (config.ParamGroup(CROSS, rate=0.25), 0.25),
        (config.ParamGroup(CROSS, rate=2.0, warmup=4), 0.5),
    ):
        run = with_parts(part, optimizer="sgd")
        after, _ = take_steps(run, batches(1))
        whole = {name: share * d for name, d in moved(plain, run).items()}
        assert_same(moved(after, run), whole, rtol=1e-3, atol=1e-6)


def test_rates_follow_the_schedule_of_the_run_by_the_parts_own_count():
    schedule = schedules.learning_rate(config.Schedule("linear", peak=1.0, warmup=2), 20)
    scheduled = param_groups.group_rate(
        schedule, config.ParamGroup(("*",), rate=0.5, begin=5, warmup=4)
    )
    expected = [0.5 * min(1, (count + 1) / 4) * schedule(5 + count) for count in range(10)]
    np.testing.assert_allclose([scheduled(count) for count in range(10)], expected, rtol=1e-6)


@pytest.mark.slow
def test_clipping_counts_only_what_trains_at_that_step():
    run = with_parts(
        config.ParamGroup(CROSS), config.ParamGroup(("*",), begin=1), optimizer="sgd", clip=1e-3
    )
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, weight_decay=0.0))
    one, history = take_steps(run, batches(1))
    cross, before = split(one.params)[0], split(begun(run))[0]
    moved = optax.tree.norm({name: cross[name] - before[name] for name in cross})
    np.testing.assert_allclose(moved, 0.1 * 1e-3, rtol=1e-2)
    cross_only = [s for name, s in named(history[0].squares).items() if "cross_attention" in name]
    norm = np.sqrt(sum(np.sum(square) for square in cross_only))
    np.testing.assert_allclose(history[0].gradient_norm, norm, rtol=1e-6)


PARTS = (
    config.ParamGroup(CROSS),
    config.ParamGroup(("*norm*",), rate=0),
    config.ParamGroup(("*",), begin=1, rate=2),
)


@pytest.mark.slow
def test_every_mesh_and_any_microbatches_give_the_same_losses():
    rule = dict(optimizer="adafactor", options={"min_dim_factored": 8})
    _, history = take_steps(with_parts(*PARTS, **rule), batches(3))
    for changes in ({"mesh": CUBE}, {"microbatches": 2}):
        other = with_parts(*PARTS, **rule, **changes)
        _, split_history = take_steps(other, batches(3))
        np.testing.assert_allclose(losses_of(history), losses_of(split_history), rtol=1e-5)


@pytest.mark.slow
def test_a_step_without_finite_gradient_is_not_counted_towards_the_beginning():
    run = with_parts(config.ParamGroup(CROSS), config.ParamGroup(("*",), begin=1))
    good, more = batches(2)
    weights = np.where(good.loss_weights, np.float32(np.inf), 0)
    broken = good._replace(loss_weights=weights)
    after, _ = take_steps(run, [broken, broken, good])
    once, _ = take_steps(run, [good])
    assert_same(after.params, once.params, rtol=0)
    assert_same(after.optimizer, once.optimizer, rtol=0)
    assert after.optimizer.count == 1
    resumed, _ = take_steps(run, [broken, good, broken, more])
    twice, _ = take_steps(run, [good, more])
    assert_same(resumed.params, twice.params, rtol=0)


def test_frozen_weights_have_no_gradient_to_compute():
    def flops(run):
        sharding.use_mesh(run.mesh)
        update, advance = make_update_and_step(run)
        shapes = train_state.state_shapes(model.shapes(run.model), update)
        batch = sharding.place_batch(batches(1)[0])
        return advance.lower(shapes, batch).cost_analysis()["flops"]

    everything = flops(with_parts(optimizer="sgd"))
    some = flops(
        with_parts(config.ParamGroup(CROSS), config.ParamGroup(("*",), rate=0), optimizer="sgd")
    )
    assert some < 0.9 * everything


def test_bad_parts_are_refused_with_the_names_that_are_there():
    run = make_run()
    sharding.use_mesh(run.mesh)
    axes = model.axes(run.model)
    cases = {
        r"names no weight: '\*crossattention\*'.*cross_attention": (
            config.ParamGroup(("*crossattention*",)),
        ),
        r"Train.param_groups\[1\].*earlier groups": (
            config.ParamGroup(("*",)),
            config.ParamGroup(CROSS),
        ),
        "nothing train from the first step": (config.ParamGroup(("*",), rate=0),),
        "nothing train": (config.ParamGroup(CROSS, begin=3), config.ParamGroup(("*",), rate=0)),
    }
    for message, cfgs in cases.items():
        with pytest.raises(ValueError, match=message):
            optimizer.make_optimizer(config.Optimizer(), optax.constant_schedule(1.0), axes, cfgs)
    with pytest.raises(ValueError, match="beyond the run's 10 steps"):
        with_parts(config.ParamGroup(CROSS, begin=10))


def test_the_start_up_table_says_what_trains_when():
    run = with_parts(
        config.ParamGroup(CROSS, begin=3, warmup=2), config.ParamGroup(("encoder.*",), rate=0)
    )
    sharding.use_mesh(run.mesh)
    update, _ = make_update_and_step(run)
    shapes = train_state.state_shapes(model.shapes(run.model), update)
    later, frozen, rest = overview.group_lines(run, shapes)
    assert later.startswith("trained from step 3, rising over 2 steps: ")
    assert frozen.startswith("frozen: ") and "optimizer 0.0 MiB" in frozen
    assert rest.startswith("trained: ") and rest.endswith("(all others)")
    assert frozen in dry_run.describe_run(run)
    trained = sum(w.nbytes for name, w in named(begun(run)).items() if "encoder." not in name)
    assert train_state.tree_bytes(shapes.optimizer) == pytest.approx(2 * trained, abs=100)
