# SPDX-License-Identifier: Apache-2.0
"""Where every parameter lives."""

from t5x_lite import config, model, sharding
from t5x_lite.planning import compiled
from t5x_lite.planning.chips import Slice
from t5x_lite.training import dry_run, overview


def text(run: config.Run, slice_: Slice) -> str:
    """A line for every parameter: name, shape, axes, over what it is split, bytes of each chip."""
    sharding.use_mesh(run.mesh, compiled.devices(slice_))
    params = model.shapes(run.model)
    return "\n".join([overview.mesh_text(), *dry_run.weights(params, model.axes(run.model))])
