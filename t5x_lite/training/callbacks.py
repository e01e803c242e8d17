# SPDX-License-Identifier: Apache-2.0
"""Callbacks: a user's code at fixed moments of a run, which can neither change nor end it."""

import copy
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5x_lite import processes
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training.step_values import StepMetrics

# A call that takes longer than this many seconds is reported, once for a callback.
SLOW = 1.0


@dataclasses.dataclass(frozen=True)
class RunMoment:
    """RunMoment of a run at which a callback is called.

    Attributes:
      run: config of the run.
      step: steps done.
      params: the weights that train, as jax arrays; they may be gone once the call has returned.
      metrics: results of the newest step on the device; None before the first.
    """

    run: TrainingRun
    step: int
    params: Any
    metrics: StepMetrics | None = None

    def values(self) -> dict[str, float]:
        """Loss, accuracy, gradient norm and so on of the newest step; waits for the device."""
        if self.metrics is None:
            return {}
        metrics = jax.device_get(self.metrics._replace(squares=None))
        sums, weights = metrics.sums, max(float(metrics.sums.weights), 1.0)
        return {
            "loss": float(sums.loss) / weights,
            "objective": float(sums.objective) / weights,
            "accuracy": 100 * float(sums.correct) / weights,
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(metrics.learning_rate),
            "skipped": float(metrics.skipped),
        }


class Callback:
    """Base class of callbacks, which override the methods that they need.

    Train.callbacks names subclasses, "my_module.Watch". They are made when a run begins or resumes,
    with nothing of what they had before, and called in that order. What they raise is reported, and
    then they are not called any more; training goes on. The run waits for each call, and a signal
    ends it. They print where they like. Nothing that they return is read.

    Attributes:
      every_process: called in every process of the run; False calls it in process 0 alone.
    """

    every_process = False

    def __init__(self, run: TrainingRun):
        """Prepares the callback; an error here refuses the run."""

    def before_step(self, moment: RunMoment) -> None:
        """Called before each step."""

    def after_step(self, moment: RunMoment) -> None:
        """Called once each step has been started; `moment.values()` waits for it."""

    def after_evaluation(
        self, moment: RunMoment, values: dict[str, float], failures: dict[str, str]
    ) -> None:
        """Called after each evaluation.

        Args:
          moment: the moment.
          values: held-out metrics by name.
          failures: those that were not computed, with reasons.
        """

    def after_save(self, moment: RunMoment, step: int, folder: Path) -> None:
        """Called when a checkpoint is known to be complete: at the next one, or at the end of the
        run; not for one that a signal has caused.

        Args:
          moment: the moment, whose weights may be later ones.
          step: step of the checkpoint.
          folder: its folder.
        """

    def at_end(self, moment: RunMoment, report: dict[str, Any]) -> None:
        """Called once the report is written."""


class CallbackList:
    """Callbacks of a run that are still called.

    Attributes:
      active: callbacks by name.
      seconds: time that each has taken.
      report: is called with a sentence about one that fails or is slow.
    """

    def __init__(self, run: TrainingRun, report: Callable[[str], None]):
        self.report = report
        self.active: dict[str, Callback] = {}
        for name, kind in import_callbacks(run.train.callbacks).items():
            if not (processes.is_first() or kind.every_process):
                continue
            try:
                self.active[name] = kind(run)
            except (Exception, SystemExit) as error:  # the user may do anything
                reason = processes.describe_error(error)
                raise ValueError(f"Train.callbacks: {name} cannot be made: {reason}") from error
        self.seconds = dict.fromkeys(self.active, 0.0)
        self.slow: set[str] = set()

    def listens(self, method: str) -> bool:
        """True if an active callback overrides the method."""
        return any(overrides(each, method) for each in self.active.values())

    def call(self, method: str, moment: RunMoment, *arguments: Any) -> None:
        """Calls a method of all callbacks that override it.

        Args:
          method: name of the method.
          moment: its first argument.
          *arguments: the others.
        """
        for name, callback in list(self.active.items()):
            if not overrides(callback, method):
                continue
            began = time.perf_counter()
            try:
                # Containers of its own: a callback that empties them harms nobody.
                copied = dataclasses.replace(moment, params=jax.tree.map(keep_leaf, moment.params))
                getattr(callback, method)(copied, *map(copy.copy, arguments))
            except (Exception, SystemExit) as error:
                del self.active[name]
                self.report(
                    f"The callback {name} failed in {method} at step {moment.step} "
                    f"({processes.describe_error(error)}): it is not called any more; training "
                    "goes on."
                )
            taken = time.perf_counter() - began
            self.seconds[name] += taken
            if taken > SLOW and name not in self.slow:
                self.slow.add(name)
                self.report(f"The run waited {taken:.1f} s for the callback {name} in {method}.")


def keep_leaf(leaf: Any) -> Any:
    """Returns a leaf as it is."""
    return leaf


def overrides(callback: Callback, method: str) -> bool:
    """True if the class of a callback has a method of its own by that name."""
    return getattr(type(callback), method) is not getattr(Callback, method)


def import_callbacks(names: tuple[str, ...]) -> dict[str, type[Callback]]:
    """Imports the classes of Train.callbacks, from modules of the working folder too.

    Raises:
      ValueError: there is no such class, its module fails, or it is not a Callback.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    kinds = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module or name), attribute)
        except (Exception, SystemExit) as error:
            reason = processes.describe_error(error)
            raise ValueError(
                f"Train.callbacks: {name} cannot be imported ({reason}); MODULE.NAME names a class "
                "in the working folder or in an installed package"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, Callback)):
            raise ValueError(
                f"Train.callbacks: {name} is not a class derived from "
                "t5x_lite.training.callbacks.Callback"
            )
        kinds[name] = kind
    return kinds
