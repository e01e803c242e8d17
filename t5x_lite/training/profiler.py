# SPDX-License-Identifier: Apache-2.0
"""Profile of a few steps (--profile)."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5x_lite.utils.paths import is_address

# Steps of a profile: not the first ones, which still wait for the input pipeline to fill.
PROFILED_STEPS = range(3, 8)


class StepProfiler:
    """Starts and ends JAX's profiler around PROFILED_STEPS."""

    def __init__(self, folder: Any, wanted: bool, report: Callable[[str], None]):
        """Prepares a profile.

        Args:
          folder: folder to write.
          wanted: false to do nothing.
          report: is called with one sentence when the profile is written.
        """
        self.folder, self.wanted, self.report = folder, wanted, report
        self.local = folder
        self.running = False

    def before_step(self, count: int) -> None:
        """Is to be called before each step, with the number of steps of this process so far."""
        if self.wanted and count == PROFILED_STEPS.start:
            if is_address(self.folder):  # JAX writes to a disk
                self.local = Path(tempfile.mkdtemp(prefix="t5x_lite-profile-"))
            jax.profiler.start_trace(str(self.local))
            self.running = True
        if count == PROFILED_STEPS.stop:
            self.close()

    def close(self) -> None:
        """Ends a profile that was started."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            if is_address(self.folder):
                self.folder.upload(self.local)
                shutil.rmtree(self.local)
            self.report(f"profile of up to {len(PROFILED_STEPS)} steps: {self.folder}")
