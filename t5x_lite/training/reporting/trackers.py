# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run for Weights & Biases and MLflow, which go on with their run after a restart.

Both take server, project and credentials from their own environment variables; nothing of these is
written here. MODEL_DIR/trackers.json has the ids of their runs.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_lite.config.training_run import TrainingRun
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.paths import is_address

IDS = "trackers.json"
# Where the library's own variable names none.
PROJECT = "t5x_lite"
# Characters that MLflow's names cannot have, and the most parameters of a batch.
NOT_IN_NAMES, BATCH = re.compile(r"[^\w\-. :/]"), 100


def check_installed(names: tuple[str, ...]) -> None:
    """Raises ValueError for a tracker whose library is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"Train.trackers needs {name}: {install_command(name)}")


def read_ids(model_dir: Path) -> dict[str, str]:
    """Ids of the runs by tracker; {} where there are none that can be read."""
    try:
        ids = bounded_files.read_json_object(model_dir / IDS)
    except (OSError, ValueError):
        return {}
    return {name: each for name, each in ids.items() if isinstance(each, str)}


def write_id(model_dir: Path, name: str, identity: str) -> None:
    """Records the id of a tracker's run in MODEL_DIR.

    Args:
      model_dir: MODEL_DIR.
      name: the tracker.
      identity: id of its run.
    """
    ids = read_ids(model_dir) | {name: identity}
    write_atomically(model_dir / IDS, json.dumps(ids, indent=1) + "\n")


def list_settings(value: Any, name: str = "") -> dict[str, Any]:
    """Fields of a config by dotted name, those that are None left out.

    Args:
      value: a dataclass of the config, or a value in one.
      name: its name.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field, getattr(value, field)) for field in vars(value)]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        items = list(enumerate(value))
    else:
        return {} if value is None else {name: value}
    settings: dict[str, Any] = {}
    for key, each in items:
        settings |= list_settings(each, f"{name}.{key}".lstrip("."))
    return settings


class WandbFile:
    """A run of Weights & Biases: a new one, or the one that MODEL_DIR has had so far."""

    def __init__(self, model_dir: Path, run: TrainingRun, start: int | None):
        """Begins the run, or goes on with it.

        Args:
          model_dir: MODEL_DIR.
          run: config of the run.
          start: step of the checkpoint that it goes on from; None for a new run.
        """
        wandb = importlib.import_module("wandb")
        known = read_ids(model_dir).get("wandb") if start is not None else None
        # Neither the console, nor code, nor the repository is anybody's business but the user's.
        quiet = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", model_dir.name),
            dir=None if is_address(model_dir) else str(model_dir),
            id=known,
            resume="allow" if known else None,
            config={name: str(value) for name, value in list_settings(run).items()},
            settings=wandb.Settings(**quiet),
        )
        if known is None:
            write_id(model_dir, "wandb", self.run.id)

    def write(self, step: int, values: dict[str, float], failures: dict[str, str]) -> None:
        """Logs values.

        Args:
          step: steps done.
          values: metrics by their whole names.
          failures: not logged.
        """
        self.run.log(values, step=step)

    def flush(self) -> None:
        """Does nothing: wandb writes in a process of its own."""

    def close(self) -> None:
        """Ends the run, for now."""
        self.run.finish()


class MlflowFile:
    """A run of MLflow: a new one, or the one that MODEL_DIR has had so far."""

    def __init__(self, model_dir: Path, run: TrainingRun, start: int | None):
        """Begins the run, or goes on with it.

        Args:
          model_dir: MODEL_DIR.
          run: config of the run.
          start: step of the checkpoint that it goes on from; None for a new run.
        """
        self.client = importlib.import_module("mlflow.tracking").MlflowClient()
        self.entities = importlib.import_module("mlflow.entities")
        known = read_ids(model_dir).get("mlflow") if start is not None else None
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.identity = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.identity = self.client.create_run(number, run_name=model_dir.name).info.run_id
        self.log_settings(run)
        write_id(model_dir, "mlflow", self.identity)

    def log_settings(self, run: TrainingRun) -> None:
        """Logs the config as parameters."""
        settings = list_settings(run).items()
        params = [self.entities.Param(name, str(value)[:500]) for name, value in settings]
        for begin in range(0, len(params), BATCH):
            self.client.log_batch(self.identity, params=params[begin : begin + BATCH])

    def write(self, step: int, values: dict[str, float], failures: dict[str, str]) -> None:
        """Logs values.

        Args:
          step: steps done.
          values: metrics by their whole names.
          failures: not logged.
        """
        now = int(1000 * time.time())
        named = {NOT_IN_NAMES.sub("_", name): value for name, value in values.items()}
        metrics = [
            self.entities.Metric(name, float(value), now, step) for name, value in named.items()
        ]
        self.client.log_batch(self.identity, metrics=metrics)

    def flush(self) -> None:
        """Does nothing: every line is logged at once."""

    def close(self) -> None:
        """Ends the run, for now."""
        self.client.set_terminated(self.identity, "FINISHED")


# Sinks by the names of Train.trackers.
TRACKERS = {"wandb": WandbFile, "mlflow": MlflowFile}


def make_trackers(
    model_dir: Path, run: TrainingRun, start: int | None
) -> dict[str, Callable[[], Any]]:
    """Functions that open the runs of Train.trackers, by their names.

    Args:
      model_dir: MODEL_DIR.
      run: config of the run.
      start: step of the checkpoint that it goes on from; None for a new run.
    """
    return {
        name: functools.partial(TRACKERS[name], model_dir, run, start)
        for name in run.train.trackers
    }
