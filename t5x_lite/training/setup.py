# SPDX-License-Identifier: Apache-2.0
"""Assembly of a run from its config, with the checks that need data or devices."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from t5x_lite import adaptation, config, data, model, processes, sharding
from t5x_lite.adaptation import distilled_batches, vocabulary_compatibility
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import matching, train_state, weights
from t5x_lite.checkpoints.checkpoint_io import CheckpointError, DamagedCheckpointError
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.checkpoints.weights import HEADS, READOUT
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.decoding.companions.rows import check_companion
from t5x_lite.decoding.drafters import registry
from t5x_lite.decoding.request import check_row_lengths
from t5x_lite.evaluation.evaluate import (
    Evaluator,
    check_metrics,
    has_predictions,
    measured_names,
)
from t5x_lite.tokenizers.labels import largest_id_count
from t5x_lite.training import flops, frozen_base, optimizer, schedules, step, weight_average
from t5x_lite.training.frozen_base import FrozenBase
from t5x_lite.training.reference import ReferenceModel, find_reference
from t5x_lite.training.reporting import overview
from t5x_lite.training.rollouts import Sampler, check_grpo
from t5x_lite.utils.nearest import suggest

log = logging.getLogger(__name__)


class AssembledRun(NamedTuple):
    """A run whose mesh is set and whose data are open; nothing is computed yet.

    Attributes:
      run: config of the run.
      batches: `data.Batches`, or DistilledBatches with a teacher.
      vocabularies: of inputs and targets.
      optimizer: optax transformation of the weights that train.
      schedule: learning rate by step.
      shapes: TrainState of jax.ShapeDtypeStruct, with placements.
      step: jitted step, from `step.make_step`.
      teacher: teacher, or reference model, whose weights the step needs; None without one.
      sampler: draws the samples of each step from its batch; None for a run that reads its batches.
    """

    run: TrainingRun
    batches: Any
    vocabularies: tuple
    optimizer: Any
    schedule: Any
    shapes: TrainState
    step: Any
    teacher: Teacher | ReferenceModel | None = None
    sampler: Sampler | None = None

    def first_batch(self, step: int) -> Batch:
        """A batch of the shapes of every step, for the compiler; that of `step` if it is read."""
        return self.batches.at(step) if self.sampler is None else self.sampler.empty_batch()

    def draw_batch(self, step: int, batch: Batch, weights: tuple[Any, Any], meter: Any) -> Batch:
        """Batch of a step: what was read, or the samples that the model draws for it.

        Args:
          step: number of steps done before.
          batch: what was read.
          weights: those that train; and the reference's and the frozen ones.
          meter: records what is reported of the samples.
        """
        if self.sampler is None:
            return batch
        rollout = self.sampler.draw(step, batch, *weights)
        meter.record_values(rollout.values)
        return rollout.batch


def assemble_run(run: TrainingRun) -> AssembledRun:
    """Sets the mesh, opens the data, and builds the step.

    Raises:
      ValueError: the batch cannot be split over mesh and microbatches, the vocabulary is larger
        than the model's, or the optimizer is unknown.
    """
    schedule, update = make_update(run)
    host, hosts = sharding.batch_share()
    source = data.with_run_vocabulary(run).data
    if run.grpo is not None:
        # Every host samples for all inputs, one of which is in a row.
        source, host, hosts = dataclasses.replace(source, pack=False), 0, 1
    batches = data.open_batches(
        source,
        run.model.batch_layout,
        run.train.batch_size,
        run.seed,
        host=host,
        hosts=hosts,
        model=run.model,
    )
    # Modification times are left out: every host may have a copy of its own.
    files = [(part.get("tokens"), part.get("shards")) for part in batches.state().values()]
    processes.check_equal("The training data", json.dumps(files))
    dataset = data.open_dataset(source, "train")
    vocabularies = dataset.vocabularies
    data.check_run_vocabulary(run.model_dir, vocabularies)
    check_vocabulary_sizes(run, vocabularies)
    shapes = state_shapes(run, update)
    axes = frozen_base.trained_axes(run)
    batches, teacher = distilled_batches.make_distilled_batches(run, batches, vocabularies)
    sampler = None
    if run.grpo is not None:
        check_grpo(run, dataset.has_inputs)
        sampler = Sampler(run, vocabularies)
    train_step = step.make_step(run, update, schedule, axes, teacher)
    return AssembledRun(
        run=run,
        batches=batches,
        vocabularies=vocabularies,
        optimizer=update,
        schedule=schedule,
        shapes=shapes,
        step=train_step,
        teacher=teacher or find_reference(run),
        sampler=sampler,
    )


def state_shapes(run: TrainingRun, update: Any) -> TrainState:
    """Shapes and placements of a run's state; `update` is its optimizer."""
    averaged = weight_average.averaged_weights(run)
    return train_state.state_shapes(frozen_base.trained_shapes(run), update, averaged)


