# SPDX-License-Identifier: Apache-2.0
"""How far a long command is, on stderr: a live line on a terminal, now and then in a log."""

import sys
import time


class Progress:
    """Counts done things of total (None: nobody knows) from `already` on."""

    def __init__(self, what: str, total: int | None, already: int = 0):
        self.what, self.total, self.already = what, total, already
        self.live = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()
        self.every = 0.2 if self.live else 30.0
        self.width = 0

    def __call__(self, done: int) -> None:
        """Shows that `done` are done, if it is time to."""
        now = time.monotonic()
        if now - self.shown >= self.every:
            self.shown = now
            self.write(self.line(done, now))

    def line(self, done: int, now: float) -> str:
        rate = (done - self.already) / max(now - self.began, 1e-9)
        if self.total is None:
            return f"{done:,} {self.what}, {rate:,.1f}/s"
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        share = done / max(self.total, 1)
        return f"{done:,}/{self.total:,} {self.what} ({share:.0%}), {rate:,.1f}/s, {left} left"

    def write(self, line: str) -> None:
        end = "" if self.live else "\n"
        begin = "\r" if self.live else ""
        print(f"{begin}{line:<{self.width}}", end=end, file=sys.stderr, flush=True)
        self.width = len(line)

    def close(self, done: int) -> None:
        """The last word: how many in how long."""
        took = time.monotonic() - self.began
        rate = (done - self.already) / max(took, 1e-9)
        self.write(f"{done:,} {self.what} in {clock(took)}, {rate:,.1f}/s")
        if self.live:
            print(file=sys.stderr)


def clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
