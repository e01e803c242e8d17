# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: a pure function of the state and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import config, kernels, model, narrow, sharding
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch, Lesson
from t5x_lite.sharding import batch_shards, spec
from t5x_lite.training import adafactor, divergence, exits, head_losses, losses
from t5x_lite.training.divergence import Lessons
from t5x_lite.training.parts import Selection
from t5x_lite.training.state import TrainState

# Above this many bytes of float32 logits on a device, making them again for the backward pass (a
# third more work in the last product) is the smaller evil.
MOST_LOGITS = 1 << 30
# Folded into the step's key, which dropout splits, for the draw of a head.
DRAWING = 1 << 31


class Sums(NamedTuple):
    """Totals over target tokens; divided by `weights` once, whatever the microbatches.

    With a teacher, `divergence` is over the `taught` target tokens on which it has a say. With
    Model.blockwise, `guessed` counts the tokens that their heads were right about, of `guesses`.
    """

    objective: jax.Array
    loss: jax.Array
    correct: jax.Array
    weights: jax.Array
    tokens: jax.Array
    divergence: jax.Array | None = None
    taught: jax.Array | None = None
    guessed: jax.Array | None = None
    guesses: jax.Array | None = None


class Moment(NamedTuple):
    """Where a run is: the key of what is drawn there (None: nothing is), and the step."""

    key: jax.Array | None = None
    step: jax.Array | int = 0


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
        if run.model.dropout > 0 or draws_heads(run) or run.train.layer_skip:
            key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        sums_and_gradient = functools.partial(differentiated, frozen=(state.params, teacher_params))
        asked = narrow.slots(selection.take(state.params), run.model.activations)
        sums, gradient = accumulate(sums_and_gradient, asked, batch, Moment(key, state.step), run)
        # Widened when all of it is there: else the head's waits in float32 through the backward
        # pass (0.13 GB at the peak of T5 1.1 large).
        gradient = jax.lax.optimization_barrier(gradient)
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
    return jax.jit(step, donate_argnums=() if kernels.device()[0] == "cpu" else 0)


def scored(run: config.Run, selection: Selection, teacher: Teacher | None):
    """What is minimised, as a function of the slots of the weights that train (`narrow.slots`):
    this microbatch's part of the objective per target token of all microbatches, and its sums."""
    transformer = model.Transformer(run.model, remat=run.train.remat, unroll=run.train.unroll)

    def objective(asked, batch: Batch, moment: Moment, total, *, frozen):
        params, teacher_params = frozen
        params = selection.put(params, narrow.joined(selection.take(params), asked))
        taught = None
        if batch.lesson is not None:
            taught = functools.partial(
                lessons, run.distillation, teacher, teacher_params, batch.lesson
            )
        found = token_sums(transformer, run, params, batch, moment, taught)
        return found.objective / total, found

    return objective


def draws_heads(run: config.Run) -> bool:
    """Whether each microbatch trains one head that is drawn."""
    return run.model.blockwise is not None and run.train.heads.heads == "random"


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


@sharding.split_rows()
def token_sums(transformer, run: config.Run, params, batch: Batch, moment: Moment, taught) -> Sums:
    """Sums over the target tokens of a batch; only `objective` has a gradient."""
    cfg = run.train
    weights = on_rows(batch.loss_weights.astype(jnp.float32))
    how = (cfg.label_smoothing, cfg.z_loss)
    apply = functools.partial(transformer.apply, {"params": params})
    pieces = in_pieces(run, batch)
    read = functools.partial(token_losses, apply, how, pieces)
    hidden, early = hidden_and_early(apply, run, batch._replace(lesson=None), moment)
    if taught is None:
        told = read(hidden, batch.targets)
    else:
        logits = apply(hidden, method="logits")
        told = losses.cross_entropy(logits, batch.targets, *how)
    sums = Sums(
        objective=jnp.sum(told.objective * weights),
        loss=jnp.sum(told.nll * weights),
        correct=jnp.sum(told.correct * weights),
        weights=jnp.sum(weights),
        tokens=tokens(batch),
    )
    if taught is not None:
        found = taught(logits)
        known = weights * found.known
        sums = sums._replace(
            objective=jnp.sum(divergence.mixed(told, found, run.distillation) * weights),
            divergence=jnp.sum(found.divergence * known),
            taught=jnp.sum(known),
        )
    if early is not None:
        own, added = exits.objective(apply, read, early, batch)
        sums = sums._replace(objective=own * sums.objective + added)
    if run.model.blockwise is None:
        return sums
    guesser = head_losses.Guesser(apply, read, run.model.blockwise, cfg.heads)
    return with_heads(sums, guesser, hidden, batch, moment.key if draws_heads(run) else None)


