# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, and a compilation cache that outlives the run."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
