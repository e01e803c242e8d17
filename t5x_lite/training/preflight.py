# SPDX-License-Identifier: Apache-2.0
"""Checks of a run before its first step.

A run makes each where it first can, between its work; `check_run` makes all without that work, for
--dry_run. Every check is a function that both call.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from t5x_lite import adaptation, data, model
from t5x_lite.adaptation import distilled_batches, vocabulary_compatibility
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.checkpoints import selection, train_state
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import callbacks, frozen_base, model_dir, schedules, setup, weight_average
from t5x_lite.training.reference import ReferenceModel, find_reference
from t5x_lite.training.reporting import overview, trackers
from t5x_lite.training.rollouts import check_grpo
from t5x_lite.utils.paths import parse_path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_run(
    run: TrainingRun,
    report: Callable[[str], None],
    try_memory: bool = False,
    ignore_damaged: bool = False,
) -> None:
    """Makes every check that comes before the first step; trains and writes nothing in MODEL_DIR.

    Of the data it reads the first examples. A trained vocabulary is made, and cached, as the run
    would.

    Args:
      run: config of the run.
      report: is called with each warning.
      try_memory: leaves out `check_memory`.
      ignore_damaged: true to begin anew where MODEL_DIR has only damaged checkpoints.

    Raises:
      ValueError: what the run would be refused for.
    """
    model_dir.check_config(run, report)
    trackers.check_installed(run.train.trackers)
    callbacks.import_callbacks(run.train.callbacks)
    _, update = setup.make_update(run)
    shapes = setup.state_shapes(run, update)
    model_dir.check_writable(parse_path(run.model_dir))
    source = data.with_run_vocabulary(run)
    data.check_examples(source.data, run.model.batch_layout, "train")
    vocabularies = data.open_vocabularies(source.data)
    data.check_run_vocabulary(run.model_dir, vocabularies)
    setup.check_vocabulary_sizes(run, vocabularies)
    teacher = distilled_batches.check_teacher(run, vocabularies)
    reference = find_reference(run)
    if reference is not None:
        reference.check()
    if run.grpo is not None:
        check_grpo(run, data.open_dataset(source.data, "train").has_inputs)
    if not try_memory:
        check_memory(run, shapes, teacher if isinstance(teacher, Teacher) else reference)
    if setup.check_evaluation(source) is not None:
        with setup.evaluation_errors(run):
            data.check_examples(source.data, run.model.batch_layout, run.data.eval_split)
    newest = selection.check_newest(run.model_dir, shapes, ignore_damaged)
    if newest is None:
        check_initial_weights(run, vocabularies)
    else:
        weight_average.check_first_step(run, newest)
    for warning in schedules.list_warnings(run):
        report(warning)


def check_initial_weights(run: TrainingRun, vocabularies: tuple) -> None:
    """Raises ValueError where the weights that a new run begins with are missing or do not fit;
    `vocabularies` are those of its inputs and targets."""
    if run.adaptation is not None:
        vocabulary_compatibility.check_vocabularies(run.adaptation, *vocabularies)
        adaptation.explain(run)
    elif run.checkpoint.initial is not None:
        with setup.initial_errors():
            initial = run.checkpoint.initial
            vocabulary_compatibility.warn_of_difference(initial, vocabularies)
            source = initial if run.lora is None else frozen_base.base_source(run)
            opened = open_checkpoint(source, options=WEIGHTS_ONLY)
            opened.check_fits(run.model, model.shapes(run.model))


def check_memory(
    run: TrainingRun, shapes: TrainState, teacher: Teacher | ReferenceModel | None = None
) -> None:
    """Raises ValueError if weights, optimizer, gradient and teacher exceed a device's memory.

    Activations come on top: the compiled step knows them (`check_step_memory`).

    Args:
      run: config of the run.
      shapes: shapes and placements of its state.
      teacher: of a distillation that computes its logits in each step, or a reference model.
    """
    parts = overview.state_bytes(run, shapes)
    if teacher is not None:
        weights = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, teacher.model.dtype, sharding=leaf.sharding
            ),
            model.shapes(teacher.model),
        )
        parts["reference" if isinstance(teacher, ReferenceModel) else "teacher"] = (
            train_state.bytes_per_device(weights)
        )
    remedy = "split the weights over more devices (config.Mesh.fsdp), train a smaller model"
    compare_memory(parts, "besides activations", remedy)


def check_step_memory(step: jax.stages.Compiled) -> None:
    """Raises ValueError if a compiled step, its state and batch included, exceeds a device's
    memory. A compiler for TPUs refuses that itself; elsewhere the first step would fail, or the
    kernel would end the process."""
    if memory := step.memory_analysis():
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        state = memory.argument_size_in_bytes + max(0, kept)
        parts = {"state and batch": state, "activations and scratch": memory.temp_size_in_bytes}
        remedy = "lower config.Train.batch_size, raise config.Train.microbatches"
        compare_memory(parts, "in a step", remedy)


def compare_memory(parts: dict[str, int], when: str, remedy: str) -> None:
    """Compares bytes with the memory of a device.

    Args:
      parts: bytes of each device by what they are for.
      when: "in a step", for the message.
      remedy: what makes them fewer.

    Raises:
      ValueError: they are more.
    """
    needed, limit = sum(parts.values()), device_memory()
    if limit is None or needed <= limit:
        return
    words = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in parts.items())
    raise ValueError(
        f"The run needs {needed / 1e9:,.1f} GB of each device {when} ({words}), and a "
        f"{jax.devices()[0].device_kind} has {limit / 1e9:,.1f} GB here: {remedy}, "
        "or pass --try_memory to try anyway"
    )


def device_memory() -> int | None:
    """Bytes that each local device has; virtual ones on a CPU share the host's. None if unknown."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits) // len(devices)
