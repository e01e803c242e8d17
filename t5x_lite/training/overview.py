# SPDX-License-Identifier: Apache-2.0
"""The table that a run begins with."""

import jax
from rich.table import Table

from t5x_lite import config, model
from t5x_lite.training import bar, costs
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
    rows.add_row("data", statistics)
    rows.add_row("mesh", mesh_text())
    rows.add_row("bytes per device", bytes_text(shapes))
    flops_text = f"{bar.count(flops)} for {run.train.batch_size} rows = {costs.FORMULA}"
    rows.add_row("FLOPs per step", flops_text)
    rows.add_row("run", run_text(run))
    return rows


def mesh_text() -> str:
    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{shape} = {mesh.size} {kind}"


def bytes_text(shapes: TrainState) -> str:
    params, optimizer = (states.size_per_device(part) for part in (shapes.params, shapes.optimizer))
    return (
        f"weights {params / 2**20:,.1f} MiB, optimizer {optimizer / 2**20:,.1f} MiB, "
        f"gradient {params / 2**20:,.1f} MiB"
    )


def run_text(run: config.Run) -> str:
    train, schedule = run.train, run.schedule
    micro = f" in {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return (
        f"{train.steps} steps of {train.batch_size} rows{micro}, {run.optimizer.name}, "
        f"{schedule.kind} rate up to {schedule.peak:g} after {schedule.warmup} steps, "
        f"{run.model.activations} activations"
    )