def make_update(run: TrainingRun) -> tuple[Any, Any]:
    """Sets the mesh; returns the learning rate by step and the optimizer of the run.

    Raises:
      ValueError: the batch or the rows cannot be split, or the optimizer is unknown.
    """
    sharding.use_mesh(run.mesh)
    check_batch(run.train)
    check_lengths(run, sharding.context_size())
    check_row_lengths(run.model, run.data.lengths, "The model")
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes, by_update = frozen_base.trained_axes(run), schedule
    if run.grpo is not None and run.grpo.updates > 1:
        # The optimizer counts updates, of which a step makes several.
        by_update = functools.partial(rate_of_update, schedule, run.grpo.updates)
    update = optimizer.make_optimizer(run.optimizer, by_update, axes, run.train.param_groups)
    return schedule, update


def rate_of_update(schedule: Any, updates: int, count: Any) -> Any:
    """Learning rate of an update.

    Args:
      schedule: learning rate by step.
      updates: updates of a step.
      count: number of updates before.
    """
    return schedule(count // updates)


def check_batch(cfg: config.Train) -> None:
    """Raises ValueError if mesh and microbatches cannot split the batch evenly."""
    shards, pieces = sharding.batch_shards(), cfg.microbatches
    below = cfg.batch_size // (shards * pieces) * shards * pieces
    near = " or ".join(str(size) for size in (below, below + shards * pieces) if size)
    config.require(
        cfg.batch_size % (shards * pieces) == 0,
        f"Train.batch_size ({cfg.batch_size}) must be a multiple of {shards * pieces}: the mesh "
        f"splits it into {shards} (Mesh.data x Mesh.fsdp) and Train.microbatches into {pieces}. "
        f"Near ones: {near}",
    )


def check_lengths(run: TrainingRun, context: int) -> None:
    """Raises ValueError if rows cannot be split into `context` parts; names the binding."""
    if context == 1:
        return
    lengths = flops.row_lengths(run.model.batch_layout, run.data.lengths)
    lengths_text = " and ".join(str(length) for length in lengths if length)
    config.require(
        all(length % context == 0 for length in lengths),
        f"Mesh.context={context} cannot split rows of {lengths_text} tokens evenly: choose "
        "Data.lengths (TASK_FEATURE_LENGTHS) that are multiples of it",
    )
    whole_row_options = {
        "Model.draft_heads": run.model.draft_heads,
        "Model.readout": run.model.readout,
        "Train.layer_skip": run.train.layer_skip,
        "Run.distillation": run.distillation,
        "Run.contrastive": run.contrastive,
        "Run.preferences": run.preferences,
        "Run.grpo": run.grpo,
    }
    bound = [name for name, value in whole_row_options.items() if value is not None]
    config.require(
        not bound,
        f"Mesh.context={context} splits rows, and {', '.join(bound)} needs whole ones: bind "
        "Mesh.context = 1",
    )


def check_vocabulary_sizes(run: config.Run, vocabularies: tuple) -> None:
    """Raises ValueError if a vocabulary has more ids than Model.vocab."""
    size = largest_id_count(vocabularies)
    more = "" if run.checkpoint.initial is None else f". {matching.MORE_IDS}"
    config.require(
        size <= run.model.vocab,
        f"The vocabulary of the data has {size} ids, but Model.vocab is {run.model.vocab}: "
        f"bind Model.vocab = {-(-size // 128) * 128 if size > 128 else size} or more{more}",
    )


def initial_train_state(
    assembled: AssembledRun,
    show: Callable[[Any], None] = lambda table: None,
    base: FrozenBase | None = None,
) -> TrainState:
    """The state of a new run: drawn from Run.seed, or with the weights of Checkpoint.initial or
    Run.adaptation.

    Args:
      assembled: the run.
      show: is called with the table of adapted weights, if there are any.
      base: the frozen weights that new adapters belong to; None without adapters.
    """
    run = assembled.run
    if base is not None:
        params = frozen_base.new_adapters(run, base)
    elif run.adaptation is not None:
        vocabulary_compatibility.check_vocabularies(run.adaptation, *assembled.vocabularies)
        params, report = adaptation.initialize(run)
        show(report.table(overview.schedule_by_weight(run, assembled.shapes.params)))
    elif run.checkpoint.initial is None:
        params = model.initialize(run.model, jax.random.key(run.seed))
    else:
        vocabulary_compatibility.warn_of_difference(run.checkpoint.initial, assembled.vocabularies)
        params = initial_weights(
            run.checkpoint.initial, run.model, assembled.shapes.params, run.seed
        )
    averaged = weight_average.averaged_weights(run)
    return train_state.begin_state(params, assembled.optimizer, averaged)


def initial_weights(folder: str, cfg: config.Model, shapes: Any, seed: int = 0) -> dict[str, Any]:
    """Loads the weights that a run begins with: of another run's newest checkpoint, or of another
    library's.

    Args:
      folder: value of Checkpoint.initial.
      cfg: config of the run's model.
      shapes: shape and placement of every weight, as `model.shapes` has them.
      seed: seed of draft heads (Model.draft_heads) and readout, which are new if the checkpoint has
        none.

    Returns:
      float32 params on the mesh in force.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another model; names the shapes.
    """
    with initial_errors():
        params = open_checkpoint(folder, options=WEIGHTS_ONLY).params_for(cfg, shapes)
    new = [name for name in (HEADS, READOUT) if name in shapes and name not in params]
    if READOUT in new:
        log.warning(frozen_base.NEW_READOUT, folder)
    if not new:
        return params
    return params | weights.new_weights(
        cfg, seed, lambda params: {name: params[name] for name in new}
    )


@contextlib.contextmanager
def initial_errors():
    """Raises an error about the initial weights by the name of their field."""
    try:
        yield
    except DamagedCheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"Checkpoint.initial: {error}") from error


