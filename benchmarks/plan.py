# SPDX-License-Identifier: Apache-2.0
"""Do the large published models fit TPU slices of 16 to 256 chips, and how fast could they train?

Compiles the training step (Adafactor, bfloat16 activations, rows of 512 + 128 tokens) for every
case, as `python -m t5x_lite.plan` does, and keeps the figures of its program: memory, FLOPs, bytes
and collectives of each chip, roofline times, seconds of compilation. T5 1.1 XL on slices of three
sizes, with weights split over 4 chips in each, shows weak scaling: what a chip computes and moves
should not depend on how many there are. Where weights are split over all chips, it moves less.

  python benchmarks/plan.py [--cases t5_1_1_xxl:v5e:16x16:fsdp:4 ...] [--json FILE]

A case is model:topology:mesh:rows of each chip; mesh fsdp splits weights over all chips, fsdpN over
N of them. What stands in the file is not compiled again. Needs libtpu (the extra `plan`).
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

from t5x_lite.planning import preparing

# Read when jax is imported: a slice is described, none is looked for.
os.environ.update(preparing.ENVIRONMENT)

import report

from t5x_lite import config
from t5x_lite.config import gin_file
from t5x_lite.planning import chips, compiled
from t5x_lite.planning import report as plans

PACKAGES = ["jax", "jaxlib", "libtpu", "flax", "optax"]
RESULTS = Path(__file__).parent / "results/plan.json"
LENGTHS = {"inputs": 512, "targets": 128}
CASES = """
t5_1_1_xxl:v5e:16x16:fsdp:4
t5_1_1_xxl:v5e:16x16:fsdp16:4
t5_1_1_xxl:v5e:4x4:fsdp:4
t5_1_1_xl:v5e:4x4:fsdp4:4
t5_1_1_xl:v5e:8x8:fsdp4:4
t5_1_1_xl:v5e:16x16:fsdp4:4
t5_1_1_xxl:v5e:4x8:fsdp:4
ul2_20b:v5p:2x2x4:fsdp:8
t5gemma_9b_2b:v6e:4x4:fsdp:4
t5gemma_9b_9b:v6e:8x8:fsdp:4
t5_1_1_xxl:v5e:8x8:fsdp:4
ul2_20b:v5p:4x4x4:fsdp:8
t5gemma_9b_2b:v6e:16x16:fsdp:4
t5gemma_9b_9b:v6e:16x16:fsdp:4
ul2_20b:v5p:4x8x8:fsdp:8
t5_1_1_xxl:v6e:4x4:fsdp:4
t5_1_1_xxl:v5p:2x2x4:fsdp:8
t5gemma_9b_9b:v5p:4x4x4:fsdp:8
t5gemma_9b_2b:v5e:8x8:fsdp:2
ul2_20b:v6e:8x8:fsdp:4
ul2_20b:v5e:16x16:fsdp:2
t5gemma_9b_2b:v5p:2x2x4:fsdp:8
t5gemma_9b_9b:v5e:16x16:fsdp:2
""".split()


def run_of(case: str) -> tuple[config.Run, chips.Slice]:
    """The run and the slice of a case.

    Raises:
      ValueError: the case is not written as it should be.
    """
    found = re.fullmatch(r"(\w+):(\w+:[\dx]+):fsdp(\d*):(\d+)", case)
    if not found:
        raise ValueError(f"{case} is not model:topology:fsdp[N]:rows")
    model, topology, fsdp, rows = found.groups()
    slice_ = chips.parse_topology(topology)
    over = int(fsdp or slice_.count)
    bindings = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused", "TRAIN_STEPS=100000"]
    bindings += [f"BATCH_SIZE={int(rows) * slice_.count}", f"TASK_FEATURE_LENGTHS={LENGTHS}"]
    bindings += ['config.Schedule.kind="constant"', "config.Schedule.peak=0.001"]
    bindings += [f"config.Mesh.data={slice_.count // over}", f"config.Mesh.fsdp={over}"]
    files = ["runs/common.gin", f"models/{model}.gin"]
    return gin_file.load_run(files, bindings), slice_


def measured(case: str) -> dict:
    """The record of a case, with the processor seconds that its compilation took."""
    run, slice_ = run_of(case)
    began, load = time.process_time(), os.getloadavg()[0]
    found = plans.record(compiled.figures(run, slice_))
    found["processor_seconds"] = round(time.process_time() - began, 1)
    return {"case": case, "load": round(load, 1)} | found


def line(row: dict) -> str:
    """One case in a line of text."""
    memory = f"{row['memory']['peak'] / 2**30:6.2f} of {row['memory']['available'] / 2**30:.2f} GiB"
    seconds = (
        f"compiled in {row['compile_seconds']:.0f} s ({row['processor_seconds']:.0f} s of CPU)"
    )
    if not row["memory"]["fits"]:
        return f"{row['case']:34} {memory}: does not fit, {seconds}"
    known = row["estimate"]
    return (
        f"{row['case']:34} {memory} {row['flops'] / 1e12:8.1f} TFLOP {row['moved'] / 1e9:7.1f} GB "
        f"{1e3 * known['scheduled']:8.1f} ms {known['tokens_per_second']:10,.0f} tokens/s "
        f"MFU {100 * known['mfu']:.0f} to {100 * known['mfu_bound']:.0f} %, {seconds}"
    )


def write(path: Path, rows: list[dict]) -> None:
    """Writes machine, versions and rows, replacing the file in one move."""
    kept = {"command": "python benchmarks/plan.py", "machine": report.machine()}
    kept |= {"versions": report.versions(PACKAGES), "rows": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    for case in options.cases:
        known = [row for row in rows if row["case"] == case]
        if not known:
            known = [measured(case)]
            rows += known
            write(options.json, rows)
        print(line(known[0]), flush=True)


if __name__ == "__main__":
    main()
