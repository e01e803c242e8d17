# SPDX-License-Identifier: Apache-2.0
"""Progress of a run on the console: its steps, and lines of their metrics."""

import contextlib
from collections.abc import Generator

from t5x_lite.cli.progress import Progress, format_count, format_duration
from t5x_lite.training.reporting.metrics import Meter


class StepProgress:
    """Steps in progress: the bar of those that are done, and the window of their metrics.

    Attributes:
      bar: counts the steps.
      meter: keeps metrics of steps on the device until they are read.
      newest: metrics of the newest window; {} before the first is closed.
    """

    def __init__(self, bar: Progress, meter: Meter):
        self.bar, self.meter = bar, meter
        self.newest: dict[str, float] = {}
        bar.label("first steps")

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Context whose time does not count as training: evaluation, saving."""
        with self.meter.pause(), self.bar.pause():
            yield

    def close_window(self) -> dict[str, float]:
        """Closes the window of metrics, and shows and returns its line."""
        self.newest = self.meter.close_window()
        self.show(self.newest)
        return self.newest

    def show(self, values: dict[str, float]) -> None:
        """Shows a line of metrics: always beside a live progress bar, else now and then."""
        if self.bar.live or self.bar.due() or self.bar.done == self.bar.total:
            self.bar.show(format_metrics(values, self.bar.seconds_left()))

    def show_if_due(self) -> None:
        """Shows the metrics of the window so far, where the line shown is old."""
        if self.bar.due() and (line := self.meter.peek()):
            self.show(line)

    def show_decoded(self, examples: int) -> None:
        """Shows the number of examples that an evaluation has decoded so far."""
        if self.bar.live or self.bar.due():
            self.bar.show(f"evaluating: {examples} examples decoded")


def format_metrics(values: dict[str, float], left: float | None) -> str:
    """One line of metrics; `left` is the estimate of seconds to go, None if there is none."""
    parts = [] if left is None else [f"ETA {format_duration(left)}"]
    parts.append(f"loss {values['loss']:.4f}")
    if "reward" in values:
        parts.append(f"reward {values['reward']:.3g}")
    if "preference_accuracy" in values:
        parts.append(f"preferred {values['preference_accuracy']:.3g} %")
    parts += [
        f"{format_count(values['target_tokens_per_second'])} target tok/s",
        f"{format_count(values['tokens_per_second'])} tok/s",
        f"padding {values['padding']:.0%}",
        f"waiting {values['waiting']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)