def hidden_and_early(apply, run: config.Run, batch: Batch, moment: Moment):
    """What the logits of batch are read from, and with LayerSkip what its exits are (or None)."""
    if run.train.layer_skip is None:
        return apply(batch, moment.key, method="hidden"), None
    layers = run.model.decoder.layers
    rates = exits.rates(run.train, layers, moment.step)
    hidden, states = apply(batch, moment.key, rates, method="skipping")
    return hidden, exits.Early(states, exits.shares(run.train.layer_skip, layers, moment.step))


def with_heads(sums: Sums, guesser: head_losses.Guesser, hidden, batch: Batch, key) -> Sums:
    """sums with the heads' share of the objective, and what they guessed right."""
    own = guesser.loss.factors(guesser.heads.count)[0]
    drawing = None if key is None else jax.random.fold_in(key, DRAWING)
    found = head_losses.sums(guesser, hidden, batch, drawing)
    return sums._replace(
        objective=own * sums.objective + found.objective,
        guessed=found.correct,
        guesses=found.weights,
    )


def token_losses(apply, how: tuple[float, float], pieces: bool, hidden, targets):
    """The losses [b t] of targets, each read from its hidden."""
    if pieces:
        return apply(hidden, on_rows(targets), *how, method="losses")
    return losses.cross_entropy(apply(hidden, method="logits"), on_rows(targets), *how)


def on_rows(x: jax.Array) -> jax.Array:
    """x [b t] placed as rows are that train: split along their length too (Mesh.context)."""
    return jax.reshard(x, spec("batch length"))


def in_pieces(run: config.Run, batch: Batch) -> bool:
    """Whether the loss is to be computed without the logits of all targets at once."""
    wish = run.train.cross_entropy
    if wish != "auto":
        return wish == "pieces"
    bytes_whole = 4 * batch.targets.size * run.model.vocab / batch_shards()
    return kernels.chosen(run.model.attention) is not None or bytes_whole > MOST_LOGITS


def tokens(batch: Batch) -> jax.Array:
    """How many positions of a batch are not padding, inputs and targets together."""
    segments = (batch.target_segments, batch.input_segments)
    return sum(jnp.sum((part > 0).astype(jnp.int32)) for part in segments if part is not None)


def widened(gradient: Any) -> Any:
    return jax.tree.map(lambda slope: slope.astype(jnp.float32), gradient)


def accumulate(sums_and_gradient, asked, batch: Batch, moment: Moment, run: config.Run):
    """Sums and gradient over all microbatches, one after the other in a scan."""
    cfg = run.train
    total = jnp.maximum(jnp.sum(batch.loss_weights.astype(jnp.float32)), 1)
    if cfg.microbatches == 1:
        (_, sums), gradient = sums_and_gradient(asked, batch, moment, total)
        return sums, gradient

    def add(totals, microbatch):
        number, rows = microbatch
        key = None if moment.key is None else jax.random.fold_in(moment.key, number)
        own = moment._replace(key=key)
        (_, sums), gradient = sums_and_gradient(asked, rows, own, total)
        return jax.tree.map(jnp.add, totals, (sums, widened(gradient))), None

    zeros = Sums(*[jnp.zeros(())] * 4, jnp.zeros((), jnp.int32))
    if batch.lesson is not None:
        zeros = zeros._replace(divergence=jnp.zeros(()), taught=jnp.zeros(()))
    if run.model.blockwise is not None:
        zeros = zeros._replace(guessed=jnp.zeros(()), guesses=jnp.zeros(()))
    totals = (zeros, widened(jax.tree.map(jnp.zeros_like, asked)))
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
    wide = gradient.astype(jnp.float32)
    return jnp.sum(jnp.square(wide), axis=tuple(range(first, gradient.ndim)))


def advance(
    optimizer: optax.GradientTransformation,
    selection: Selection,
    state: TrainState,
    gradient: Any,
    finite: jax.Array,
) -> TrainState:
    """The next state; weights and optimizer are kept where the gradient is not finite."""
    trained = selection.take(state.params)
    updates, new = optimizer.update(widened(gradient), state.optimizer, trained)
    keep = lambda old, new: jnp.where(finite, new, old)
    add = lambda weight, update: jnp.where(finite, weight + update.astype(weight.dtype), weight)
    return TrainState(
        step=state.step + 1,
        params=selection.put(state.params, jax.tree.map(add, trained, updates)),
        optimizer=jax.tree.map(keep, state.optimizer, new),
        skipped=state.skipped + ~finite,
        consecutive=jnp.where(finite, 0, state.consecutive + 1),
    )
