# SPDX-License-Identifier: Apache-2.0
"""Rehearsals: programs that texts need are compiled in a thread of their own, while rows go on."""

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

import jax

from t5x_lite.serving.lane import Lane
from t5x_lite.serving.prefix_cache import PrefixCache
from t5x_lite.serving.prompt_reading import PromptReading
from t5x_lite.serving.row_text import RowText

# Kinds of texts that are remembered as rehearsed: those of a client that sends ever new settings
# are forgotten, and rehearsed again.
MOST_KINDS = 4096


class Rehearsals:
    """Writes the first block of a text of each kind in rows of its own, which are thrown away.

    jax keeps the programs, so that the engine's thread compiles none. Several devices take part in
    one program at a time: on a mesh of them there are no rehearsals, and programs are compiled
    where they are used.

    Attributes:
      open_lane: returns a lane for a text, with rows of its own.
      on_end: called after each rehearsal.
      mesh: the mesh in force.
      ended: kinds of texts whose rehearsal has ended, the one used last at the end.
      pending: kinds whose rehearsal has not ended.
      waiting: texts that wait for theirs.
    """

    def __init__(
        self,
        open_lane: Callable[[RowText], Lane],
        on_end: Callable[[], None],
        mesh: jax.sharding.Mesh,
    ):
        """Begins without a thread; the first text starts it.

        Args:
          open_lane: see above.
          on_end: see above.
          mesh: see above.
        """
        self.open_lane, self.on_end, self.mesh = open_lane, on_end, mesh
        self.ended: OrderedDict[Hashable, None] = OrderedDict()
        self.pending: set[Hashable] = set()
        self.waiting: deque[RowText] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread: threading.Thread | None = None

    def is_ready(self, text: RowText) -> bool:
        """True if the programs of a text are compiled; if not, they will be."""
        if self.mesh.size > 1:
            return True
        with self.changed:
            if text.kind in self.ended:
                self.ended.move_to_end(text.kind)
                return True
            if text.kind not in self.pending:
                self.pending.add(text.kind)
                self.waiting.append(text)
                self.changed.notify()
            if self.thread is None and not self.closing:
                self.thread = threading.Thread(target=self.run_loop, name="rehearsals", daemon=True)
                self.thread.start()
        return False

    def run_loop(self) -> None:
        """Rehearses until it is closed."""
        with contextlib.nullcontext() if self.mesh.empty else jax.set_mesh(self.mesh):
            while (text := self.take_text()) is not None:
                # What fails here fails in the engine too, which tells the client.
                with contextlib.suppress(Exception):
                    rehearse(self.open_lane(text), text)
                with self.changed:
                    self.ended[text.kind] = None
                    self.pending.discard(text.kind)
                    if len(self.ended) > MOST_KINDS:
                        self.ended.popitem(last=False)
                self.on_end()

    def take_text(self) -> RowText | None:
        """Waits for the next text; None after the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closing)
            return None if self.closing else self.waiting.popleft()

    def close(self) -> None:
        """Ends the thread after the rehearsal that it is at."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join()


def rehearse(lane: Lane, text: RowText) -> None:
    """Reads a text and writes its first block, leaving the text as it is.

    Args:
      lane: a lane without other texts.
      text: the text.
    """
    if text.is_long:
        prefixes = PrefixCache(2**62)
        reading = PromptReading(lane, text, prefixes)
        while not reading.is_done:
            reading.read_next()
            # At every width of the cache, chunks of the prefix cache are put into it too.
            done, whole = reading.done, reading.whole
            if done == whole or (done < whole and not done & (done - 1)):
                reading = PromptReading(lane, text, prefixes)
        lane.texts[0] = text
        reading.finish()
    else:
        lane.join([text])
    lane.write_block()
