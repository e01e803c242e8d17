# SPDX-License-Identifier: Apache-2.0
"""Metrics of training steps: averages per token, speeds and shares of time."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import flops
from t5x_lite.training.step import StepMetrics
from t5x_lite.utils.exit_status import FAILURE
from t5x_lite.utils.not_none import not_none


class Diverged(ValueError):
    """Too many steps in a row had a gradient or an update that is not finite."""

    exit_status = FAILURE


@dataclasses.dataclass
class RunTotals:
    """Totals over the whole run, restarts included; saved in every checkpoint.

    Attributes:
      seconds: time in steps.
      target_tokens: targets that count.
      tokens: inputs and targets without padding.
    """

    seconds: float = 0.0
    target_tokens: float = 0.0
    tokens: float = 0.0

    @classmethod
    def from_saved(cls, values: Mapping[str, float]) -> "RunTotals":
        """The totals of a checkpoint; those that this version does not know are left out."""
        return cls(**{name: values[name] for name in vars(cls()) if name in values})

    def report(self) -> dict[str, float]:
        """Time spent in steps over all restarts, targets, and speeds."""
        seconds = max(self.seconds, 1e-9)
        return {
            "train_seconds": self.seconds,
            "trained_target_tokens": self.target_tokens,
            "target_tokens_per_second": self.target_tokens / seconds,
            "tokens_per_second": self.tokens / seconds,
        }


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of a step by its shapes.

    Attributes:
      positions: inputs and targets of a batch, padding included.
      flops: floating-point operations.
      peak: FLOP/s of all chips in bfloat16; None if it is not known.
    """

    positions: int
    flops: int
    peak: float | None


def step_cost(run: TrainingRun) -> StepCost:
    """Positions and FLOPs of a step of this run, and the peak of all chips if it is known."""
    lengths, rows = run.data.lengths, flops.step_rows(run)
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return StepCost(
        positions=rows * sum(flops.row_lengths(run.model.batch_layout, lengths)),
        flops=flops.run_flops(run),
        peak=peak and peak * jax.device_count(),
    )


class Meter:
    """Metrics of a window of steps, which stay on the device until the window is read."""

    def __init__(self, train: config.Train, cost: StepCost, totals: RunTotals):
        self.train, self.cost, self.totals = train, cost, totals
        self.window: list[tuple[int, StepMetrics]] = []
        self.values: list[dict[str, float]] = []
        self.waited = self.waited_before = 0.0
        self.began = time.perf_counter()

    def record_batch(self, waited: float) -> None:
        """Records the arrival of a batch; `waited` is the time waited for all batches so far."""
        # A device that is still busy with the step before did not wait.
        if not self.window or self.window[-1][1].learning_rate.is_ready():
            self.waited += waited - self.waited_before
        self.waited_before = waited

    def record_step(self, step: int, metrics: StepMetrics) -> None:
        """Records a step that was started; keeps the host at most two steps ahead."""
        self.window.append((step, metrics))
        if len(self.window) > 2:
            jax.block_until_ready(self.window[-3][1].learning_rate)

    def record_values(self, values: dict[str, float]) -> None:
        """Records numbers of a step by name, which a line has the mean of."""
        self.values.append(values)

    @contextlib.contextmanager
    def pause(self):
        """Context whose time does not count as training: evaluation, saving."""
        if self.window:
            jax.block_until_ready(self.window[-1][1].learning_rate)
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - paused

    def peek(self) -> dict[str, float] | None:
        """The line of the window so far, from the steps that are done; None if there are none."""
        steps = fetch_metrics(self.window[:-2])
        return self.line(steps, time.perf_counter() - self.began) if steps else None

    def close_window(self) -> dict[str, float]:
        """Returns the window as one line of metrics, and begins the next window.

        Raises:
          Diverged: Train.max_consecutive_skips steps in a row were skipped.
        """
        steps = fetch_metrics(self.window)
        seconds = time.perf_counter() - self.began
        stop_if_diverged(self.window, steps, self.train.max_consecutive_skips)
        self.totals.seconds += seconds
        self.totals.target_tokens += sum_over_steps("weights", steps)
        self.totals.tokens += sum_over_steps("tokens", steps)
        line = self.line(steps, seconds) | {"seconds": self.totals.seconds}
        self.window, self.values, self.waited = [], [], 0.0
        self.began = time.perf_counter()
        return line

    def line(self, steps: list[StepMetrics], seconds: float) -> dict[str, float]:
        """Averages over steps that took `seconds` together.

        loss is nats per target token, objective the same with smoothing and z-loss, accuracy
        percent, divergence nats from the teacher per token, heads_accuracy percent of the targets
        of draft heads; speeds count tokens per second over all devices, without padding; padding
        and waiting are shares.
        """
        finite = [metrics for metrics in steps if not metrics.skipped] or steps
        weights, tokens = (
            max(sum_over_steps("weights", finite), 1.0),
            sum_over_steps("tokens", steps),
        )
        counted = weights
        if steps[0].sums.units is not None:
            counted = max(sum_over_steps("units", finite), 1.0)
        line = {
            "loss": sum_over_steps("loss", finite) / weights,
            "objective": sum_over_steps("objective", finite) / counted,
            "gradient_norm": float(steps[-1].gradient_norm),
            "learning_rate": float(steps[-1].learning_rate),
            "skipped": int(sum(bool(metrics.skipped) for metrics in steps)),
            "target_tokens_per_second": sum_over_steps("weights", steps) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / (len(steps) * self.cost.positions),
            "waiting": min(1.0, self.waited / seconds),
            "step_seconds": seconds / len(steps),
        }
        if steps[0].sums.correct is not None:
            line["accuracy"] = 100 * sum_over_steps("correct", finite) / weights
        if steps[0].sums.divergence is not None:
            line["divergence"] = sum_over_steps("divergence", finite) / max(
                sum_over_steps("teacher_tokens", finite), 1.0
            )
        if steps[0].sums.head_targets is not None:
            targets = max(sum_over_steps("head_targets", finite), 1.0)
            line["heads_accuracy"] = 100 * sum_over_steps("head_correct", finite) / targets
        for name in steps[0].sums.means or ():
            values = [not_none(metrics.sums.means)[name] for metrics in finite]
            line[name] = float(np.sum(values, dtype=np.float64)) / counted
        for name in self.values[0] if self.values else ():
            line[name] = float(np.mean([values[name] for values in self.values]))
        if self.cost.peak:
            line["mfu"] = self.cost.flops / line["step_seconds"] / self.cost.peak
        return line


