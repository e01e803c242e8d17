# SPDX-License-Identifier: Apache-2.0
"""The live line of a run: a bar on a terminal, a line of text now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Characters of the bar itself.
BAR = 16

# Seconds between lines where nobody watches a terminal, and where somebody does.
QUIET, LIVELY = 20.0, 2.0


def console(quiet: bool = False) -> Console:
    """Where people read: stderr, plain text unless it is a terminal; nowhere if quiet."""
    if sys.stderr.isatty():
        return Console(stderr=True, quiet=quiet)
    return Console(stderr=True, width=110, highlight=False, quiet=quiet)


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
    parts = [] if left is None else [f"ETA {duration(left)}"]
    parts += [
        f"loss {values['loss']:.4f}",
        f"{count(values['target_tokens_per_second'])} target tok/s",
        f"{count(values['tokens_per_second'])} tok/s",
        f"padding {values['padding']:.0%}",
        f"waiting {values['waiting']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)


class Bar:
    """Shows where a run is, with the newest line of metrics; lines elsewhere than on a terminal."""

    def __init__(self, console: Console, start: int, stop: int):
        self.console, self.stop = console, stop
        self.shown = time.monotonic()
        self.progress = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(BAR),
                TextColumn("{task.description}", markup=False),
            )
            self.progress = Progress(*columns, console=console, refresh_per_second=4)
            self.task = self.progress.add_task("first steps", total=stop, completed=start)
            self.progress.start()

    def due(self) -> bool:
        """Whether what is shown has become old."""
        return time.monotonic() - self.shown > (QUIET if self.progress is None else LIVELY)

    def advance(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def update(self, step: int, values: dict[str, float]) -> None:
        left = (self.stop - step) * values["step_seconds"]
        if self.progress is not None:
            self.say(text(values, left))
        elif self.due() or step == self.stop:
            self.console.print(f"step {step}/{self.stop}  {text(values, left)}", soft_wrap=True)
        else:
            return
        self.shown = time.monotonic()

    def say(self, words: str) -> None:
        """Puts words beside the bar; nowhere else than on a terminal."""
        if self.progress is not None:
            # Cut here: rich would shrink the steps and the bar instead.
            room = self.console.width - BAR - len(f"{self.stop}/{self.stop}") - 3
            self.progress.update(self.task, description=words[:room])

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
