# SPDX-License-Identifier: Apache-2.0
"""From a config to everything a run needs, with the checks that need data or devices."""

import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import adaptation, config, data, model, processes, sharding
from t5x_lite.adaptation import agreement, distillation
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.conversion import checkpoint as foreign
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.training import (
    archive,
    checkpoint,
    costs,
    optimizer,
    overview,
    schedules,
    state,
    step,
)
from t5x_lite.training.archive import CheckpointError
from t5x_lite.training.state import TrainState

# Where a model's weights have its heads (Model.blockwise).
HEADS = "heads"


class Parts(NamedTuple):
    """A run assembled: its mesh is set, its data are open, nothing is computed yet."""

    run: config.Run
    batches: Any
    vocabularies: tuple
    optimizer: Any
    schedule: Any
    shapes: TrainState
    step: Any
    teacher: Teacher | None = None


def assemble(run: config.Run) -> Parts:
    """Sets the mesh, opens the data, and makes the step.

    Raises:
      ValueError: the batch cannot be split over mesh and microbatches, the vocabulary is larger
        than the model's, or the optimizer is unknown.
    """
    sharding.use_mesh(run.mesh)
    check_batch(run.train)
    check_lengths(run, sharding.context_size())
    host, hosts = sharding.batch_share()
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = model.axes(run.model)
    update = optimizer.make(run.optimizer, schedule, axes, run.train.parts)
    batches = data.open_batches(
        run.data,
        run.model.layout,
        run.train.batch_size,
        run.seed,
        host=host,
        hosts=hosts,
    )
    # Not times of change: every host may have a copy of its own.
    read = [(part.get("tokens"), part.get("shards")) for part in batches.state().values()]
    processes.agree("The training data", json.dumps(read))
    vocabularies = data.open_dataset(run.data, "train").vocabularies
    check_vocabularies(run, vocabularies)
    shapes = state.shapes(model.shapes(run.model), update)
    batches, teacher = distillation.attend(run, batches, vocabularies)
    made = step.make(run, update, schedule, axes, teacher)
    return Parts(run, batches, vocabularies, update, schedule, shapes, made, teacher)


def check_batch(cfg: config.Train) -> None:
    shards, pieces = sharding.batch_shards(), cfg.microbatches
    below = cfg.batch_size // (shards * pieces) * shards * pieces
    near = f"{below or shards * pieces} or {below + shards * pieces}"
    config.require(
        cfg.batch_size % (shards * pieces) == 0,
        f"Train.batch_size ({cfg.batch_size}) must be a multiple of {shards * pieces}: the mesh "
        f"splits it into {shards} (Mesh.data x Mesh.fsdp) and Train.microbatches into {pieces}. "
        f"Near ones: {near}",
    )


def check_lengths(run: config.Run, context: int) -> None:
    """Raises ValueError where rows cannot be split into `context` parts, naming the binding."""
    if context == 1:
        return
    lengths = costs.row_lengths(run.model.layout, run.data.lengths)
    told = " and ".join(str(length) for length in lengths if length)
    config.require(
        all(length % context == 0 for length in lengths),
        f"Mesh.context={context} cannot split rows of {told} tokens evenly: choose Data.lengths "
        "(TASK_FEATURE_LENGTHS) that are multiples of it",
    )
    whole = {
        "Model.blockwise": run.model.blockwise,
        "Train.layer_skip": run.train.layer_skip,
        "Run.distillation": run.distillation,
    }
    wanting = [name for name, part in whole.items() if part is not None]
    config.require(
        not wanting,
        f"Mesh.context={context} splits rows, and {', '.join(wanting)} needs whole ones: bind "
        "Mesh.context = 1",
    )


def check_vocabularies(run: config.Run, vocabularies: tuple) -> None:
    size = max(vocabulary.size for vocabulary in vocabularies)
    config.require(
        size <= run.model.vocab,
        f"The vocabulary of the data has {size} ids, but Model.vocab is {run.model.vocab}: "
        f"bind Model.vocab = {-(-size // 128) * 128 if size > 128 else size} or more",
    )


