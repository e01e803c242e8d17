# SPDX-License-Identifier: Apache-2.0
"""Laws of the cross entropy that never holds its logits."""

import dataclasses
import functools

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from jax.sharding import PartitionSpec as P

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.vocabulary import chunked
from t5x_lite.kernels.vocabulary import config as vocabulary_config
from t5x_lite.kernels.vocabulary.cross_entropy import chunked_cross_entropy, fused_cross_entropy
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig

CONFIGS = [
    CrossEntropyConfig(tied=True),
    CrossEntropyConfig(tied=False, smoothing=0.1, z_loss=1e-2),
    CrossEntropyConfig(tied=True, smoothing=0.1, z_loss=1e-2, softcap=3.0, scale=0.25),
    CrossEntropyConfig(tied=False, softcap=2.0, scale=0.5),
]


FORMS = {
    "chunked": chunked_cross_entropy,
    "fused": lambda *x: fused_cross_entropy(*x, chips.backend_for("tpu")),
}


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that a toy has several."""
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(chunked, "MIN_ROWS", 16)
    monkeypatch.setattr(vocabulary_config, "ROWS", 256)
    monkeypatch.setattr(vocabulary_config, "IDS", 256)


@pytest.fixture(params=FORMS)
def form(request, small):
    return FORMS[request.param]


def drawn(config, rows=150, width=24, vocab=211, seed=0, dtype=jnp.float32):
    """Hidden states, a table, targets and the objective's gradient.

    Args:
      config: of the losses.
      rows: number of targets.
      width: of the hidden states.
      vocab: size of the vocabulary.
      seed: of the draw.
      dtype: of hidden states and table.
    """
    draw = np.random.default_rng(seed)
    shape = (vocab, width) if config.tied else (width, vocab)
    hidden = jnp.asarray(draw.normal(size=(rows, width)), dtype)
    table = jnp.asarray(draw.normal(size=shape), dtype)
    targets = jnp.asarray(draw.integers(0, vocab, rows), jnp.int32)
    return hidden, table, targets, jnp.asarray(draw.normal(size=rows), jnp.float32)


def reference(hidden, table, targets, gradient, config):
    """Objective, nll, correct, and the gradients of the objective, in float64.

    Args:
      hidden: [r d] hidden states.
      table: [v d] or [d v].
      targets: [r] ids.
      gradient: [r] of the objective.
      config: of the losses.
    """
    x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (hidden, table))
    w = w if config.tied else w.T
    raw = config.scale * x @ w.T
    logits = raw if config.softcap is None else config.softcap * np.tanh(raw / config.softcap)
    hit = np.arange(len(w)) == np.asarray(targets)[:, None]
    soft = np.where(hit, 1 - config.smoothing, config.smoothing / (len(w) - 1))
    m = logits.max(-1)
    log_z = m + np.log(np.exp(logits - m[:, None]).sum(-1))
    entropy = -(soft * np.log(np.where(soft > 0, soft, 1))).sum(-1)
    objective = (soft * (log_z[:, None] - logits)).sum(-1) - entropy + config.z_loss * log_z**2
    nll = log_z - (logits * hit).sum(-1)
    dlogits = np.exp(logits - log_z[:, None]) * (1 + 2 * config.z_loss * log_z)[:, None] - soft
    dlogits = dlogits * np.asarray(gradient, np.float64)[:, None] * config.scale
    if config.softcap is not None:
        dlogits = dlogits * (1 - (logits / config.softcap) ** 2)
    dtable = dlogits.T @ x
    correct = logits.argmax(-1) == np.asarray(targets)
    return (objective, nll, correct), (dlogits @ w, dtable if config.tied else dtable.T)


def near(ours, exact, tolerance):
    """Checks that ours is within tolerance of the largest value of exact."""
    ours = np.asarray(ours.astype(jnp.float32), np.float64)
    assert np.max(np.abs(ours - exact)) <= tolerance * np.max(np.abs(exact))


@functools.partial(jax.jit, static_argnums=(0, 2))
def losses_and_gradients(form, arrays, config):
    """Losses and gradients that a form of cross entropy with a config computes of arrays."""
    hidden, table, targets, gradient = arrays

    def losses(hidden, table):
        return form(hidden, table, targets, config)

    _, pull = jax.vjp(lambda hidden, table: losses(hidden, table).objective, hidden, table)
    return losses(hidden, table), pull(gradient)


def agree(form, arrays, config, value=2e-6, gradient_tolerance=1e-5):
    losses, gradients = losses_and_gradients(form, arrays, config)
    exact, of_exact = reference(*arrays, config)
    near(losses.objective, exact[0], value)
    near(losses.nll, exact[1], value)
    np.testing.assert_array_equal(losses.correct, exact[2])
    for ours, theirs in zip(gradients, of_exact, strict=True):
        near(ours, theirs, gradient_tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_losses_and_gradients_are_those_of_the_logits_written_out(form, config):
    agree(form, drawn(config), config)


def with_bias(config, arrays, seed=3):
    """A bias drawn by seed, and arrays whose products, scaled as config says, have it as one more
    column of the table."""
    hidden, table, targets, gradient = arrays
    bias = 2 * np.random.default_rng(seed).normal(size=table.shape[0 if config.tied else 1])
    bias = jnp.asarray(bias, jnp.float32)
    ones = jnp.full((len(hidden), 1), 1 / config.scale)
    column = bias[:, None] if config.tied else bias[None]
    table = jnp.concatenate([table, column], axis=1 if config.tied else 0)
    return bias, (jnp.concatenate([hidden, ones], axis=1), table, targets, gradient)


def agree_with_bias(form, config, reference_config, **sizes):
    """Losses and the three gradients of logits with a bias are those in float64.

    Args:
      form: the function under test.
      config: of its logits.
      reference_config: the same without a split vocabulary.
      **sizes: of `drawn`.
    """
    hidden, table, targets, gradient = arrays = drawn(config, **sizes)
    bias, widened = with_bias(config, arrays)

    @jax.jit
    def losses_and_pulled(hidden, table, bias):
        losses, pull = jax.vjp(lambda *x: form(*x[:2], targets, config, x[2]), hidden, table, bias)
        zeros = jax.tree.map(jnp.zeros_like, losses._replace(correct=gradient))
        zeros = zeros._replace(correct=np.zeros(gradient.shape, jax.dtypes.float0))
        return losses, pull(zeros._replace(objective=gradient))

    losses, (dhidden, dtable, dbias) = losses_and_pulled(hidden, table, bias)
    exact, (exact_hidden, exact_table) = reference(*widened, reference_config)
    near(losses.objective, exact[0], 2e-6)
    near(losses.nll, exact[1], 2e-6)
    np.testing.assert_array_equal(losses.correct, exact[2])
    exact_table = exact_table if config.tied else exact_table.T
    near(dhidden, exact_hidden[:, :-1], 1e-5)
    near(dtable if config.tied else dtable.T, exact_table[:, :-1], 1e-5)
    # The column's gradient is that of bias / scale, as hidden states hold 1 / scale there.
    near(dbias, exact_table[:, -1], 1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_bias_is_added_before_the_softcap(small, config):
    agree_with_bias(chunked_cross_entropy, config, config)


@pytest.mark.parametrize("checked", [True, False])
def test_a_bias_is_split_with_the_vocabulary(small, checked):
    mesh = chips.mesh((2, 4), ("data", "tensor"))
    whole = CrossEntropyConfig(True, smoothing=0.1, z_loss=1e-2, softcap=3.0, scale=0.25)
    split = dataclasses.replace(whole, axes=("tensor",))
    rows, table = P("data"), P("tensor")

    def placed(hidden, weights, targets, config, bias):
        return jax.shard_map(
            lambda *x: chunked_cross_entropy(*x[:3], config, x[3]),
            mesh=mesh,
            in_specs=(rows, table, rows, table),
            out_specs=rows,
            check_vma=checked,
        )(hidden, weights, targets, bias)

    agree_with_bias(placed, split, whole, rows=300, vocab=1200)


def test_bfloat16_operands_lose_nothing_but_their_own_rounding(form):
    config = CONFIGS[2]
    agree(form, drawn(config, dtype=jnp.bfloat16), config, gradient_tolerance=1e-2)


def test_a_target_outside_the_vocabulary_is_never_hit(form):
    hidden, table, targets, gradient = drawn(CONFIGS[1])
    losses, _ = losses_and_gradients(
        form, (hidden, table, jnp.full_like(targets, 211), gradient), CONFIGS[1]
    )
    np.testing.assert_array_equal(losses.correct, False)
    assert np.isfinite(losses.objective).all()


def test_a_tie_for_the_best_logit_is_not_correct(form):
    hidden, table, targets, gradient = drawn(CONFIGS[0])
    same = jnp.zeros_like(hidden), table, targets, gradient
    losses, _ = losses_and_gradients(form, same, CONFIGS[0])
    np.testing.assert_array_equal(losses.correct, False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name, checked", [("chunked", True), ("chunked", False), ("fused", False)])
def test_a_split_vocabulary_and_split_rows_change_nothing(small, name, checked, tied):
    mesh = chips.mesh((2, 4), ("data", "tensor"))
    whole = CrossEntropyConfig(tied, smoothing=0.1, z_loss=1e-2, softcap=3.0, scale=0.25)
    split = dataclasses.replace(whole, axes=("tensor",))
    rows, table = P("data"), P("tensor") if tied else P(None, "tensor")

    def placed(hidden, weights, targets, config):
        return jax.shard_map(
            lambda hidden, weights, targets: FORMS[name](hidden, weights, targets, config),
            mesh=mesh,
            in_specs=(rows, table, rows),
            out_specs=rows,
            check_vma=checked,
        )(hidden, weights, targets)

    agree(placed, drawn(whole, rows=300, vocab=1200), split)


def test_a_row_alone_has_the_losses_it_has_among_others(form):
    hidden, table, targets, gradient = drawn(CONFIGS[1])
    many, of_many = losses_and_gradients(form, (hidden, table, targets, gradient), CONFIGS[1])
    one, of_one = losses_and_gradients(
        form, (hidden[:1], table, targets[:1], gradient[:1]), CONFIGS[1]
    )
    np.testing.assert_allclose(one.objective, many.objective[:1], rtol=2e-6)
    near(of_one[0], np.asarray(of_many[0][:1], np.float64), 2e-6)


def test_the_logits_are_never_held(monkeypatch):
    config, rows, vocab = CrossEntropyConfig(tied=True, smoothing=0.1, z_loss=1e-2), 2048, 4096
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 1 << 19)
    hidden, table, targets, _ = drawn(config, rows, 8, vocab)

    def objective(hidden, table):
        return chunked_cross_entropy(hidden, table, targets, config).objective.sum()

    memory = jax.jit(jax.value_and_grad(objective, (0, 1))).lower(hidden, table).compile()
    logits = 4 * rows * vocab
    # A chunk is a sixteenth; three of its size are alive together.
    assert memory.memory_analysis().temp_size_in_bytes < logits / 4


def test_a_width_that_no_tile_holds_is_refused():
    hidden = jnp.zeros((256, 8192))
    with pytest.raises(ValueError, match="width 8192 do not fit the fast memory of a TPU v4"):
        vocabulary_config.choose_tiles(hidden, 256, Backend("tpu", 4))


def test_a_finite_difference_agrees_with_the_gradient(form):
    config = CONFIGS[2]
    hidden, table, targets, gradient = drawn(config)

    @jax.jit
    def objective(hidden):
        return jnp.vdot(form(hidden, table, targets, config).objective, gradient)

    way = jnp.asarray(np.random.default_rng(1).normal(size=hidden.shape), jnp.float32)
    step = 1e-2
    difference = (objective(hidden + step * way) - objective(hidden - step * way)) / (2 * step)
    np.testing.assert_allclose(difference, jnp.vdot(jax.grad(objective)(hidden), way), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tied",
    mark_exhaustive(
        [(dtype, tied) for dtype in (jnp.float32, jnp.bfloat16) for tied in (True, False)],
        kept=[(jnp.float32, False), (jnp.bfloat16, True)],
    ),
)
def test_random_configs_targets_and_logits_agree_with_the_reference(form, tied, dtype):
    gradient_tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for seed in range(10):
        draw = np.random.default_rng(seed)
        smoothing, z_loss = draw.choice([0, 0.1, 0.5]), draw.choice([0, 1e-4, 1e-2])
        softcap, scale = draw.choice([None, 10.0, 30.0]), draw.choice([1.0, 24**-0.5])
        config = CrossEntropyConfig(tied, float(smoothing), float(z_loss), softcap, float(scale))
        rows, vocab = draw.choice([(9, 5), (150, 211), (300, 640), (37, 129)])
        for repeat in range(6):
            arrays = drawn(config, int(rows), 24, int(vocab), repeat, dtype)
            agree(form, arrays, config, gradient_tolerance=gradient_tolerance)
