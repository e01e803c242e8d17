# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a run on its held-out split: when they are due, and the newest values."""

import time
from collections.abc import Callable

from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.training import frozen_base, setup, weight_average
from t5x_lite.training.frozen_base import FrozenBase
from t5x_lite.utils.not_none import not_none


class HeldOut:
    """Held-out metrics of a run.

    Attributes:
      run: config of the run.
      evaluator: measures weights on the split; None where nothing is measured.
      step: newest step that was measured; -1 before the first.
      values: metrics of that step.
      failures: those that are not computed, with reasons.
      seconds: time that evaluations have taken in this process.
    """

    def __init__(self, run: TrainingRun):
        self.run = run
        self.evaluator: Evaluator | None = None
        self.values: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.step, self.seconds = -1, 0.0

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.run.data.eval_split

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
        self,
        state: TrainState,
        base: FrozenBase | None,
        done: int,
        on_progress: Callable[[int], None] | None,
    ) -> dict[str, float]:
        """Measures the weights, and the averaged copy where the run wants it; returns the metrics.

        Args:
          state: state of the run.
          base: frozen weights of its adapters; None without any.
          done: steps that it has trained.
          on_progress: called with the number of examples decoded.

        Raises:
          ValueError: Checkpoint.metric is not among the metrics.
        """
        began, evaluator = time.perf_counter(), not_none(self.evaluator)
        params = frozen_base.whole_params(self.run, state.params, base)
        values, failures = evaluator(params, done, on_progress), dict(evaluator.failures)
        if weight_average.is_measured(self.run):
            name, averaged = weight_average.metric_name, weight_average.averaged_params
            params = frozen_base.whole_params(self.run, averaged(self.run, state), base)
            evaluator.label = "average-"
            try:
                more = evaluator(params, done, on_progress)
            finally:
                evaluator.label = ""
            values |= {name(key): value for key, value in more.items()}
            failures |= {name(key): reason for key, reason in evaluator.failures.items()}
        if not failures:
            setup.check_metric(self.run.checkpoint, values)
        self.seconds += time.perf_counter() - began
        self.step, self.values, self.failures = done, values, failures
        return values

    def describe(self) -> list[str]:
        """Lines about the newest values: what was measured, and what was not."""
        words = "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        begin = f"step {self.step} {self.split}:"
        failed = [f"{begin} {n} not computed: {reason}" for n, reason in self.failures.items()]
        return [f"{begin} {words}", *failed]
