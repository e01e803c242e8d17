# SPDX-License-Identifier: Apache-2.0
"""The frozen reference model of a run that trains on preferences or rewards."""

from typing import Any, NamedTuple

import jax

from t5x_lite import config, model
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.utils.not_none import not_none


class ReferenceModel(NamedTuple):
    """A checkpoint whose weights are the reference's.

    Attributes:
      path: path of the checkpoint.
      model: config of the run's model, whose shapes it has.
      field: the field that names it, for messages.
    """

    path: str
    model: config.Model
    field: str

    def check(self) -> None:
        """Raises ValueError if there is no such checkpoint, or it has other shapes."""
        try:
            opened = open_checkpoint(self.path, options=WEIGHTS_ONLY)
            opened.check_fits(self.model, model.shapes(self.model))
        except ValueError as error:
            raise ValueError(f"{self.field}: {error}") from error

    def shapes(self) -> Any:
        """Shapes and placements of `params`."""
        mesh = jax.sharding.get_mesh()

        def narrow(leaf: Any) -> jax.ShapeDtypeStruct:
            placement = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
            return jax.ShapeDtypeStruct(leaf.shape, self.model.dtype, sharding=placement)

        return jax.tree.map(narrow, model.shapes(self.model))

    def params(self) -> Any:
        """The weights on the mesh in force, in the dtype of computation.

        Raises:
          ValueError: as `check`, or the checkpoint is damaged.
        """

        def cast(name: str, weight: jax.Array) -> jax.Array:
            return weight.astype(self.model.dtype)

        try:
            opened = open_checkpoint(self.path, options=WEIGHTS_ONLY)
            return opened.params_for(self.model, model.shapes(self.model), cast)
        except ValueError as error:
            raise ValueError(f"{self.field}: {error}") from error


def find_reference(run: TrainingRun) -> ReferenceModel | None:
    """The reference model of a run; None where it compares with none, with log-probabilities of
    its files, or with its own frozen weights without adapters."""
    settings = run.preferences or run.grpo
    if settings is None or not settings.has_reference:
        return None
    if getattr(run.data.task, "reference", None) is not None:
        return None
    if settings.reference is not None:
        return ReferenceModel(settings.reference, run.model, f"{type(settings).__name__}.reference")
    if run.lora is not None:
        return None
    return ReferenceModel(not_none(run.checkpoint.initial), run.model, "Checkpoint.initial")
