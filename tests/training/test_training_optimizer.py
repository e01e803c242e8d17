# SPDX-License-Identifier: Apache-2.0
"""Laws of the update rules and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.training import optimizer, schedules
from t5x_lite.training.optimizer import adafactor

RNG = np.random.default_rng(0)


def reference_adafactor(weight, gradients, rate, rows, columns):
    """T5's Adafactor of one weight in float64, from the paper's equations.

    Args:
      weight: first value.
      gradients: gradient of each step.
      rate: learning rate.
      rows: axes that a factored weight has along its rows; None for one that is not factored.
      columns: its other axes.
    """
    weight = weight.astype(np.float64)
    shape = weight.shape
    matrix = weight.transpose(rows + columns) if rows else weight
    moved = matrix.shape
    matrix = matrix.reshape(int(np.prod([shape[i] for i in rows])), -1) if rows else matrix
    row = column = whole = 0.0
    for t, gradient in enumerate(gradients):
        gradient = gradient.astype(np.float64)
        if rows:
            gradient = gradient.transpose(rows + columns).reshape(matrix.shape)
        decay = 1 - (t + 1) ** -0.8
        square = gradient**2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1, keepdims=True) if rows else 0
        column = decay * column + (1 - decay) * square.mean(0, keepdims=True) if rows else 0
        whole = decay * whole + (1 - decay) * square
        v = row * column / row.mean() if rows else whole
        update = gradient / np.sqrt(v)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        matrix = matrix - rate * max(np.sqrt(np.mean(matrix**2)), 1e-3) * update
    if not rows:
        return matrix
    return matrix.reshape(moved).transpose(np.argsort(rows + columns))


def run(transformation, weight, gradients):
    state = transformation.init(weight)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, weight)
        weight = optax.apply_updates(weight, updates)
    return weight, state


def ours(names, weight, gradients, rate=0.1, **settings):
    rule = adafactor.adafactor(
        optax.constant_schedule(rate), {"w": names}, adafactor.AdafactorSettings(**settings)
    )
    result, state = run(rule, {"w": jnp.asarray(weight)}, [{"w": g} for g in gradients])
    return np.asarray(result["w"]), state


@pytest.mark.parametrize(
    ("names", "shape", "rows", "columns"),
    [
        ("vocab embed", (130, 128), (1,), (0,)),
        ("vocab encoder_embed", (130, 128), (1,), (0,)),
        ("embed mlp", (128, 140), (0,), (1,)),
        ("embed heads head_dim", (128, 4, 32), (0,), (1, 2)),
        ("heads head_dim embed", (4, 32, 128), (2,), (0, 1)),
        ("encoder_embed kv_heads head_dim", (128, 4, 32), (0,), (1, 2)),
        ("embed heads head_dim", (128, 3, 32), None, None),
        ("embed mlp", (64, 256), None, None),
        ("norm", (256,), None, None),
        ("buckets heads", (256, 256), None, None),
    ],
)
def test_adafactor_follows_the_equations(names, shape, rows, columns):
    weight = RNG.normal(size=shape).astype(np.float32)
    gradients = RNG.normal(size=(4, *shape)).astype(np.float32) ** 3
    result, _ = ours(names, weight, gradients)
    expected = reference_adafactor(weight, gradients, 0.1, rows, columns)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)


def test_stacked_layers_are_updated_each_as_if_alone():
    weight = RNG.normal(size=(3, 128, 4, 32)).astype(np.float32)
    weight *= np.array([0.01, 1, 100])[:, None, None, None]
    gradients = RNG.normal(size=(3, 3, 128, 4, 32)).astype(np.float32)
    gradients *= np.array([1e-6, 1, 1e3])[None, :, None, None, None]
    together, _ = ours("layers embed heads head_dim", weight, gradients)
    for layer in range(3):
        alone, _ = ours("embed heads head_dim", weight[layer], gradients[:, layer])
        np.testing.assert_allclose(together[layer], alone, rtol=1e-5)


def test_adafactor_is_that_of_optax_where_the_shapes_coincide():
    weight = {"w": jnp.asarray(RNG.normal(size=(160, 130)), jnp.float32)}
    gradients = [{"w": g} for g in RNG.normal(size=(5, 160, 130)).astype(np.float32)]
    theirs = optax.adafactor(0.05, decay_rate=0.8, multiply_by_parameter_scale=True)
    expected, _ = run(theirs, weight, gradients)
    result, _ = ours("vocab embed", weight["w"], [g["w"] for g in gradients], rate=0.05)
    np.testing.assert_allclose(result, expected["w"], rtol=1e-5, atol=1e-6)


def test_a_factored_moment_is_one_row_and_one_column():
    _, state = ours("layers embed mlp", np.ones((2, 128, 256), np.float32), [])
    moment = state.moments["w"]
    assert moment.rows.shape == (2, 128, 1)
    assert moment.columns.shape == (2, 1, 256)
    assert moment.whole is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_model_is_factored_and_nothing_else(family):
    sharding.use_mesh(config.Mesh())
    cfg = toy_model("encoder_decoder", **FAMILIES[family])
    axes = model.axes(cfg)
    settings = adafactor.AdafactorSettings(min_dim_factored=1)
    rule = adafactor.adafactor(optax.constant_schedule(0.1), axes, settings)
    state = jax.eval_shape(rule.init, model.shapes(cfg))
    moments = jax.tree.structure(axes).flatten_up_to(state.moments)
    for names, moment in zip(jax.tree.leaves(axes), moments, strict=True):
        assert (moment.whole is None) == optimizer.is_decayed(names), names


def test_a_zero_gradient_moves_nothing():
    result, _ = ours("embed mlp", np.ones((128, 128), np.float32), np.zeros((2, 128, 128)))
    np.testing.assert_array_equal(result, 1.0)


AXES = {"w": "embed mlp", "norm": "norm"}
WEIGHTS = {
    "w": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
    "norm": jnp.ones((4,), jnp.float32),
}
GRADIENTS = [
    {"w": RNG.normal(size=(4, 6)).astype(np.float32), "norm": np.ones(4, np.float32)}
    for _ in range(3)
]


def test_adamw_is_that_of_optax_and_decays_matrices_only():
    rule = optimizer.make_optimizer(
        config.Optimizer("adamw", weight_decay=0.1), optax.constant_schedule(0.01), AXES
    )
    mask = {"w": True, "norm": False}
    theirs = optax.adamw(0.01, weight_decay=0.1, mask=mask)
    result, expected = run(rule, WEIGHTS, GRADIENTS)[0], run(theirs, WEIGHTS, GRADIENTS)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, expected)


def test_biases_scales_and_position_tables_do_not_decay():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    for family in ("t5gemma", "gpt2", "umt5"):
        layout = "decoder_only" if family == "gpt2" else "encoder_decoder"
        axes = model.axes(toy_model(layout, **FAMILIES[family]))
        for path, names in jax.tree_util.tree_leaves_with_path(axes):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            kept = path.endswith(("norm", "bias", "positions"))
            assert optimizer.is_decayed(names) != kept, path


@pytest.mark.parametrize("name", sorted(optimizer.optax_optimizers()))
def test_every_optimizer_of_optax_moves_the_weights_by_name(name):
    rule = optimizer.make_optimizer(
        config.Optimizer(name, clip_norm=1.0), optax.constant_schedule(0.01), AXES
    )
    result, _ = run(rule, WEIGHTS, GRADIENTS)
    assert not np.array_equal(result["w"], WEIGHTS["w"])
    assert np.isfinite(result["w"]).all()


def test_clipping_limits_the_global_norm():
    rule = optimizer.make_optimizer(
        config.Optimizer("sgd", clip_norm=0.5), optax.constant_schedule(1.0), AXES
    )
    result, _ = run(rule, WEIGHTS, GRADIENTS[:1])
    moved = jax.tree.map(lambda a, b: a - b, result, WEIGHTS)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ValueError, match="adamw"):
        optimizer.make_optimizer(config.Optimizer("adamv"), optax.constant_schedule(1.0), AXES)
    options = config.Optimizer("adafactor", options={"decay": 0.9})
    with pytest.raises(ValueError, match="decay_rate"):
        optimizer.make_optimizer(options, optax.constant_schedule(1.0), AXES)
    options = config.Optimizer("adamw", options={"beta1": 0.9})
    with pytest.raises(ValueError, match="b1"):
        optimizer.make_optimizer(options, optax.constant_schedule(1.0), AXES)


@pytest.mark.parametrize("kind", ["constant", "rsqrt", "linear", "cosine", "wsd"])
def test_a_schedule_rises_to_its_peak_and_stays_between_floor_and_peak(kind):
    cfg = config.Schedule(kind, peak=2.0, warmup=10, floor=0.1)
    rates = np.array([schedules.learning_rate(cfg, 100)(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert rates.max() == pytest.approx(2.0)
    assert (np.diff(rates[10:]) <= 1e-6).all()
    last = {"constant": 2.0, "rsqrt": 2.0 * np.sqrt(10 / 99)}.get(kind, 0.2)
    assert rates[-1] == pytest.approx(last)


def test_wsd_is_stable_until_the_last_part():
    cfg = config.Schedule("wsd", peak=1.0, warmup=10, decay=0.2)
    rate = schedules.learning_rate(cfg, 100)
    assert rate(79) == 1.0
    assert 0 < rate(90) < 1


def test_rsqrt_is_that_of_t5():
    rate = schedules.learning_rate(config.Schedule("rsqrt", peak=0.01, warmup=10_000), 10**6)
    assert rate(40_000) == pytest.approx(1 / np.sqrt(40_000))
