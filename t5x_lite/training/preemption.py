# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, Ctrl-C and their like, as a request that a run answers at a good moment."""

import contextlib
import os
import select
import signal
import sys
import threading
from typing import Any

from t5x_lite import processes
from t5x_lite.utils.not_none import not_none

# SIGHUP comes when a terminal is closed, SIGUSR1 from schedulers before their time limit; alone
# they would end the process unsaved.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Seconds until a process ends that hangs: after the second signal, after a first one that nothing
# answers (the largest checkpoints take minutes), and where threads hold the end of the process.
AT_ONCE, UNANSWERED, AT_EXIT = 5.0, 3600.0, 30.0


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
    after it has reported each step to `reached`. Python runs handlers between its own
    instructions; where a disk or a device does not come back to those, `SignalWatch` ends the
    process.

    Of several processes all end after the same step, whichever of them got the signal: JAX's
    coordinator chooses one that none of them has done yet.
    """

    def __init__(self):
        self.several = processes.is_multiprocess()
        self.number: int | None = None
        self.due = False
        self.raising = False
        self.before: dict[int, Any] = {}
        self.watch: SignalWatch | None = None

    def __enter__(self):
        self.watch = SignalWatch()
        for number in SIGNALS:
            # JAX itself notes SIGTERM where there are several processes, and nohup ignores SIGHUP.
            noted_by_jax = self.several and number == signal.SIGTERM
            if not noted_by_jax and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        not_none(self.watch).close()

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


class SignalWatch(threading.Thread):
    """Thread that sees every signal that Python handles, also while the main thread hangs.

    It reports the first one, and ends the process AT_ONCE after the second, or UNANSWERED after the
    first.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.before = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        first = self.next_signal(None)
        if first is None:
            return
        name = signal.Signals(first).name
        print(f"{name}: ending; a second signal ends at once.", file=sys.stderr, flush=True)
        again = self.next_signal(UNANSWERED)
        if not self.over.wait(0.0 if again is None else AT_ONCE):
            os._exit(128 + (again or first))

    def next_signal(self, seconds: float | None) -> int | None:
        """The next of SIGNALS; None after `seconds`, or once the watch is closed."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        while poll.poll(None if seconds is None else 1000 * seconds):
            number = os.read(self.reading, 1)[0]
            if self.over.is_set():
                return None
            if number in SIGNALS:
                return number
        return None

    def close(self) -> None:
        """Ends the watch."""
        self.over.set()
        signal.set_wakeup_fd(self.before)
        os.write(self.writing, b"\0")
        self.join()
        os.close(self.reading)
        os.close(self.writing)


def end_process_soon(status: int) -> None:
    """Ends the process AT_EXIT from now, whatever thread still waits for a disk by then."""
    timer = threading.Timer(AT_EXIT, os._exit, [status])
    timer.daemon = True
    timer.start()