def begin(parts: Parts, show: Callable[[Any], None] = lambda table: None) -> TrainState:
    """The state of a new run: drawn from Run.seed, or with the weights of Checkpoint.initial or of
    Run.adaptation; `show` is given the table of what was adapted.
    """
    run = parts.run
    if run.adaptation is not None:
        agreement.check(run.adaptation, *parts.vocabularies)
        params, report = adaptation.initialize(run)
        show(report.table(overview.trains(run, parts.shapes.params)))
    elif run.checkpoint.initial is None:
        params = model.initialize(run.model, jax.random.key(run.seed))
    else:
        params = initial(run.checkpoint.initial, run.model, parts.shapes.params, run.seed)
    return state.begin(params, parts.optimizer)


def initial(folder: str, cfg: config.Model, shapes: Any, seed: int = 0) -> Any:
    """The weights of another run's newest checkpoint, or of one of another make, placed as
    `shapes` says; heads (Model.blockwise) that it lacks are new, drawn by seed.

    Raises:
      CheckpointError: there is none, or it is of another model; the shapes are named.
    """
    if foreign.is_foreign(folder):
        try:
            trunk = foreign.params_for(folder, dataclasses.replace(cfg, blockwise=None))
        except ValueError as error:
            raise CheckpointError(f"Checkpoint.initial: {error}") from error
        return trunk | new_heads(cfg, seed)
    params, step = checkpoint.load_params(folder)
    added = {} if HEADS in params else new_heads(cfg, seed)
    shapes = {name: part for name, part in shapes.items() if name not in added}
    return placed(params, step, shapes, folder) | added


def new_heads(cfg: config.Model, seed: int) -> dict:
    """The part of new weights that are heads; nothing where the model has none."""
    if cfg.blockwise is None:
        return {}
    # All other weights are never computed.
    draw = jax.jit(lambda key: model.initialize(cfg, key)[HEADS])
    return {HEADS: draw(jax.random.key(seed))}


def placed(params: Any, step: int, shapes: Any, folder: str) -> Any:
    """Whole host arrays of a run folder's checkpoint, placed as `shapes` says."""
    there, wanted = archive.flatten(params), archive.flatten(shapes)
    described = {name: {"shape": array.shape} for name, array in there.items()}
    note = archive.Note(step, "", arrays={"params": described})
    try:
        archive.compare_shapes(note, "params", wanted, folder)
    except archive.Mismatch as error:
        raise CheckpointError(f"Checkpoint.initial: {error}") from error

    def place(shape, array):
        array = np.asarray(array, shape.dtype)
        return jax.make_array_from_callback(array.shape, shape.sharding, lambda part: array[part])

    return jax.tree.map(place, shapes, params)


def evaluator(run: config.Run) -> Evaluator | None:
    """What measures the run on its held-out split; None if nothing is to be measured.

    Raises:
      ValueError: there is no such split, or the best checkpoint is to be known by no measure.
    """
    if run.evaluate.batches or run.evaluate.examples:
        try:
            return Evaluator(run)
        except ValueError as error:
            raise ValueError(
                f"{error}. Evaluation reads Data.eval_split ({run.data.eval_split}); to train "
                "without any, bind Evaluate.batches = 0 and Evaluate.examples = 0"
            ) from error
    config.require(
        run.checkpoint.metric is None,
        f"Checkpoint.metric is {run.checkpoint.metric!r}, but Evaluate.batches and "
        "Evaluate.examples are 0: nothing is measured",
    )
    return None


def check_metric(cfg: config.Checkpoint, measured: dict[str, float]) -> None:
    """Raises ValueError where the metric that names the best checkpoint is not measured."""
    if cfg.metric is None or cfg.metric in measured:
        return
    near = difflib.get_close_matches(cfg.metric, measured, n=3) or sorted(measured)
    raise ValueError(
        f"Checkpoint.metric is {cfg.metric!r}, which the evaluation does not measure. "
        f"It measures {', '.join(near)}"
    )
