# SPDX-License-Identifier: Apache-2.0
"""Seconds that `interactive.load` takes by name, beside the same folder of this machine.

The model is tiny: what its name costs is measured, not the reading of weights. It is in the cache
of the hub, a server on this machine whose answers are delayed as those of another machine are.
Each load is timed in a new process, imports included, in turns; `offline` is with HF_HUB_OFFLINE.
Seconds of processors do not depend on what else the machine does, and leave out waiting.

  python benchmarks/by_name.py [--quick] [--delay 0.1] [--json FILE]
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "laws"))
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hub_server import Handler, HubServer
from hub_toys import read_contents, write_folders

PACKAGES = ["jax", "huggingface_hub"]
NAME = "owner/toy"
LOAD = """
import sys, time
from t5x_lite import interactive
began = time.perf_counter(), time.process_time()
interactive.load(sys.argv[1])
print(time.perf_counter() - began[0], time.process_time() - began[1])
"""


def time_load(source: str, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of one load in a process of its own, and seconds of processors."""
    command = [sys.executable, "-c", LOAD, source]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, processors = map(float, done.stdout.split())
    return seconds, processors


@contextlib.contextmanager
def delayed_answers(seconds: float):
    """Context in which the hub waits before each answer."""
    find_answer = Handler.find_answer

    def wait(handler: Handler):
        time.sleep(seconds)
        return find_answer(handler)

    Handler.find_answer = wait
    try:
        yield
    finally:
        Handler.find_answer = find_answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds of each answer")
    parser.add_argument("--json")
    args = parser.parse_args()
    repeats = 2 if args.quick else 5
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub, delayed_answers(args.delay):
        path = Path(folder)
        local = write_folders(path) / "hf"
        hub.add(NAME, read_contents(local))
        here = {"HF_HOME": str(path / "cache")}
        online = hub.environment(path / "cache")
        systems = {
            "folder": (str(local), here),
            "by name": (NAME, online),
            "by name, offline": (NAME, online | {"HF_HUB_OFFLINE": "1"}),
        }
        time_load(NAME, online)  # into the cache
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for _ in range(repeats):
            for name, (source, environment) in systems.items():
                times[name].append(time_load(source, environment))
    case = f"a tiny T5, answers after {args.delay * 1000:.0f} ms"
    rows = []
    for part, what in enumerate(("seconds", "seconds of processors")):
        values = {name: [each[part] for each in measured] for name, measured in times.items()}
        for name, measured in values.items():
            rows.append(report.Row(case, name, what, statistics.median(measured)))
            pairs = zip(measured, values["folder"], strict=True)
            added = statistics.median(each - of_folder for each, of_folder in pairs)
            rows.append(report.Row(case, name, f"{what} more than the folder", added))
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
