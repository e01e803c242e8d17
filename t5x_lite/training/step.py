# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: a pure function of the state and a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.kernels import api as kernels
from t5x_lite.model import mixed_precision
from t5x_lite.sharding import spec
from t5x_lite.training import weight_average
from t5x_lite.training.losses import contrastive
from t5x_lite.training.objective import count_units, make_objective, samples_heads, zero_sums
from t5x_lite.training.optimizer.param_groups import Selection
from t5x_lite.training.step_values import StepContext, StepMetrics


def make_step(
    run: TrainingRun,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axes: Any,
    teacher: Teacher | None = None,
) -> jax.stages.Wrapped:
    """Builds the jitted training step.

    Its gradient is that of the loss summed over all target tokens of all microbatches and hosts,
    over their number: as that is known before the first microbatch, no pass over the gradient is
    needed to divide it. Where gradient or update is not finite, weights and optimizer stay.

    Args:
      run: config of the run.
      optimizer: from `optimizer.make_optimizer`.
      schedule: learning rate by the number of steps that were not skipped.
      axes: tree of the axis names of what trains, as `frozen_base.trained_axes` has it.
      teacher: teacher whose logits are computed in the step; None without one.

    Returns:
      step(state, batch, teacher_params=None, base=None) -> (state, StepMetrics); on an accelerator
      it donates the state. With Run.lora, `base` are the frozen weights, as `frozen_base` has them;
      with Run.preferences, `teacher_params` are the reference's, None for those of `base`.
    """
    update = make_batch_update(run, optimizer, schedule, axes, teacher)
    updates = 1 if run.grpo is None else run.grpo.updates

    def step(state: TrainState, batch: Batch, teacher_params: Any = None, base: Any = None):
        context, constants = step_context(run, state), (teacher_params, base)
        batch = contrastive.weigh_pairs(batch) if run.contrastive else batch
        if updates == 1:
            return update(state, batch, context, constants)
        return repeat_updates(update, updates, state, batch, (context, constants))

    # Donated, all new weights wait in temporary memory for the norm: on CPU its pages are fetched
    # anew each step unless `host.keep_freed` was called (65 against 48 ms for 1.4M weights;
    # with it 51 and 51, and 4 % less time at 77M).
    return jax.jit(step, donate_argnums=() if kernels.target_device().platform == "cpu" else 0)


def make_batch_update(
    run: TrainingRun,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axes: Any,
    teacher: Teacher | None,
) -> Callable:
    """Builds one update by a batch: gradient, norm, new weights.

    Args:
      run: config of the run.
      optimizer: from `optimizer.make_optimizer`.
      schedule: learning rate by the number of steps that were not skipped.
      axes: tree of the axis names of what trains.
      teacher: teacher whose logits are computed; None without one.

    Returns:
      update(state, batch, context, constants) -> (state, StepMetrics); `constants` are the weights
      of teacher or reference, and the frozen ones.
    """
    selection = Selection(run.train.param_groups, axes)
    trained_axes = selection.take(axes)
    differentiated = jax.value_and_grad(make_objective(run, selection, teacher), has_aux=True)

    def update(state: TrainState, batch: Batch, context: StepContext, constants: tuple[Any, Any]):
        frozen = (state.params, *constants)
        sums_and_gradient = functools.partial(differentiated, frozen=frozen)
        slots = mixed_precision.gradient_slots(selection.take(state.params), run.model.dtype)
        sums, gradient = accumulate_microbatches(sums_and_gradient, slots, batch, context, run)
        # Widened when all of it is there: else the head's waits in float32 through the backward
        # pass (0.13 GB at the peak of T5 1.1 large).
        gradient = jax.lax.optimization_barrier(gradient)
        squares = jax.tree.map(square_sums, gradient, trained_axes)
        count = state.step - state.skipped
        parts = jax.tree.leaves(mixed_precision.recompute(selection.moving(squares, count)))
        norm = jnp.sqrt(sum(jnp.sum(part) for part in parts))
        state, finite = apply_gradient(optimizer, selection, state, gradient, jnp.isfinite(norm))
        state = weight_average.follow_weights(run.train, selection, state, finite)
        return state, StepMetrics(sums, schedule(count), norm, ~finite, state.consecutive, squares)

    return update


def repeat_updates(
    update: Callable, count: int, state: TrainState, batch: Batch, others: tuple[StepContext, Any]
) -> tuple[TrainState, StepMetrics]:
    """Makes several updates by one batch, which count as one step of one learning rate.

    Args:
      update: (state, batch, context, constants) -> (state, StepMetrics).
      count: number of updates.
      state: state before the step.
      batch: all rows of the step.
      others: context and constants of the step.
    """
    context, constants = others
    counts = {name: getattr(state, name) for name in ("step", "skipped", "consecutive")}

    def repeat(later: TrainState, number: jax.Array):
        later = later._replace(**counts)
        return update(later, batch, context._replace(update=number), constants)

    later, metrics = jax.lax.scan(repeat, state, jnp.arange(count))
    return join_updates(state, later, metrics)


