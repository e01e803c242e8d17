# SPDX-License-Identifier: Apache-2.0
"""What a run would be, without training it."""

import jax

from t5x_lite import adaptation, config, config_file, model, sharding
from t5x_lite.training import bar, costs, optimizer, overview, schedules, setup
from t5x_lite.training import state as states


def text(run: config.Run) -> str:
    """The resolved config, every weight's shape and placement, and the sizes; opens no data.

    Raises ValueError for what `setup.assemble` would refuse without looking at the data.
    """
    sharding.use_mesh(run.mesh)
    setup.check_batch(run.train)
    setup.check_lengths(run, sharding.context_size())
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    axes = model.axes(run.model)
    update = optimizer.make(run.optimizer, schedule, axes, run.train.parts)
    shapes = states.shapes(model.shapes(run.model), update)
    counts = model.count(run.model)
    flops = costs.step_flops(run.model, run.train.batch_size, run.data.lengths)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return "\n".join(
        [
            config_file.text(run),
            "",
            *weights(shapes.params, axes),
            "",
            f"parameters      {sum(counts.values()):,} ({parts})",
            f"mesh            {overview.mesh_text()}",
            f"per device      {overview.bytes_text(run, shapes)}",
            *[f"weights         {line}" for line in overview.parts_text(run, shapes)],
            f"FLOPs per step  {bar.count(flops)} = {costs.FORMULA}",
            f"run             {overview.run_text(run)}",
            *[f"teacher         {line}" for line in overview.teacher_text(run.distillation)],
            *adapted(run, shapes.params),
        ]
    )


def adapted(run: config.Run, params) -> list[str]:
    """Where the weights would come from, if others' are to be adapted."""
    if run.adaptation is None:
        return []
    try:
        report = adaptation.explain(run)
    except adaptation.MissingSource as error:
        return [f"adaptation      unknown as yet: {error}"]
    return ["", report.text(overview.trains(run, params))]


def weights(params, axes) -> list[str]:
    """One line per weight: name, shape, axes, MiB on each device, and over which mesh axes it is
    split."""
    mesh, rows = jax.sharding.get_mesh().shape, []
    for name, leaf, names in zip(
        states.names(params), jax.tree.leaves(params), jax.tree.leaves(axes), strict=True
    ):
        split = [
            f"{axis} over {place}"
            for axis, place in zip(names.split(), leaf.sharding.spec, strict=False)
            if place and mesh[place] > 1
        ]
        held = f"{states.size_per_device(leaf) / 2**20:10,.3f} MiB"
        where = ", ".join(split) or "whole"
        rows.append(f"{name:42} {str(leaf.shape):22} {names:42} {held}  {where}")
    return rows