def make_evaluator(run: TrainingRun) -> Evaluator | None:
    """The Evaluator of the run's held-out split; None if nothing is to be measured.

    Raises:
      ValueError: as `check_evaluation`, or the split cannot be read.
    """
    run = data.with_run_vocabulary(run)
    dataset = check_evaluation(run)
    if dataset is None:
        return None
    with evaluation_errors(run):
        return Evaluator(run)


@contextlib.contextmanager
def evaluation_errors(run: TrainingRun):
    """Raises an error about the held-out split with the ways around it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error}. Evaluation reads Data.eval_split ({run.data.eval_split}); to train "
            "without any, bind Evaluate.batches = 0 and Evaluate.examples = 0"
        ) from error


def check_evaluation(run: TrainingRun) -> data.Dataset | None:
    """Checks the names of split and metrics before anything trains.

    Returns:
      the held-out split; None if nothing is to be measured.

    Raises:
      ValueError: there is no such split or metric, or Checkpoint.metric is not measured.
    """
    if run.evaluate.batches or run.evaluate.examples:
        with evaluation_errors(run):
            dataset = data.open_dataset(run.data, run.data.eval_split)
            check_metrics(run, dataset)
        if has_predictions(run, dataset):
            registry.check_names(run.model, run.decode)
            check_companion(run.model, run.decode)
        names = measured_names(run, dataset) if run.checkpoint.metric else None
        if names is not None and weight_average.is_measured(run):
            names = [*names, *map(weight_average.metric_name, names)]
        if names is not None:
            check_metric(run.checkpoint, names)
        return dataset
    config.require(
        run.checkpoint.metric is None,
        f"Checkpoint.metric is {run.checkpoint.metric!r}, but Evaluate.batches and "
        "Evaluate.examples are 0: nothing is measured",
    )
    return None


def check_metric(cfg: config.Checkpoint, measured: Collection[str]) -> None:
    """Raises ValueError if the metric that chooses the best checkpoint is not measured."""
    if cfg.metric is None or cfg.metric in measured:
        return
    raise ValueError(
        f"Checkpoint.metric is {cfg.metric!r}, which the evaluation does not measure: "
        f"{suggest(cfg.metric, measured)}"
    )
