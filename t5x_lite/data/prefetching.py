# SPDX-License-Identifier: Apache-2.0
"""Batches prepared ahead of the step that reads them."""

import queue
import threading
import time
from collections.abc import Iterator

from t5x_lite.batch import Batch

AHEAD = 4
# Seconds between looks at the thread while a batch is waited for.
LOOK = 1.0


class Prefetch(Iterator[tuple[int, Batch]]):
    """Iterator of (step, batch) from a thread that stays some batches ahead.

    `waited` is the number of seconds that the reader has waited for batches. An error in the thread
    is raised where the batch is read. `close` ends the thread; the end of the loop does too.
    """

    def __init__(self, batches, start: int, stop: int):
        self.waited = 0.0
        self.ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.fill, args=(batches, start, stop), daemon=True)
        self.thread.start()

    def fill(self, batches, start: int, stop: int) -> None:
        """Puts batches in the queue; runs in the thread.

        Args:
          batches: source of the batches, by `at(step)`.
          start: first step.
          stop: step after the last one.
        """
        try:
            for step in range(start, stop):
                if not self.put((step, batches.at(step))):
                    return
            self.put(None)
        except BaseException as error:  # handed to the reader, who raises it
            self.put(error)

    def put(self, item) -> bool:
        """Puts an item in the queue; returns False once the reader is gone."""
        while not self.closed.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> tuple[int, Batch]:
        if self.closed.is_set():
            raise StopIteration
        begin = time.perf_counter()
        try:
            item = self.next_item()
        finally:
            self.waited += time.perf_counter() - begin
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def next_item(self):
        """Waits for the thread's next item.

        Raises RuntimeError if the thread ended without one, as for lack of memory.
        """
        while True:
            alive = self.thread.is_alive()
            try:
                return self.ready.get(timeout=LOOK)
            except queue.Empty:
                if not alive:
                    self.close()
                    raise RuntimeError("The thread that reads batches ended unexpectedly") from None

    def close(self) -> None:
        self.closed.set()
        self.thread.join(timeout=5.0)


def prefetch(batches, start: int, stop: int) -> Prefetch:
    """Iterates over (step, batches.at(step)), prepared ahead in a thread.

    Args:
      batches: source of the batches, by `at(step)`.
      start: first step.
      stop: step after the last one.
    """
    return Prefetch(batches, start, stop)
