# SPDX-License-Identifier: Apache-2.0
"""ServerLimits of a server: length, queue, time, connections."""

from dataclasses import dataclass
from typing import Annotated

from t5x_lite.config.checked import Checked, Count, CountOrZero, Few, Length, Range, require

Seconds = Annotated[float, Range(0, 10**6, open="least")]


@dataclass(frozen=True)
class ServerLimits(Checked):
    """ServerLimits of a server.

    Attributes:
      rows: texts that a model writes at the same time.
      max_input_tokens: most tokens of an input.
      max_new_tokens: most new tokens of a text.
      texts: most texts of a request: its inputs times n.
      prefix_cache: MiB of each model's prefix cache; 0 for none.
      queue: texts that may wait for a row of their model; more get status 429.
      connections: most connections at a time; others get status 503.
      body_bytes: most bytes of a request's body; longer ones get status 413.
      body_seconds: time for a body to arrive; slower ones get status 408.
      timeout: seconds from a request's arrival to its last token; later ones get status 504.
      drain: seconds that running requests have to end after SIGTERM.
    """

    rows: Few = 16
    max_input_tokens: Length = 1024
    max_new_tokens: Length = 256
    texts: Few = 128
    prefix_cache: CountOrZero = 256
    queue: Count = 256
    connections: Count = 512
    body_bytes: Count = 2**20
    body_seconds: Seconds = 10.0
    timeout: Seconds = 120.0
    drain: Seconds = 60.0

    def check(self):
        require(
            self.texts <= self.queue,
            f"--texts {self.texts} is more than --queue {self.queue} has place for",
        )
