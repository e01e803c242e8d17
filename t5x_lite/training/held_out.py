# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a run on its held-out split: when they are due, and the newest values."""

import time
from collections.abc import Callable
from typing import Any

from t5x_lite.config.training_run import TrainingRun
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.training import setup
from t5x_lite.utils.not_none import not_none


class HeldOut:
    """Held-out metrics of a run.

    Attributes:
      run: config of the run.
      evaluator: measures weights on the split; None where nothing is measured.
      step: newest step that was measured; -1 before the first.
      values: metrics of that step.
      seconds: time that evaluations have taken in this process.
    """

    def __init__(self, run: TrainingRun):
        self.run = run
        self.evaluator: Evaluator | None = None
        self.step, self.values, self.seconds = -1, {}, 0.0

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.run.data.eval_split

    @property
    def failures(self) -> dict[str, str]:
        """Metrics of the newest evaluation that are not computed, with reasons."""
        return self.evaluator.failures if self.evaluator else {}

    def is_due(self, done: int) -> bool:
        """True if the weights after `done` steps are to be measured."""
        every = self.run.evaluate.every
        return done == self.run.train.steps or (every > 0 and done % every == 0)

    def is_missing(self, done: int) -> bool:
        """True if there is something to measure and the weights after `done` steps were not."""
        return self.evaluator is not None and self.step != done

    def values_at(self, done: int) -> dict[str, float]:
        """Metrics after `done` steps; {} where they are not measured yet."""
        return self.values if self.step == done else {}

    def measure(
        self, params: Any, done: int, on_progress: Callable[[int], None]
    ) -> dict[str, float]:
        """Measures weights, and returns their metrics.

        Args:
          params: whole weights.
          done: steps that they have trained.
          on_progress: called with the number of examples decoded.

        Raises:
          ValueError: Checkpoint.metric is not among the metrics.
        """
        began = time.perf_counter()
        values = not_none(self.evaluator)(params, done, on_progress)
        if not self.failures:
            setup.check_metric(self.run.checkpoint, values)
        self.seconds += time.perf_counter() - began
        self.step, self.values = done, values
        return values

    def describe(self) -> list[str]:
        """Lines about the newest values: what was measured, and what was not."""
        words = "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        begin = f"step {self.step} {self.split}:"
        failed = [f"{begin} {n} not computed: {reason}" for n, reason in self.failures.items()]
        return [f"{begin} {words}", *failed]
