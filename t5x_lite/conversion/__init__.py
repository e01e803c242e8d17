# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other makes, in and out: Hugging Face, T5X and GGUF."""

from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite import config

__all__ = ["load"]


def load(
    source: Any,
    cfg: config.Model,
    entries: Sequence[Any],
    *,
    allow: Sequence[str] = (),
    ignored: Sequence[str] = (),
    duplicates: Mapping[str, str] | None = None,
) -> Any:
    """params of cfg on the mesh in force, read tensor by tensor from a source by a table.

    Raises:
      MatchError: tensors are missing, left over or of another shape, and not allowed by name.
      SourceError: a tensor cannot be read, is not finite, or differs from one it should repeat.
    """
    from pathlib import Path

    from t5x_lite.conversion import tensors, weights

    path = Path(str(getattr(source, "path", "The checkpoint")))
    opened = tensors.Tensors(path, cfg, source, entries, ignored, duplicates or {})
    return weights.load(opened.weights(allow), cfg)
