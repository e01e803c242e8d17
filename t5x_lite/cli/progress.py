# SPDX-License-Identifier: Apache-2.0
"""Progress of work that takes long, on stderr: a live bar on a terminal, else a line at times."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Characters of the bar itself.
BAR = 16
# Seconds between lines where nobody watches a terminal, and where somebody does.
QUIET, LIVELY = 20.0, 2.0


def stderr_console(quiet: bool = False) -> "Console":
    """Console for people: stderr, plain text unless it is a terminal; nowhere if quiet."""
    from rich.console import Console

    if sys.stderr.isatty():
        return Console(stderr=True, quiet=quiet)
    return Console(stderr=True, width=110, highlight=False, quiet=quiet)


def format_count(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts what is done, shows it at times, and sums it up at the end.

    As a context manager it ends with a line of how many were done in how long; after an error it
    only takes the bar away.

    Attributes:
      unit: what is counted: "lines".
      total: how many there are; None if unknown.
      done: how many are done.
    """

    def __init__(
        self,
        unit: str,
        total: int | None,
        start: int = 0,
        console: "Console | None" = None,
    ):
        """Begins to count.

        Args:
          unit: what is counted: "lines".
          total: how many there are; None if unknown.
          start: how many were done before.
          console: where to; stderr if None.
        """
        self.unit, self.total, self.start, self.done = unit, total, start, start
        self.console = console or stderr_console()
        self.began = self.shown = time.monotonic()
        self.bar = None
        if self.console.is_terminal:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            of = "{task.completed}" if total is None else "{task.completed}/{task.total}"
            texts = TextColumn(of), TextColumn("{task.description}", markup=False)
            columns = (texts[0], BarColumn(BAR), texts[1])
            self.bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self.task = self.bar.add_task(unit, total=total, completed=start)
            self.bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if error is None and self.done > self.start:
            seconds = time.monotonic() - self.began
            amount = f"{self.done:,} {self.unit} in {format_duration(seconds)}"
            self.console.print(f"{amount}, {self.rate():,.1f}/s", markup=False, soft_wrap=True)

    def __call__(self, done: int) -> None:
        """Counts that `done` are done; shows the rate and the time left when it is time to."""
        self.advance(done)
        if self.due():
            self.show(self.estimate())

    @property
    def live(self) -> bool:
        """True for a bar on a terminal."""
        return self.bar is not None

    def due(self) -> bool:
        """True if the text shown is old."""
        return time.monotonic() - self.shown > (QUIET if self.bar is None else LIVELY)

    def advance(self, done: int) -> None:
        """Counts that `done` are done, without a text."""
        self.done = done
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def show(self, text: str) -> None:
        """Shows a text: beside the bar, or as a line that begins with what is done."""
        if self.bar is not None:
            self.label(text)
        else:
            of = "" if self.total is None else f"/{self.total}"
            line = f"{self.unit} {self.done}{of}  {text}"
            self.console.print(line, markup=False, soft_wrap=True)
        self.shown = time.monotonic()

    def label(self, text: str) -> None:
        """Puts a text beside the bar; elsewhere than on a terminal it is not shown."""
        if self.bar is not None:
            # Cut here: rich would shrink the counts and the bar instead.
            room = self.console.width - BAR - len(f"{self.total}/{self.total}") - 3
            self.bar.update(self.task, description=text[:room])

    def estimate(self) -> str:
        """The rate, and how long the rest takes at it."""
        rate = self.rate()
        left = [] if self.total is None or rate <= 0 else [(self.total - self.done) / rate]
        return "  ".join([f"{rate:,.1f}/s", *(f"ETA {format_duration(each)}" for each in left)])

    def rate(self) -> float:
        """Items done per second."""
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
