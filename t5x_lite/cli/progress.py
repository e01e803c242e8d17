# SPDX-License-Identifier: Apache-2.0
"""Progress of work that takes long, on stderr: a live bar on a terminal, else a line at times."""

import collections
import contextlib
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Characters of the bar itself.
BAR = 16
# Seconds between lines where nobody watches a terminal, and where somebody does (and before the
# first line in both cases).
QUIET, LIVELY = 20.0, 2.0
# Seconds that a rate is measured over, and between the marks that it is measured from.
RECENT, MARK = 10.0, 0.2


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


@contextlib.contextmanager
def waiting(console: "Console", text: str) -> Generator[None]:
    """Context of work that takes long: shows what is waited for while it is waited for."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} ...", markup=False, soft_wrap=True)
        yield


class RecentRate:
    """Items per second over the last RECENT seconds: a slow start counts no longer."""

    def __init__(self):
        self.marks: collections.deque[tuple[float, int]] = collections.deque()

    def add(self, done: int) -> None:
        """Marks that `done` are done now."""
        now = time.monotonic()
        if len(self.marks) > 1 and now - self.marks[-2][0] < MARK:
            self.marks.pop()
        self.marks.append((now, done))
        while len(self.marks) > 2 and self.marks[1][0] <= now - RECENT:
            self.marks.popleft()

    def skip(self, seconds: float) -> None:
        """Leaves out seconds in which nothing was to be done."""
        self.marks = collections.deque((moment + seconds, done) for moment, done in self.marks)

    def rate(self) -> float | None:
        """Items per second; None before the second mark."""
        if len(self.marks) < 2:
            return None
        (begin, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - begin) if end > begin and after > before else None


class Progress:
    """Counts what is done, shows it at times, and sums it up at the end.

    As a context manager it ends with a line of how many were done in how long; after an error it
    only takes the bar away.

    Attributes:
      unit: what is counted: "lines".
      total: how many there are; None if unknown.
      done: how many are done.
      recent: the rate of the last seconds.
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
        self.began = time.monotonic()
        self.shown = self.began + LIVELY - self.interval()
        self.recent = RecentRate()
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
        return time.monotonic() - self.shown > self.interval()

    def interval(self) -> float:
        """Seconds between texts."""
        return LIVELY if self.console.is_terminal else QUIET

    def advance(self, done: int) -> None:
        """Counts that `done` are done, without a text."""
        self.done = done
        self.recent.add(done)
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
        """The rate of the last seconds, and how long the rest takes at it."""
        rate, left = self.recent.rate() or self.rate(), self.seconds_left()
        eta = [] if left is None else [f"ETA {format_duration(left)}"]
        return "  ".join([f"{rate:,.1f}/s", *eta])

    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate of the last seconds; None if that is unknown."""
        rate = self.recent.rate()
        return None if self.total is None or rate is None else (self.total - self.done) / rate

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Context whose time does not count in the rate of the last seconds."""
        paused = time.monotonic()
        try:
            yield
        finally:
            self.recent.skip(time.monotonic() - paused)

    def rate(self) -> float:
        """Items done per second since the beginning."""
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
