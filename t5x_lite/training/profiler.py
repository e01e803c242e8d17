# SPDX-License-Identifier: Apache-2.0
"""Profile of a few steps (--profile)."""

from collections.abc import Callable
from pathlib import Path

import jax

# Steps of a profile: not the first ones, which still wait for the input pipeline to fill.
PROFILED_STEPS = range(3, 8)


class StepProfiler:
    """Starts and ends JAX's profiler around PROFILED_STEPS."""

    def __init__(self, folder: Path, wanted: bool, report: Callable[[str], None]):
        """Prepares a profile.

        Args:
          folder: folder to write.
          wanted: false to do nothing.
          report: is called with one sentence when the profile is written.
        """
        self.folder, self.wanted, self.report = folder, wanted, report
        self.running = False

    def before_step(self, count: int) -> None:
        """Is to be called before each step, with the number of steps of this process so far."""
        if self.wanted and count == PROFILED_STEPS.start:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        if count == PROFILED_STEPS.stop:
            self.close()

    def close(self) -> None:
        """Ends a profile that was started."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            self.report(f"profile of up to {len(PROFILED_STEPS)} steps: {self.folder}")
