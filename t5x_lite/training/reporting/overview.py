# SPDX-License-Identifier: Apache-2.0
"""Overview of a run, shown before it trains."""

from typing import Any

import jax
from rich.table import Table

from t5x_lite import config, model
from t5x_lite.checkpoints import train_state as states
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.cli.progress import format_count
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import cpu_dtype, frozen_base
from t5x_lite.training.flops import run_formula
from t5x_lite.training.optimizer import param_groups


def overview_table(run: TrainingRun, shapes: TrainState, flops: int, statistics: str) -> Table:
    """Table of parameters, mesh, bytes per device and FLOPs of a step.

    Args:
      run: config of the run.
      shapes: shapes and placements of its state.
      flops: floating-point operations of a step.
      statistics: description of the data.
    """
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows.add_column(style="bold")
    rows.add_column()
    counts = model.count(run.model)
    parts = ", ".join(f"{name} {format_count(size)}" for name, size in counts.items())
    rows.add_row(
        "model",
        f"{run.model.layout}: {format_count(sum(counts.values()))} weights ({parts})",
    )
    rows.add_row("", model_text(run.model))
    for line in [*lora_lines(run, shapes), *group_lines(run, shapes)]:
        rows.add_row("", line)
    rows.add_row("data", statistics)
    rows.add_row("mesh", mesh_text())
    rows.add_row("bytes per device", bytes_text(run, shapes))
    flops_text = f"{format_count(flops)} for {run.train.batch_size} rows = {run_formula(run)}"
    rows.add_row("FLOPs per step", flops_text)
    rows.add_row("run", run_text(run))
    for line in teacher_lines(run.distillation):
        rows.add_row("teacher", line)
    return rows


def model_text(cfg: config.Model) -> str:
    """Vocabulary and dtype of the model, which a config can leave to the data and the device."""
    reason = cpu_dtype.reason() if jax.devices()[0].platform == "cpu" else ""
    because = f" ({reason})" if reason else ""
    return f"Model.vocab {cfg.vocab:,}, Model.dtype {cfg.dtype}{because}"


def mesh_text() -> str:
    """The mesh in force: "data 8 x fsdp 1 ... = 8 TPU v5e"."""
    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{shape} = {mesh.size} {kind}"


def state_bytes(run: TrainingRun, shapes: TrainState) -> dict[str, int]:
    """Bytes per device of weights, optimizer, gradient and averaged copy; frozen weights beside
    adapters."""
    trained = param_groups.Selection(run.train.param_groups, shapes.params).take(shapes.params)
    trees = {"weights": shapes.params, "optimizer": shapes.optimizer, "gradient": trained}
    if run.lora is not None:
        trees = {"frozen weights": frozen_base.base_shapes(run), "adapters": shapes.params} | {
            name: tree for name, tree in trees.items() if name != "weights"
        }
    if shapes.average is not None:
        trees["averaged copy"] = shapes.average
    return {name: states.bytes_per_device(tree) for name, tree in trees.items()}


def bytes_text(run: TrainingRun, shapes: TrainState) -> str:
    """MiB per device of all parts of the state."""
    parts = state_bytes(run, shapes).items()
    return ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts)


def group_lines(run: TrainingRun, shapes: TrainState) -> list[str]:
    """One line per group of Train.param_groups, one for all other weights; [] without groups."""
    named = flatten_tree(shapes.params)
    lines = []
    for group in param_groups.assign_groups(run.train.param_groups, shapes.params):
        count = sum(named[name].size for name in group.names)
        memory = 0
        if not group.frozen:
            memory = states.bytes_per_device(shapes.optimizer.groups[group.key])
        who = "all others" if group.cfg is param_groups.REST else ", ".join(group.cfg.weights)
        size = f"{format_count(count)} in {len(group.names)} weights"
        optimizer = f"optimizer {memory / 2**20:,.1f} MiB per device"
        lines.append(f"{schedule_text(group)}: {size}, {optimizer} ({who})")
    return lines


def lora_lines(run: TrainingRun, shapes: TrainState) -> list[str]:
    """One line on the adapters; none without any."""
    if run.lora is None:
        return []
    lora, count = run.lora, sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    kind = "DoRA" if lora.dora else "LoRA"
    kept = lora.quantize or run.model.dtype
    return [
        f"{kind} of rank {lora.rank}, scale {lora.scale:g}: {format_count(count)} weights train; "
        f"{run.checkpoint.initial} is frozen in {kept}"
    ]


def schedule_text(group: param_groups.WeightGroup) -> str:
    """Training of a group: "trained from step 1000 at 0.1 of the rate, rising over 50 steps"."""
    cfg = group.cfg
    if group.frozen:
        return "frozen"
    begins = f"trained from step {cfg.begin}" if cfg.begin else "trained"
    rate = f" at {cfg.rate:g} of the rate" if cfg.rate != 1 else ""
    return begins + rate + (f", rising over {cfg.warmup} steps" if cfg.warmup else "")


def schedule_by_weight(run: TrainingRun, params: Any) -> dict[str, str]:
    """`schedule_text` of each weight, by name; empty without Train.param_groups."""
    groups = param_groups.assign_groups(run.train.param_groups, params)
    return {name: schedule_text(group) for group in groups for name in group.names}


def run_text(run: TrainingRun) -> str:
    """Steps, optimizer, schedule and dtype in one line."""
    train, schedule = run.train, run.schedule
    micro = f" in {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return (
        f"{train.steps} steps of {train.batch_size} rows{micro}, {run.optimizer.name}, "
        f"{schedule.kind} rate up to {schedule.peak:g} after {schedule.warmup} steps, "
        f"{run.model.dtype} activations"
    )


def compiled_text(step: jax.stages.Compiled, seconds: float) -> str:
    """Describes a compiled training step: how long that took, and the memory it needs."""
    memory = step.memory_analysis()
    scratch = f"{memory.temp_size_in_bytes / 2**20:,.1f} MiB" if memory else "unknown"
    return (
        f"compiled in {seconds:.1f} s; a step needs {scratch} per device for activations and "
        "scratch"
    )


def teacher_lines(cfg: config.Distillation | None) -> list[str]:
    """One line on the teacher and its share of the objective; none without a teacher."""
    if cfg is None:
        return []
    what = "whole distribution" if cfg.top_k is None else f"{cfg.top_k} most probable ids"
    source = f", answers of {cfg.answers}" if cfg.answers else ", loaded beside the model"
    return [
        f"{cfg.teacher}{source}: {what} at temperature {cfg.temperature:g}, "
        f"{cfg.weight:g} of the objective"
    ]
