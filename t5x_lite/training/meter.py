# SPDX-License-Identifier: Apache-2.0
"""From what steps tell to a line of metrics: averages per token, speeds and shares."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.training import state as states
from t5x_lite.training.step import Metrics


class Diverged(ValueError):
    """Too many steps in a row had a gradient that is not finite."""


@dataclasses.dataclass
class Totals:
    """What adds up over the whole run, restarts included; kept in every checkpoint."""

    seconds: float = 0.0
    target_tokens: float = 0.0
    tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is by its shapes: positions of its batch, FLOPs, and the chips' peak."""

    positions: int
    flops: int
    peak: float | None


class Meter:
    """Keeps what the steps of a window tell, on the device until the window is read."""

    def __init__(self, train: config.Train, work: Work, totals: Totals):
        self.train, self.work, self.totals = train, work, totals
        self.window: list[tuple[int, Metrics]] = []
        self.waited = self.waited_before = 0.0
        self.began = time.perf_counter()

    def fetched(self, waited: float) -> None:
        """Takes note of a batch that came; `waited` is the time waited for all batches so far."""
        # A device that is still busy with the step before did not wait.
        if not self.window or self.window[-1][1].learning_rate.is_ready():
            self.waited += waited - self.waited_before
        self.waited_before = waited

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes note of a step that was begun; keeps the host at most two steps ahead."""
        self.window.append((step, metrics))
        if len(self.window) > 2:
            jax.block_until_ready(self.window[-3][1].learning_rate)

    @contextlib.contextmanager
    def pause(self):
        """Time inside is not training: evaluation, saving."""
        if self.window:
            jax.block_until_ready(self.window[-1][1].learning_rate)
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - paused

    def glance(self) -> dict[str, float] | None:
        """The line of the window so far, from the steps that are done; None where none is."""
        told = fetch(self.window[:-2])
        return self.line(told, time.perf_counter() - self.began) if told else None

    def read(self) -> dict[str, float]:
        """The window as one line of metrics; begins the next window.

        Raises:
          Diverged: Train.patience steps in a row were skipped.
        """
        told = fetch(self.window)
        seconds = time.perf_counter() - self.began
        stop_if_diverged(self.window, told, self.train.patience)
        self.totals.seconds += seconds
        self.totals.target_tokens += total("weights", told)
        self.totals.tokens += total("tokens", told)
        line = self.line(told, seconds) | {"seconds": self.totals.seconds}
        self.window, self.waited, self.began = [], 0.0, time.perf_counter()
        return line

    def line(self, told: list[Metrics], seconds: float) -> dict[str, float]:
        """What `told` steps, which took `seconds`, come to.

        loss is nats per target token, objective the same with smoothing and z-loss, accuracy per
        cent, divergence nats from the teacher per token, heads_accuracy per cent of the tokens
        that heads guess; speeds count tokens per second over all devices, without padding; padding
        and waiting are shares.
        """
        fine = [metrics for metrics in told if not metrics.skipped] or told
        weights, tokens = max(total("weights", fine), 1.0), total("tokens", told)
        line = {
            "loss": total("loss", fine) / weights,
            "objective": total("objective", fine) / weights,
            "accuracy": 100 * total("correct", fine) / weights,
            "gradient_norm": float(told[-1].gradient_norm),
            "learning_rate": float(told[-1].learning_rate),
            "skipped": int(sum(bool(metrics.skipped) for metrics in told)),
            "target_tokens_per_second": total("weights", told) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / (len(told) * self.work.positions),
            "waiting": min(1.0, self.waited / seconds),
            "step_seconds": seconds / len(told),
        }
        if told[0].sums.divergence is not None:
            line["divergence"] = total("divergence", fine) / max(total("taught", fine), 1.0)
        if told[0].sums.guesses is not None:
            line["heads_accuracy"] = 100 * total("guessed", fine) / max(total("guesses", fine), 1.0)
        if self.work.peak:
            line["mfu"] = self.work.flops / line["step_seconds"] / self.work.peak
        return line


def fetch(window: list[tuple[int, Metrics]]) -> list[Metrics]:
    """What steps tell, on the host, but for the squares: they are many, and seldom wanted."""
    return jax.device_get([metrics._replace(squares=None) for _, metrics in window])


def total(name: str, told: list[Metrics]) -> float:
    """One of the sums, over several steps."""
    return float(np.sum([getattr(metrics.sums, name) for metrics in told], dtype=np.float64))


def stop_if_diverged(window: list[tuple[int, Metrics]], told: list[Metrics], patience: int) -> None:
    """Raises Diverged where `patience` steps in a row were skipped, naming weights and layers."""
    for (number, on_device), metrics in zip(window, told, strict=True):
        if metrics.consecutive < patience:
            continue
        raise Diverged(
            f"The gradient was not finite in {int(metrics.consecutive)} steps in a row, the last "
            f"of them step {number} (Train.patience is {patience}). The loss was "
            f"{float(metrics.sums.loss / metrics.sums.weights):.4g}; not finite were the gradients "
            f"of {where(jax.device_get(on_device.squares))}. The weights are those before the "
            "first of these steps: try a lower Schedule.peak, a longer warmup, "
            "Optimizer.clip_norm, or look at the data."
        )


def where(squares) -> str:
    """Which weights' gradients are not finite, by layer where only some are."""
    found = []
    leaves = jax.tree.leaves(squares)
    for name, square in zip(states.names(squares), leaves, strict=True):
        broken = np.flatnonzero(~np.isfinite(np.atleast_1d(square)))
        if len(broken) == 0:
            continue
        all_of_them = len(broken) == np.size(square)
        layers = "" if all_of_them else f" (layers {', '.join(map(str, broken))})"
        found.append(name + layers)
    if len(found) == len(leaves):
        return f"every weight, {found[0]} to {found[-1]}"
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(found[:6]) + more
