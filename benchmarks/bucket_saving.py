# SPDX-License-Identifier: Apache-2.0
"""Seconds that saving a step to a bucket keeps training from its next step, beside a disk.

The same state is saved in turns to a disk and to servers on this machine that stand in for S3 and
Google Cloud Storage, each answer of which is delayed as one from another machine is. `save` returns
when the state is copied off the device; `written` is when the checkpoint is complete.

  python benchmarks/bucket_saving.py [--quick] [--delay 0.02] [--json FILE]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "laws"))
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from stores import open_store

from t5x_lite import config
from t5x_lite.checkpoints.checkpoint_io import CheckpointMetadata
from t5x_lite.checkpoints.manager import CheckpointManager
from t5x_lite.checkpoints.step_folders import REMOVER
from t5x_lite.checkpoints.train_state import TrainState

PACKAGES = [
    *("jax", "orbax-checkpoint", "tensorstore"),
    *("gcsfs", "s3fs", "moto", "gcp-storage-emulator"),
]


def make_state(mebibytes: int) -> TrainState:
    """A state of eight weights, each with as many numbers of an optimizer."""
    rows = mebibytes * 2**20 // (4 * 1024 * 16)
    keys = jax.random.split(jax.random.key(0), 16)
    arrays = [jax.random.normal(key, (rows, 1024), jnp.float32) for key in keys]
    params = {f"weight{number}": array for number, array in enumerate(arrays[:8])}
    slots = {f"slot{number}": array for number, array in enumerate(arrays[8:])}
    zero = jnp.int32(0)
    return TrainState(zero, params, slots, skipped=zero, consecutive=zero)


def time_save(manager: CheckpointManager, state: TrainState, step: int) -> tuple[float, float]:
    """Seconds until `save` returns, and until the checkpoint is complete."""
    began = time.perf_counter()
    manager.save(state, CheckpointMetadata(step=step, config=""))
    blocked = time.perf_counter() - began
    manager.wait()
    return blocked, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds of each answer")
    parser.add_argument("--json")
    args = parser.parse_args()
    repeats, size = (2, 8) if args.quick else (5, 32)

    def delay(method: str, path: str) -> str:
        time.sleep(args.delay)
        return ""

    state = jax.block_until_ready(make_state(size))
    with contextlib.ExitStack() as stack:
        places = {"disk": stack.enter_context(tempfile.TemporaryDirectory())}
        for scheme in ("s3", "gs"):
            store = stack.enter_context(open_store(scheme))
            os.environ.update(store.environment())
            store.fails = delay
            places[scheme] = store.address("run")
        saving = config.Checkpoint(keep=2)
        managers = {name: CheckpointManager(place, saving) for name, place in places.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in managers}
        for step in range(1, repeats + 2):
            for name, manager in managers.items():
                times[name].append(time_save(manager, state, step))
        for thread in threading.enumerate():
            # By name: to join the thread of gcp-storage-emulator is to stop its server.
            if thread.name == REMOVER:
                thread.join()
        rows = []
        for name, measured in times.items():
            manager = managers[name]
            manager.close()
            case = f"{size} MiB, answers after {args.delay * 1000:.0f} ms"
            blocked, written = zip(*measured[1:], strict=True)  # the first compiles the digests
            rows.append(report.Row(case, name, "save, s", statistics.median(blocked)))
            rows.append(report.Row(case, name, "written, s", statistics.median(written)))
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
