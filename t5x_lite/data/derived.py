# SPDX-License-Identifier: Apache-2.0
"""A run whose files leave out Model.vocab: it follows from the vocabulary of the data."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from t5x_lite import config
from t5x_lite.config import gin_file
from t5x_lite.config.checked import LARGEST_INT
from t5x_lite.config.training_run import RunT
from t5x_lite.data.datasets import open_vocabularies
from t5x_lite.utils.not_none import not_none

# In place of Model.vocab where nothing binds it.
UNBOUND = LARGEST_INT
# A size that TPUs compute well, and that a mesh can split.
MULTIPLE = 128


def load_run(paths: str | Sequence[str], bindings: Sequence[str] = ()) -> config.Run:
    """Reads a run as `gin_file.load_run` does; Model.vocab need not be bound.

    It is then the size of the vocabulary, rounded up to a multiple of 128. A run that goes on keeps
    that of its MODEL_DIR.

    Args:
      paths: .gin file, or several that are read one after the other.
      bindings: bindings on top, such as "TRAIN_STEPS=100".

    Raises:
      ValueError: the config cannot be used, or its vocabulary cannot be opened.
    """
    run = gin_file.load_run(paths, bindings, defaults=[f"config.Model.vocab = {UNBOUND}"])
    if run.model.vocab != UNBOUND:
        return run
    saved = saved_model(run)
    if saved is not None:
        return with_model(run, vocab=saved.vocab)
    config.require(
        run.data is not None,
        "config.Model is not complete: bind vocab. The run has no data with a vocabulary",
    )
    size = max(vocabulary.size for vocabulary in open_vocabularies(not_none(run.data)))
    return with_model(run, vocab=-(-size // MULTIPLE) * MULTIPLE)


def with_model(run: RunT, **fields) -> RunT:
    """The run with other fields of its model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **fields))


def saved_model(run: config.Run) -> config.Model | None:
    """The model of the checkpoints in MODEL_DIR; None without any."""
    folder = Path(run.model_dir)
    if not (folder / "config.gin").is_file() or not any(folder.glob("checkpoints/[0-9]*")):
        return None
    try:
        return gin_file.from_text((folder / "config.gin").read_text(encoding="utf-8")).model
    except ValueError:  # `model_dir.check_config` reports it
        return None
