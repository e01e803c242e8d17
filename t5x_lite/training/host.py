# SPDX-License-Identifier: Apache-2.0
"""Settings of the host process: allocator, and cache of compiled programs."""

import ctypes
import os
import sys

import jax

from t5x_lite.utils.paths import cache_folder

# Names and numbers of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Makes the C library keep what is freed for the next step; nothing happens without glibc.

    Call it before jax starts its threads. XLA on CPU allocates new buffers each step; by
    default large ones are pages fetched from the system, which clears them, and given back: 7 % of
    the time of a step of T5 1.1 small.
    """
    if not sys.platform.startswith("linux"):
        return
    option = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    option(MMAP_MAX, 0)
    option(TRIM_THRESHOLD, -1)
    option(ARENA_MAX, 1)  # the arenas of other threads are too small for what is large


def keep_compiled() -> None:
    """Makes jax keep compiled programs in the user's cache, so that a second start is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    # The default of one second leaves out most of what the start of a small run compiles.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
