# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C, as a request that a run answers at a good moment."""

import contextlib
import signal


class Interrupted(KeyboardInterrupt):
    """The run was asked to end; `number` is the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Notes the first signal; the second one ends the process at once.

    Inside `anytime` the signal raises Interrupted where it arrives; elsewhere the run asks `due`.
    """

    def __init__(self):
        self.number: int | None = None
        self.raising = False
        self.before: dict[int, object] = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        again, self.number = self.number is not None, number
        if again or self.raising:
            raise Interrupted(number)

    @property
    def due(self) -> bool:
        return self.number is not None

    @contextlib.contextmanager
    def anytime(self):
        """Work that may be broken off anywhere without harm."""
        self.raising = True
        try:
            if self.due:
                raise Interrupted(self.number)
            yield
        finally:
            self.raising = False
