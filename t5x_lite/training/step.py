# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: a pure function of the state and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import config, model
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch, Lesson
from t5x_lite.sharding import spec
from t5x_lite.training import adafactor, divergence, losses
from t5x_lite.training.divergence import Lessons
from t5x_lite.training.parts import Selection
from t5x_lite.training.state import TrainState


class Sums(NamedTuple):
    """Totals over target tokens; divided by `weights` once, whatever the microbatches.

    With a teacher, `divergence` is over the `taught` target tokens on which it has a say.
    """

    objective: jax.Array
    loss: jax.Array
    correct: jax.Array
    weights: jax.Array
    tokens: jax.Array
    divergence: jax.Array | None = None
    taught: jax.Array | None = None


class Metrics(NamedTuple):
    """What one step tells: sums over its tokens, norms, and whether it was skipped.

    `squares` has the squared norm of every weight's gradient, per layer where layers are stacked:
    it says where a gradient was not finite.
    """

    sums: Sums
    learning_rate: jax.Array
    gradient_norm: jax.Array
    skipped: jax.Array
    consecutive: jax.Array
    squares: Any


def make(
    run: config.Run,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axes: Any,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step, a function of state, batch and the teacher's weights (None without one); on
    an accelerator it takes over (donates) the state it is given.

    Its gradient is that of the loss summed over all target tokens of all microbatches and hosts,
    over their number, which is known before the first microbatch: so no pass over the gradient is
    needed to divide it. Dropout keys are fold_in(seed, step). A step whose gradient is
    not finite leaves weights and optimizer as they were.
    """
    selection = Selection(run.train.parts, axes)
    trained_axes = selection.take(axes)
    differentiated = jax.value_and_grad(scored(run, selection, teacher), has_aux=True)

    def step(state: TrainState, batch: Batch, teacher_params: Any = None):
        key = None
        if run.model.dropout > 0:
            key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        sums_and_gradient = functools.partial(differentiated, frozen=(state.params, teacher_params))
        trained = selection.take(state.params)
        sums, gradient = accumulate(sums_and_gradient, trained, batch, key, run.train)
        squares = jax.tree.map(square_sums, gradient, trained_axes)
        count = state.step - state.skipped
        parts = jax.tree.leaves(adafactor.anew(selection.moving(squares, count)))
        norm = jnp.sqrt(sum(jnp.sum(part) for part in parts))
        rate = schedule(count)
        state = advance(optimizer, selection, state, gradient, jnp.isfinite(norm))
        told = (rate, norm, ~jnp.isfinite(norm), state.consecutive, squares)
        return state, Metrics(sums, *told)

    # Donated, all new weights wait in temporary memory for the norm: on CPU its pages are fetched
    # anew each step unless `memory.keep_freed` was called (65 against 48 ms for 1.4M weights;
    # with it 51 and 51, and 4 % less time at 77M).
    return jax.jit(step, donate_argnums=() if jax.default_backend() == "cpu" else 0)


def scored(run: config.Run, selection: Selection, teacher: Teacher | None):
    """What is minimised, as a function of the weights that train: this microbatch's part of the
    objective per target token of all microbatches, and its sums."""
    transformer = model.Transformer(run.model, remat=run.train.remat, unroll=run.train.unroll)

    def objective(trained, batch: Batch, key, total, *, frozen):
        params, teacher_params = frozen
        params = selection.put(params, trained)
        taught = None
        if batch.lesson is not None:
            taught = functools.partial(
                lessons, run.distillation, teacher, teacher_params, batch.lesson
            )
        found = token_sums(transformer, run, params, batch, key, taught)
        return found.objective / total, found

    return objective


def lessons(cfg: config.Distillation, teacher, teacher_params, lesson, logits) -> Lessons:
    """How far the student's logits [b t v] are from what the teacher says."""
    if isinstance(lesson, Lesson):
        said = teachers.logits(teacher, teacher_params, lesson)
        if cfg.top_k is None:
            return Lessons(divergence.whole(logits, said, cfg.temperature), lesson.known)
        ids, log_probabilities = divergence.best(said, cfg.top_k, cfg.temperature)
    else:
        ids, log_probabilities = lesson.ids, lesson.log_probabilities
    found = divergence.of_best(logits, ids, log_probabilities, cfg.temperature)
    return Lessons(found, lesson.known)


def token_sums(transformer, run: config.Run, params, batch: Batch, key, taught) -> Sums:
    """Sums over the target tokens of a batch; only `objective` has a gradient."""
    cfg = run.train
    logits = transformer.apply({"params": params}, batch._replace(lesson=None), key)
    weights = batch.loss_weights.astype(jnp.float32)
    told = losses.cross_entropy(logits, batch.targets, cfg.label_smoothing, cfg.z_loss)
    sums = Sums(
        objective=jnp.sum(told.objective * weights),
        loss=jnp.sum(told.nll * weights),
        correct=jnp.sum(told.correct * weights),
        weights=jnp.sum(weights),
        tokens=tokens(batch),
    )
    if taught is None:
        return sums
    found = taught(logits)
    known = weights * found.known
    return sums._replace(
        objective=jnp.sum(divergence.mixed(told, found, run.distillation) * weights),
        divergence=jnp.sum(found.divergence * known),
        taught=jnp.sum(known),
    )


def tokens(batch: Batch) -> jax.Array:
    """How many positions of a batch are not padding, inputs and targets together."""
    segments = (batch.target_segments, batch.input_segments)
    return sum(jnp.sum((part > 0).astype(jnp.int32)) for part in segments if part is not None)


def accumulate(sums_and_gradient, params, batch: Batch, key, cfg: config.Train):
    """Sums and gradient over all microbatches, one after the other in a scan."""
    total = jnp.maximum(jnp.sum(batch.loss_weights.astype(jnp.float32)), 1)
    if cfg.microbatches == 1:
        (_, sums), gradient = sums_and_gradient(params, batch, key, total)
        return sums, gradient

    def add(totals, microbatch):
        number, rows = microbatch
        own_key = None if key is None else jax.random.fold_in(key, number)
        (_, sums), gradient = sums_and_gradient(params, rows, own_key, total)
        return jax.tree.map(jnp.add, totals, (sums, gradient)), None

    zeros = Sums(*[jnp.zeros(())] * 4, jnp.zeros((), jnp.int32))
    if batch.lesson is not None:
        zeros = zeros._replace(divergence=jnp.zeros(()), taught=jnp.zeros(()))
    totals = (zeros, jax.tree.map(jnp.zeros_like, params))
    numbers = jnp.arange(cfg.microbatches)
    return jax.lax.scan(add, totals, (numbers, split(batch, cfg.microbatches)))[0]


def split(batch: Batch, count: int) -> Batch:
    """Rows [b t ...] as [count b/count t ...]: every count-th row, so that no row changes its
    device."""

    def rows(x):
        shape = (x.shape[0] // count, count, *x.shape[1:])
        axes = "batch whole length" + " whole" * (x.ndim - 2)
        x = jax.lax.reshape(x, shape, out_sharding=spec(axes))
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(rows, batch)


def square_sums(gradient: jax.Array, axes: str) -> jax.Array:
    """Sum of squares, one per layer where the first axis is layers."""
    first = 1 if axes.split()[0] == "layers" else 0
    return jnp.sum(jnp.square(gradient), axis=tuple(range(first, gradient.ndim)))


def advance(
    optimizer: optax.GradientTransformation,
    selection: Selection,
    state: TrainState,
    gradient: Any,
    finite: jax.Array,
) -> TrainState:
    """The next state; weights and optimizer are kept where the gradient is not finite."""
    trained = selection.take(state.params)
    updates, new = optimizer.update(gradient, state.optimizer, trained)
    keep = lambda old, new: jnp.where(finite, new, old)
    add = lambda weight, update: jnp.where(finite, weight + update.astype(weight.dtype), weight)
    return TrainState(
        step=state.step + 1,
        params=selection.put(state.params, jax.tree.map(add, trained, updates)),
        optimizer=jax.tree.map(keep, state.optimizer, new),
        skipped=state.skipped + ~finite,
        consecutive=jnp.where(finite, 0, state.consecutive + 1),
    )
