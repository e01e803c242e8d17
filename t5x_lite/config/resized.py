# SPDX-License-Identifier: Apache-2.0
"""The config of a model in another size."""

import dataclasses

from t5x_lite.config.architecture import Model
from t5x_lite.config.checked import require
from t5x_lite.config.stack import Stack


def resize_model(cfg: Model, layers: int, width: int) -> Model:
    """The model in another size: heads of the same size, MLP and heads in proportion to the width.

    Args:
      cfg: the model.
      layers: of each stack.
      width: of the states.

    Raises:
      ValueError: a part does not divide evenly.
    """

    def resized(stack: Stack | None) -> Stack | None:
        if stack is None:
            return None

        def scale(size: int, name: str) -> int:
            require(
                size * width % stack.embed == 0,
                f"A model of width {width} would have {size * width / stack.embed:g} for "
                f"Stack.{name} ({size} at width {stack.embed}): choose a width that divides evenly",
            )
            return size * width // stack.embed

        return dataclasses.replace(
            stack,
            layers=layers,
            embed=width,
            heads=scale(stack.heads, "heads"),
            kv_heads=stack.kv_heads and scale(stack.kv_heads, "kv_heads"),
            mlp=scale(stack.mlp, "mlp"),
        )

    return dataclasses.replace(cfg, encoder=resized(cfg.encoder), decoder=resized(cfg.decoder))
