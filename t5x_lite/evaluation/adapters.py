# SPDX-License-Identifier: Apache-2.0
"""Adapters beside the weights of a loaded model: several share one base in memory."""

from pathlib import Path

from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.evaluation.predict import Predictor


def attach_adapters(predictor: Predictor, path: str | Path) -> Predictor:
    """Returns a predictor with adapters, which shares the weights of another one.

    Args:
      predictor: of the base.
      path: a MODEL_DIR of a run with Run.lora, or a folder of peft.

    Raises:
      ValueError: the path has no adapters, or they are of another model.
    """
    opened = open_checkpoint(path, options=WEIGHTS_ONLY)
    if opened.adapters is None:
        raise ValueError(f"{path} has no adapters (LoRA): load it as a model of its own")
    params = opened.adapters.attach(predictor.cfg, predictor.params, opened.path)
    return predictor.with_params(params)
