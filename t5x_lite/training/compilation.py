# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept between starts of a command."""

from pathlib import Path

import jax

CACHE = "~/.cache/t5x_lite/xla"


def keep_compiled(folder: str = CACHE) -> None:
    """Makes jax keep compiled programs in a folder, so that a second start is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    # The default of one second leaves out most of what the start of a small run compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
