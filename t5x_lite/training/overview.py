# SPDX-License-Identifier: Apache-2.0
"""The table that a run begins with."""

from typing import Any

import jax
from rich.table import Table

from t5x_lite import config, model
from t5x_lite.training import bar, costs
from t5x_lite.training import parts as training_parts
from t5x_lite.training import state as states
from t5x_lite.training.state import TrainState


def table(run: config.Run, shapes: TrainState, flops: int, statistics: str) -> Table:
    """Parameters by part, mesh, bytes per device and FLOPs of a step."""
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows.add_column(style="bold")
    rows.add_column()
    counts = model.count(run.model)
    parts = ", ".join(f"{name} {bar.count(size)}" for name, size in counts.items())
    rows.add_row(
        "model", f"{run.model.layout}: {bar.count(sum(counts.values()))} weights ({parts})"
    )
    for line in parts_text(run, shapes):
        rows.add_row("", line)
    rows.add_row("data", statistics)
    rows.add_row("mesh", mesh_text())
    rows.add_row("bytes per device", bytes_text(run, shapes))
    flops_text = f"{bar.count(flops)} for {run.train.batch_size} rows = {costs.FORMULA}"
    rows.add_row("FLOPs per step", flops_text)
    rows.add_row("run", run_text(run))
    for line in teacher_text(run.distillation):
        rows.add_row("teacher", line)
    return rows


def mesh_text() -> str:
    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{shape} = {mesh.size} {kind}"


def bytes_text(run: config.Run, shapes: TrainState) -> str:
    trained = training_parts.Selection(run.train.parts, shapes.params).take(shapes.params)
    held = {"weights": shapes.params, "optimizer": shapes.optimizer, "gradient": trained}
    return ", ".join(
        f"{name} {states.size_per_device(part) / 2**20:,.1f} MiB" for name, part in held.items()
    )


def parts_text(run: config.Run, shapes: TrainState) -> list[str]:
    """One line for each of Train.parts and one for all other weights; none without parts."""
    named = dict(zip(states.names(shapes.params), jax.tree.leaves(shapes.params), strict=True))
    lines = []
    for group in training_parts.groups(run.train.parts, shapes.params):
        count = sum(named[name].size for name in group.names)
        memory = 0
        if not group.frozen:
            memory = states.size_per_device(shapes.optimizer.groups[group.key])
        who = "all others" if group.part is training_parts.REST else ", ".join(group.part.weights)
        lines.append(
            f"{when(group)}: {bar.count(count)} in {len(group.names)} weights, optimizer "
            f"{memory / 2**20:,.1f} MiB per device ({who})"
        )
    return lines


def when(group: training_parts.Group) -> str:
    """What becomes of a group's weights: "from step 1000 at 0.1 of the rate after 50 more"."""
    part = group.part
    if group.frozen:
        return "frozen"
    begins = f"trained from step {part.begin}" if part.begin else "trained"
    rate = f" at {part.rate:g} of the rate" if part.rate != 1 else ""
    return begins + rate + (f", rising over {part.warmup} steps" if part.warmup else "")


def trains(run: config.Run, params: Any) -> dict[str, str]:
    """Of each weight's name what becomes of it, as `when` says; empty without Train.parts."""
    groups = training_parts.groups(run.train.parts, params)
    return {name: when(group) for group in groups for name in group.names}


def run_text(run: config.Run) -> str:
    train, schedule = run.train, run.schedule
    micro = f" in {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return (
        f"{train.steps} steps of {train.batch_size} rows{micro}, {run.optimizer.name}, "
        f"{schedule.kind} rate up to {schedule.peak:g} after {schedule.warmup} steps, "
        f"{run.model.activations} activations"
    )


def teacher_text(cfg: config.Distillation | None) -> list[str]:
    """What is learned from which teacher, one line; none without one."""
    if cfg is None:
        return []
    what = "whole distribution" if cfg.top_k is None else f"{cfg.top_k} most probable ids"
    source = f", answers of {cfg.answers}" if cfg.answers else ", loaded beside the model"
    return [
        f"{cfg.teacher}{source}: {what} at temperature {cfg.temperature:g}, "
        f"{cfg.weight:g} of the objective"
    ]
