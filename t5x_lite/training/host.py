# SPDX-License-Identifier: Apache-2.0
"""Settings of the host process: allocator, cache of compiled programs, logs."""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Generator, Sequence
from typing import Any, TextIO

import jax

from t5x_lite import processes
from t5x_lite.config import gin_file
from t5x_lite.config.training_run import RunT
from t5x_lite.data import derived
from t5x_lite.training import cpu_dtype
from t5x_lite.utils import exit_status
from t5x_lite.utils.paths import cache_folder

NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
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


def prepare_jax() -> None:
    """Sets jax up for a command: keeps compiled programs in the user's cache, so that a second
    start is quick, and keeps libtpu quiet on a machine without a TPU.

    Call it before jax looks for devices.
    """
    if not processes.has_tpu():
        # libtpu, if it is installed, asks a metadata server for these and prints that it has none.
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    # The default of one second leaves out most of what the start of a small run compiles.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def with_device_dtype(run: RunT, paths: Sequence[str], bindings: Sequence[str]) -> RunT:
    """The run with the Model.dtype of the devices at hand, unless its config binds it.

    That is bfloat16 on accelerators, and the faster one on a CPU. A run that goes on keeps that of
    its MODEL_DIR.

    Args:
      run: as `data.load_run` reads it.
      paths: its .gin files.
      bindings: its bindings of the command line.
    """
    if any(field[1:] == ("Model", "dtype") for field in gin_file.bound_fields(paths, bindings)):
        return run
    saved = derived.saved_model(run)
    if saved is not None:
        return derived.with_model(run, dtype=saved.dtype)
    on_cpu = jax.devices()[0].platform == "cpu"
    return derived.with_model(run, dtype=cpu_dtype.fastest_dtype() if on_cpu else "bfloat16")


def quiet_writer_logs() -> None:
    """Silences logs of orbax's threads in a command: their errors are raised and reported anyway.

    Logs that repeat them are left out, and its other writers' complaints that their loop has ended.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook


class SurvivingStream:
    """Text stream whose reader may go away, and whose disk may fill: what follows is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes a text, unless that is impossible."""
        with self.dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, unless that is impossible."""
        with self.dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def dropping(self) -> Generator[None]:
        """Context whose first error sends all that follows nowhere, also what is in the buffer."""
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def surviving_output() -> Generator[None]:
    """Context in which nobody who reads the output can end the process by going away."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SurvivingStream, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def naming_lack_of_memory() -> contextlib.AbstractContextManager[None]:
    """Context in which a lack of memory is one sentence with the remedies of a run."""
    return exit_status.naming_lack_of_memory(
        lambda reason: (
            f"Out of memory ({reason}). Lower Train.batch_size, raise Train.microbatches, "
            "bind Train.remat = 'full', or split weights and optimizer over devices with "
            "Mesh.fsdp; python -m t5x_lite.plan reports what fits"
        )
    )
