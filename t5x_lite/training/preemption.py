# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C, as a request that a run answers at a good moment."""

import contextlib
import os
import signal

from t5x_lite import processes


class Interrupted(KeyboardInterrupt):
    """End of a run after a signal.

    Attributes:
      number: the signal.
      exit_status: that of its process, as a shell reports it.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.exit_status = number, 128 + number


class PreemptionHandler:
    """Notes the first signal; the second one ends the process at once.

    Inside `anytime` the signal raises Interrupted where it arrives; elsewhere the run reads `due`
    after it has reported each step to `reached`.

    Of several processes all end after the same step, whichever of them got the signal: JAX's
    coordinator chooses one that none of them has done yet.
    """

    def __init__(self):
        self.several = processes.is_multiprocess()
        self.number: int | None = None
        self.due = False
        self.raising = False
        self.before: dict[int, object] = {}

    def __enter__(self):
        # JAX itself notes SIGTERM where there are several processes.
        for number in (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        """Handles a signal."""
        again, self.number = self.number is not None, number
        if self.several and not again:
            signal.raise_signal(signal.SIGTERM)
        elif self.several:
            # Left alone, the others notice that this one is lost.
            os._exit(128 + number)
        elif again or self.raising:
            raise Interrupted(number)

    def reached(self, step: int) -> None:
        """Sets `due` after a step; to be called after every step, with the number of those done."""
        if not self.several:
            self.due = self.number is not None
        elif processes.reached_preemption(step):
            self.number, self.due = self.number or signal.SIGTERM, True

    @contextlib.contextmanager
    def anytime(self):
        """Context of work that may be interrupted anywhere without harm."""
        self.raising = not self.several
        try:
            if self.raising and self.number is not None:
                raise Interrupted(self.number)
            yield
        finally:
            self.raising = False
