# SPDX-License-Identifier: Apache-2.0
"""Laws of LayerSkip: the objective, which rows skip which layers, and early exits that draft."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model
from test_decoding_loop import NEVER, use_one_device
from test_training_step import CUBE, DATA, assert_same

from t5x_lite import config, decoding, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import train_state
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.protocol import chain
from t5x_lite.training import objective, optimizer, step
from t5x_lite.training.losses import early_exit
from t5x_lite.training.step_values import StepContext

LAYERS = 3


def make_run(cfg: config.Model, skip: config.LayerSkip | None, **train) -> config.Run:
    settings = dict(steps=200, batch_size=16, z_loss=0.0, layer_skip=skip) | train
    return config.Run("unused", cfg, train=config.Train(**settings))


@functools.cache
def lively(layout: str):
    """Returns a toy of LAYERS layers, and weights that differ from layer to layer."""
    cfg = toy_model(layout, layers=LAYERS)
    sharding.use_mesh(DATA)
    random = np.random.default_rng(1)

    def draw(shape):
        return (0.3 * random.normal(size=shape.shape)).astype(np.float32)

    return cfg, jax.tree.map(draw, model.shapes(cfg))


def with_layers(cfg: config.Model, params, which):
    """Returns the model cfg with the layers `which` alone in its decoder, and its weights from
    params."""
    stack = dataclasses.replace(cfg.decoder, layers=len(which))
    layers = jax.tree.map(lambda stacked: stacked[np.array(which)], params["decoder"]["layers"])
    params = params | {"decoder": params["decoder"] | {"layers": layers}}
    return dataclasses.replace(cfg, decoder=stack), params


def place_weight(weight, shape):
    return jax.device_put(weight, shape.sharding)


def hidden_of(cfg, params, batch):
    sharding.use_mesh(DATA)
    apply = jax.jit(
        lambda params, batch: model.Transformer(cfg).apply(
            {"params": params}, batch, method=model.Transformer.hidden
        )
    )
    return apply(params, sharding.place_batch(batch))


def skipping(cfg, params, batch, rates, mesh=DATA):
    """Returns hidden states and those after every layer, with rates to skip.

    Args:
      cfg: the model.
      params: its weights.
      batch: rows to read.
      rates: probability to skip each layer.
      mesh: the mesh.
    """
    sharding.use_mesh(mesh)

    @jax.jit
    def apply(params, batch, rates):
        key = jax.random.key(0)
        transformer = model.Transformer(cfg)
        return transformer.apply(
            {"params": params}, batch, key, rates, method=model.Transformer.hidden_with_layer_skip
        )

    params = jax.tree.map(place_weight, params, model.shapes(cfg))
    rates = np.array(rates, np.float32)
    return jax.device_get(apply(params, sharding.place_batch(batch), rates))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"])
)
def test_objective_and_gradient_are_those_of_all_shorter_models(layout):
    """After n layers the exit is the model that has n layers, unrolled."""
    (cfg, weights), batch = lively(layout), toy_batch(layout, rows=16)
    skip = config.LayerSkip(dropout=0.0, exits=0.5)
    moment = StepContext(jax.random.key(0))

    def skipped(params, batch):
        run = make_run(cfg, skip, label_smoothing=0.1)
        return objective.token_sums(
            model.Transformer(cfg), run, params, batch, moment, None
        ).objective

    def shorter(params, batch):
        total, factors = 0.0, np.array([0.5, 1.5, 4.5]) / 6.5
        for count, factor in enumerate(factors, start=1):
            short, part = with_layers(cfg, params, range(count))
            run = make_run(short, None, label_smoothing=0.1)
            unrolled, part = model.Transformer(short, scan=False), model.unstack(part)
            sums = objective.token_sums(unrolled, run, part, batch, StepContext(), None)
            total += factor * sums.objective
        return total

    sharding.use_mesh(DATA)
    placed = sharding.place_batch(batch)
    value, gradient = jax.jit(jax.value_and_grad(skipped))(weights, placed)
    expected, expected_gradient = jax.jit(jax.value_and_grad(shorter))(weights, placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same(gradient, expected_gradient, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["decoder_only"])
)
def test_a_row_that_skips_a_layer_has_the_states_of_the_model_without_it(layout):
    (cfg, weights), batch = lively(layout), toy_batch(layout)
    for rates, left in (([0, 1, 0], [0, 2]), ([0, 0, 0], [0, 1, 2])):
        hidden, states = skipping(cfg, weights, batch, rates)
        expected = hidden_of(*with_layers(cfg, weights, left), batch)
        np.testing.assert_allclose(hidden, expected, atol=1e-5)
        assert states.shape == (LAYERS, *hidden.shape)


@pytest.mark.slow
def test_rows_skip_layers_at_the_rates_independently_on_any_mesh():
    cfg, weights = lively("decoder_only")
    batch, rates = toy_batch("decoder_only", rows=512, length=10), (0.3, 0.0, 0.5)
    _, states = skipping(cfg, weights, batch, rates)
    _, first = skipping(cfg, weights, batch, (1.0, 0.0, 1.0))
    before = np.stack([np.zeros_like(first[0]), *states[:-1]])
    before[0] = first[0]
    skipped = (before == states).all(axis=(2, 3))
    error = 4 * np.sqrt(0.25 / 512)
    np.testing.assert_allclose(skipped.mean(axis=1), rates, atol=error)
    together = (skipped[0] & skipped[2]).mean()
    assert abs(together - 0.15) < error
    _, split = skipping(cfg, weights, batch, rates, CUBE)
    np.testing.assert_allclose(split, states, atol=1e-5)


def test_chances_and_weights_rise_as_in_the_paper():
    """Its equations with a loop; layers counted from 1 in the weights."""
    cfg = config.LayerSkip(dropout=0.2, exits=0.3)
    rise = [np.exp(layer * np.log(2) / 4) - 1 for layer in range(5)]
    np.testing.assert_allclose(cfg.chances(5), 0.2 * np.array(rise))
    np.testing.assert_allclose(cfg.factors(5), [0.3, 0.9, 1.8, 3.0, 5 + 3.0])
    train = config.Train(100, 8, layer_skip=dataclasses.replace(cfg, rising=True))
    for at in (0, 50, 100):
        grown = np.exp(at / 100 * np.log(2)) - 1
        rates = early_exit.skip_rates(train, 5, np.int32(at))
        np.testing.assert_allclose(rates, grown * np.array(cfg.chances(5)), rtol=1e-5)


@pytest.mark.parametrize("layers, rotation", [(2, 1), (5, 1), (6, 2), (6, 4), (7, 3)])
def test_every_layer_has_its_turn_to_exit_and_shares_sum_to_one(layers, rotation):
    cfg, turns = config.LayerSkip(rotation=rotation), []
    factors = cfg.factors(layers)
    for at in range(rotation):
        last, shares, which = map(np.asarray, early_exit.exit_weights(cfg, layers, np.int32(at)))
        np.testing.assert_allclose(last + shares.sum(), 1, rtol=1e-6)
        counted = which[shares > 0].tolist()
        expected = [factors[layer] / factors[-1] for layer in counted]
        np.testing.assert_allclose(shares[shares > 0] / last, expected, rtol=1e-5)
        turns += counted
    assert sorted(turns) == list(range(layers - 1))


ORDER = np.random.default_rng(5).permutation(np.arange(2, 64))


def counted_on(row: np.ndarray, length: int) -> np.ndarray:
    """Rows that go through ORDER in the steps of their first two tokens: [b length]."""
    start, stride = row % 62, 1 + row % 3
    return ORDER[(start[:, None] + stride[:, None] * np.arange(length)) % 62].astype(np.int32)


def batch_of(seed: int, rows: int = 32, length: int = 12) -> Batch:
    row = np.random.default_rng(seed).integers(0, 62 * 3, rows)
    targets = counted_on(row, length)
    where = np.broadcast_to(np.arange(length, dtype=np.int32), targets.shape).copy()
    weights = (where >= 2).astype(np.float32)
    return Batch(targets, np.ones_like(targets), where, weights, prefix=where < 2)


CFG = toy_model("decoder_only", layers=4, embed=32, mlp=64, positions="rotary")


def trainer(skip: config.LayerSkip | None):
    """advance(state, from, to) -> the state after the steps between, and their losses; and how a
    state begins."""
    sharding.use_mesh(DATA)
    run = make_run(CFG, skip, batch_size=32)
    axes, schedule = model.axes(CFG), lambda step: 0.01
    update = optimizer.make_optimizer(config.Optimizer("adamw"), schedule, axes, ())
    advance = step.make_step(run, update, schedule, axes)

    def through(now, first, last):
        sharding.use_mesh(DATA)
        losses = []
        for number in range(first, last):
            now, metrics = advance(now, sharding.place_batch(batch_of(number)))
            losses.append(float(metrics.sums.objective / metrics.sums.weights))
        return now, losses

    def begin(params):
        sharding.use_mesh(DATA)
        placed = jax.tree.map(place_weight, params, model.shapes(CFG))
        return train_state.begin_state(placed, update)

    return through, begin


@pytest.fixture(scope="module")
def learned():
    """Weights after plain training, and how to go on: plainly, and with LayerSkip."""
    through, begin = trainer(None)
    new = jax.device_get(model.initialize(CFG, jax.random.key(0)))
    now, _ = through(begin(new), 0, 150)
    return now, through


def count_steps(params) -> int:
    """Counts the steps, with drafts of the first layer, of 8 rows of 16 new tokens."""
    use_one_device()
    decode = config.Decode(max_new_tokens=16)
    examples = counted_on(np.arange(8) * 19, 3).tolist()
    request = decoding.make_request(CFG, examples, decode, eos=NEVER)
    prepared = decoding.prepare_params(CFG, jax.device_get(params))
    drafting = decoding.Drafting(EarlyExit(1, chain(4)))
    result = decoding.generate(CFG, prepared, request, decode, drafting)
    plain = decoding.generate(CFG, prepared, request, decode)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    return result.token_step.max(axis=(1, 2)).mean() + 1


@pytest.mark.slow
def test_early_exits_draft_better_after_training_and_a_stop_changes_no_loss(learned):
    now, through = learned
    skip = config.LayerSkip(dropout=0.1, exits=0.5, rotation=2)
    skipped, begin = trainer(skip)
    half, early = skipped(begin(jax.device_get(now.params)), 150, 170)
    trained, late = skipped(half, 170, 230)
    _, again = skipped(half, 170, 172)
    assert again == late[:2]
    longer, _ = through(now, 150, 230)
    assert late[-1] < early[0]
    assert count_steps(trained.params) < 0.7 * count_steps(longer.params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: config.LayerSkip(dropout=1.0), "LayerSkip.dropout"),
        (lambda: config.LayerSkip(exits=-1), "LayerSkip.exits"),
        (lambda: config.LayerSkip(rotation=0), "LayerSkip.rotation"),
        (
            lambda: make_run(toy_model("decoder_only", layers=1), config.LayerSkip()),
            "2 layers; got 1",
        ),
        (lambda: make_run(toy_model("encoder_only"), config.LayerSkip()), "decoder's layers"),
        (lambda: make_run(CFG, config.LayerSkip(rotation=4)), "3 layers that can exit"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
