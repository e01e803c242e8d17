# SPDX-License-Identifier: Apache-2.0
"""Laws of the host's memory."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from t5x_lite.training import host

host.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill = lambda: np.ones(2**24, np.uint8)
fill()
before = faults()
fill()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_was_freed_is_used_again_without_asking_the_system():
    # Fetched anew, 16 MiB are up to 4096 pages.
    assert int(subprocess.check_output([sys.executable, "-c", PROGRAM])) < 8