def fetch_metrics(window: list[tuple[int, StepMetrics]]) -> list[StepMetrics]:
    """Metrics of steps on the host, without the squares: those are many, and seldom needed."""
    return jax.device_get([metrics._replace(squares=None) for _, metrics in window])


def sum_over_steps(name: str, steps: list[StepMetrics]) -> float:
    """Sum over steps of the field `name` of LossSums."""
    return float(np.sum([getattr(metrics.sums, name) for metrics in steps], dtype=np.float64))


def stop_if_diverged(
    window: list[tuple[int, StepMetrics]], steps: list[StepMetrics], most_skips: int
) -> None:
    """Raises Diverged if too many steps in a row were skipped; names weights and layers.

    Args:
      window: numbers of steps, and their metrics on the device.
      steps: the same metrics on the host.
      most_skips: Train.max_consecutive_skips.
    """
    for (number, on_device), metrics in zip(window, steps, strict=True):
        if metrics.consecutive < most_skips:
            continue
        loss = float(metrics.sums.loss / metrics.sums.weights)
        weights = name_nonfinite(jax.device_get(on_device.squares))
        which = f"not finite were the gradients of {weights}"
        if not weights:
            rate = float(metrics.learning_rate)
            which = f"the gradients were finite, but not the updates at a learning rate of {rate:g}"
        raise Diverged(
            f"{int(metrics.consecutive)} steps in a row were skipped, the last of them step "
            f"{number}: gradient or update was not finite in them (Train.max_consecutive_skips is "
            f"{most_skips}). The loss was {loss:.4g}; {which}. The weights are those before the "
            "first of these steps: try a lower Schedule.peak, a longer warmup, "
            "Optimizer.clip_norm, or look at the data."
        )


def name_nonfinite(squares) -> str:
    """Names of the weights whose gradients are not finite, with layers if only some are."""
    names = []
    leaves = flatten_tree(squares)
    for name, square in leaves.items():
        broken = np.flatnonzero(~np.isfinite(np.atleast_1d(square)))
        if len(broken) == 0:
            continue
        all_of_them = len(broken) == np.size(square)
        layers = "" if all_of_them else f" (layers {', '.join(map(str, broken))})"
        names.append(name + layers)
    if len(names) == len(leaves):
        return f"every weight, {names[0]} to {names[-1]}"
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