def join_updates(
    before: TrainState, after: TrainState, metrics: StepMetrics
) -> tuple[TrainState, StepMetrics]:
    """State and metrics of a step of several updates.

    Args:
      before: state before the first update.
      after: state after the last one.
      metrics: of each update, stacked.
    """
    skipped = jnp.any(metrics.skipped)
    consecutive = jnp.where(skipped, before.consecutive + 1, 0)
    after = after._replace(skipped=before.skipped + skipped, consecutive=consecutive)
    last = jax.tree.map(lambda x: x[-1], metrics)
    # The squares of the first update that was not finite say where.
    place = jnp.where(skipped, jnp.argmax(metrics.skipped), len(metrics.skipped) - 1)
    return after, last._replace(
        sums=jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics.sums),
        skipped=skipped,
        consecutive=consecutive,
        squares=jax.tree.map(lambda x: x[place], metrics.squares),
    )


def step_context(run: TrainingRun, state: TrainState) -> StepContext:
    """The key fold_in(seed, step) where something is random, and the number of the step."""
    key = None
    rates = [part.dropout for part in (run.model, run.lora, run.model.readout) if part is not None]
    dropout = max(rates) > 0
    matching = run.contrastive is not None and run.contrastive.matching > 0
    stacks = (run.model.encoder, run.model.decoder)
    drawn = any(stack is not None and stack.random_positions for stack in stacks)
    if dropout or matching or drawn or samples_heads(run) or run.train.layer_skip:
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
    return StepContext(key, state.step)


def to_float32(gradient: Any) -> Any:
    """Casts a tree to float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)


def accumulate_microbatches(
    sums_and_gradient, slots, batch: Batch, context: StepContext, run: TrainingRun
):
    """Computes sums and gradient over all microbatches, one after the other in a scan.

    Args:
      sums_and_gradient: the differentiated objective of one microbatch.
      slots: gradient slots of the weights that train.
      batch: all rows of the step on this mesh.
      context: key and number of the step.
      run: config of the run.

    Returns:
      LossSums and the gradient, in the dtype of the slots (float32 with several microbatches).
    """
    cfg = run.train
    total = jnp.maximum(count_units(run, batch), 1)
    if cfg.microbatches == 1:
        (_, sums), gradient = sums_and_gradient(slots, batch, context, total)
        return sums, gradient

    def add(totals, microbatch):
        number, rows = microbatch
        key = None if context.key is None else jax.random.fold_in(context.key, number)
        (_, sums), gradient = sums_and_gradient(slots, rows, context._replace(key=key), total)
        return jax.tree.map(jnp.add, totals, (sums, to_float32(gradient))), None

    zeros = zero_sums(run, batch)
    totals = (zeros, to_float32(jax.tree.map(jnp.zeros_like, slots)))
    numbers = jnp.arange(cfg.microbatches)
    return jax.lax.scan(add, totals, (numbers, split_microbatches(batch, cfg.microbatches)))[0]


def split_microbatches(batch: Batch, count: int) -> Batch:
    """Splits rows [b t ...] into [count b/count t ...]: every count-th row, so that no row changes
    its device."""

    def split_leaf(x):
        shape = (x.shape[0] // count, count, *x.shape[1:])
        axes = "batch whole length" + " whole" * (x.ndim - 2)
        x = jax.lax.reshape(x, shape, out_sharding=spec(axes))
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split_leaf, batch)


def square_sums(gradient: jax.Array, axes: str) -> jax.Array:
    """Sum of squares in float32, one per layer where the first axis is layers."""
    first = 1 if axes.split()[0] == "layers" else 0
    squares = jnp.square(gradient.astype(jnp.float32))
    return jnp.sum(squares, axis=tuple(range(first, gradient.ndim)))


def apply_gradient(
    optimizer: optax.GradientTransformation,
    selection: Selection,
    state: TrainState,
    gradient: Any,
    finite: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """Updates the state; weights and optimizer are kept where gradient or update are not finite.

    Args:
      optimizer: from `optimizer.make_optimizer`.
      selection: the weights that train.
      state: state before the step.
      gradient: gradient of the weights that train.
      finite: bool scalar, of the gradient.

    Returns:
      the state, and a bool scalar: gradient and update are finite.
    """
    trained = selection.take(state.params)
    updates, new = optimizer.update(to_float32(gradient), state.optimizer, trained)
    # A rate may be infinite, or a product with it too large.
    for update in jax.tree.leaves(updates):
        finite &= jnp.all(jnp.isfinite(update))

    def add(weight, update):
        return jnp.where(finite, weight + update.astype(weight.dtype), weight)

    def keep(old, new):
        return jnp.where(finite, new, old)

    state = state._replace(
        step=state.step + 1,
        params=selection.put(state.params, jax.tree.map(add, trained, updates)),
        optimizer=jax.tree.map(keep, state.optimizer, new),
        skipped=state.skipped + ~finite,
        consecutive=jnp.where(finite, 0, state.consecutive + 1),
    )
    return state, finite
