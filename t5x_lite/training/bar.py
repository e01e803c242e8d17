# SPDX-License-Identifier: Apache-2.0
"""The live line of a run: a bar on a terminal, a line of text now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Seconds between lines where nobody watches a terminal.
QUIET = 20.0


def console() -> Console:
    """Where people read: stderr, plain text unless it is a terminal."""
    if sys.stderr.isatty():
        return Console(stderr=True)
    return Console(stderr=True, width=110, highlight=False)


def count(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def text(values: dict[str, float], left: float | None) -> str:
    """One line of metrics in words."""
    parts = [
        f"loss {values['loss']:.4f}",
        f"{count(values['target_tokens_per_second'])} target tok/s",
        f"{count(values['tokens_per_second'])} tok/s",
        f"padding {values['padding']:.0%}",
        f"waiting {values['waiting']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"[red]skipped {values['skipped']}[/red]")
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    return "  ".join(parts)


class Bar:
    """Shows where a run is; `update` is cheap to call at every line of metrics."""

    def __init__(self, console: Console, start: int, stop: int):
        self.console, self.stop = console, stop
        self.shown = 0.0
        self.progress = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(20),
                TextColumn("{task.description}"),
            )
            self.progress = Progress(*columns, console=console, refresh_per_second=4)
            self.task = self.progress.add_task("compiling", total=stop, completed=start)
            self.progress.start()

    def advance(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def update(self, step: int, values: dict[str, float]) -> None:
        left = (self.stop - step) * values["step_seconds"]
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text(values, left))
        elif time.monotonic() - self.shown > QUIET or step == self.stop:
            self.shown = time.monotonic()
            self.console.print(f"step {step}/{self.stop}  {text(values, left)}", soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
