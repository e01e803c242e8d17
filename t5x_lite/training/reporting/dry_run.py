# SPDX-License-Identifier: Apache-2.0
"""Description of a run without training it (--dry_run)."""

import jax

from t5x_lite import adaptation, model
from t5x_lite.checkpoints import train_state as states
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.cli.progress import format_count
from t5x_lite.config import gin_file
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import frozen_base, setup
from t5x_lite.training.flops import run_flops, run_formula
from t5x_lite.training.reporting import overview


def describe_run(run: TrainingRun) -> str:
    """The resolved config, every weight's shape and placement, and the sizes; opens no data.

    Raises:
      ValueError: as `setup.make_update`.
    """
    _, update = setup.make_update(run)
    axes = frozen_base.trained_axes(run)
    shapes = setup.state_shapes(run, update)
    counts = model.count(run.model)
    flops = run_flops(run)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return "\n".join(
        [
            gin_file.to_text(run),
            "",
            *weight_lines(shapes.params, axes),
            "",
            f"parameters      {sum(counts.values()):,} ({parts})",
            f"                {overview.model_text(run.model)}",
            f"mesh            {overview.mesh_text()}",
            f"per device      {overview.bytes_text(run, shapes)}",
            *[f"adapters        {line}" for line in overview.lora_lines(run, shapes)],
            *[f"weights         {line}" for line in overview.group_lines(run, shapes)],
            f"FLOPs per step  {format_count(flops)} = {run_formula(run)}",
            f"run             {overview.run_text(run)}",
            *[f"teacher         {line}" for line in overview.teacher_lines(run.distillation)],
            *adaptation_lines(run, shapes.params),
        ]
    )


def adaptation_lines(run: TrainingRun, params) -> list[str]:
    """Lines with the source of each weight, if a checkpoint is adapted; else none."""
    if run.adaptation is None:
        return []
    try:
        report = adaptation.explain(run)
    except adaptation.MissingSource as error:
        return [f"adaptation      unknown as yet: {error}"]
    return ["", report.text(overview.schedule_by_weight(run, params))]


def weight_lines(params, axes) -> list[str]:
    """One line per weight: name, shape, axes, MiB on each device, and over which mesh axes it is
    split."""
    mesh, rows = jax.sharding.get_mesh().shape, []
    for (name, leaf), names in zip(
        flatten_tree(params).items(), jax.tree.leaves(axes), strict=True
    ):
        split = [
            f"{axis} over {place}"
            for axis, place in zip(names.split(), leaf.sharding.spec, strict=False)
            if place and mesh[place] > 1
        ]
        mebibytes = f"{states.bytes_per_device(leaf) / 2**20:10,.3f} MiB"
        where = ", ".join(split) or "whole"
        rows.append(f"{name:42} {str(leaf.shape):22} {names:42} {mebibytes}  {where}")
    return rows
