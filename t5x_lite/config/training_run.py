# SPDX-License-Identifier: Apache-2.0
"""Runs that have what a command needs, as types: checked once, where the command begins.

These classes are for the type checker alone: every object is a `config.Run`.
"""

from typing import TypeVar, cast

from t5x_lite.config import Run
from t5x_lite.config.checked import require
from t5x_lite.config.comparison import Compare
from t5x_lite.config.data import Data
from t5x_lite.config.lora import Lora
from t5x_lite.config.training import Schedule, Train

RunT = TypeVar("RunT", bound=Run)


class DataRun(Run):
    """A Run that reads data."""

    data: Data


class TrainingRun(DataRun):
    """A Run that trains: it has `data`, `train` and `schedule`."""

    train: Train
    schedule: Schedule


class ComparisonRun(TrainingRun):
    """A TrainingRun whose twins are compared."""

    compare: Compare


def require_training(run: Run, otherwise: str = "") -> TrainingRun:
    """Returns the run if it trains.

    Args:
      run: any run.
      otherwise: further remedy, a clause that follows the first one.

    Raises:
      ValueError: `data`, `train` or `schedule` is missing; names them.
    """
    missing = [f"Run.{name}" for name in ("data", "train", "schedule") if not getattr(run, name)]
    require(
        not missing,
        f"The config does not train: it lacks {', '.join(missing)}. Add a file of configs/runs, "
        f"such as --gin_file=configs/runs/pretrain.gin{otherwise}",
    )
    return cast(TrainingRun, run)


def require_lora(run: Run) -> Lora:
    """Returns the config of a run's adapters; raises ValueError if it has none."""
    require(run.lora is not None, "The run has no adapters: bind config.Run.lora = @config.Lora()")
    return cast(Lora, run.lora)


def require_comparison(run: Run) -> ComparisonRun:
    """Returns the run if it trains and compares; raises ValueError if it does not."""
    require(
        run.compare is not None,
        "The config compares nothing: bind config.Run.compare = @config.Compare(), as "
        "configs/runs/compare_g2p.gin does",
    )
    return cast(ComparisonRun, require_training(run))
