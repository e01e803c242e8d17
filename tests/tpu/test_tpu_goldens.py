# SPDX-License-Identifier: Apache-2.0
"""Memory, HBM traffic and size of TPU programs, in a golden file.

Toys of one narrow layer, and two layers of each family at a size's own widths: a scan compiles them
as it does many. T5X_LITE_WRITE_GOLDEN=1 pytest -m "" tests/tpu/test_tpu_goldens.py writes what it
compiles, all of it in half an hour; read the diff.
"""

import itertools
import json
import os
import time
from importlib import metadata
from pathlib import Path

import pytest
from conftest import mark_exhaustive

from t5x_lite.config import gin_file
from t5x_lite.planning import chips, compiled, steps

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

PATH = Path(__file__).parents[1] / "golden" / "tpu_programs.json"
SIZES = {
    "T5": "t5_1_1_base",
    "T5Gemma": "t5gemma_s_s",
    "Llama": "smollm2_135m",
}
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1"}
TOY = ["layers=1", "embed=128", "heads=2", "head_dim=64", "mlp=256"]
STEPS = ("training", "decode")
PROGRAMS = list(itertools.product(("toy", "wide"), SIZES, STEPS, TOPOLOGIES))
# Kernels, scan, loss and optimizer of every family, and its decode step: v6e's differ in sizes.
QUICK = [
    program for program in PROGRAMS if program[0] == "toy" and program[2:] != ("training", "v6e")
]
# What a test fails for. Seconds of compiling are for the reader: they go by the instructions.
TOLERANCE, TOLERATED = 0.01, ("compile seconds of a core",)


def versions() -> dict[str, str]:
    """Versions that decide a program besides this repository."""
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def figures_of(size: str, family: str, step: str, chip: str) -> dict[str, float]:
    """Figures of a compiled program.

    Args:
      size: "toy" or "wide".
      family: key of SIZES.
      step: "training" or "decode".
      chip: key of TOPOLOGIES.
    """
    if size == "toy":
        key_heads = f"kv_heads={2 if family == 'T5' else 1}"
        bindings = [f"config.Stack.{binding}" for binding in (*TOY, key_heads)]
        bindings += ["config.Model.vocab=512", LENGTHS.format(128)]
    else:
        bindings = ["config.Stack.layers=2", "config.Model.vocab=4096", LENGTHS.format(512)]
    bindings += ["config.Mesh.fsdp=1", "BATCH_SIZE=8"]
    files = ["configs/runs/pretrain.gin", f"configs/models/{SIZES[family]}.gin"]
    if family == "Llama":
        bindings += ["config.Model.encoder=None"]
    run = gin_file.load_run(files, bindings)
    decoding = steps.Decoding(8, 128) if step == "decode" else None
    began = time.process_time()
    figures = compiled.figures(run, chips.parse_topology(TOPOLOGIES[chip]), decoding)
    assert figures.unknown_loops == () and figures.moved
    return {
        "peak bytes": figures.memory.peak,
        "HBM bytes": figures.moved,
        "program bytes": figures.memory.kinds["generated code"],
        "instructions": figures.instructions,
        "compile seconds of a core": round(time.process_time() - began, 1),
    }


LENGTHS = 'TASK_FEATURE_LENGTHS={{"inputs": {}, "targets": 128}}'


def changes(name: str, actual: dict[str, float], golden: dict[str, float]) -> list[str]:
    """Sentences of the figures that have changed by more than TOLERANCE, and which way.

    Args:
      name: of the program.
      actual: its figures.
      golden: those of the file.
    """
    sentences = []
    for figure, before in golden.items():
        change = actual[figure] / before - 1
        if figure not in TOLERATED and abs(change) > TOLERANCE:
            way = "grew" if change > 0 else "shrank"
            sentences.append(
                f"{name}: {figure} {way} by {abs(change):.1%}, "
                f"from {before:,} to {actual[figure]:,}"
            )
    return sentences


def check_program(*program: str) -> None:
    """Compares a program with the golden file, or writes it there.

    Args:
      *program: arguments of `figures_of`.
    """
    golden = json.loads(PATH.read_text()) if PATH.exists() else {"programs": {}}
    writes, name = bool(os.environ.get("T5X_LITE_WRITE_GOLDEN")), ", ".join(program)
    if not writes and golden["versions"] != versions():
        pytest.skip(f"the golden programs are those of {golden['versions']}")
    actual = figures_of(*program)
    if writes:
        golden["versions"] = versions()
        golden["programs"] = dict(sorted({**golden["programs"], name: actual}.items()))
        PATH.write_text(json.dumps(golden, indent=1) + "\n")
    assert not changes(name, actual, golden["programs"][name])


@pytest.mark.slow
@pytest.mark.parametrize("size, family, step, chip", mark_exhaustive(PROGRAMS, kept=QUICK))
def test_a_program_is_the_golden_one(size, family, step, chip):
    check_program(size, family, step, chip)


def test_every_program_has_figures():
    names = json.loads(PATH.read_text())["programs"].keys()
    assert names == {", ".join(program) for program in PROGRAMS}


def test_a_change_names_the_program_and_the_way():
    golden = {"peak bytes": 1000, "HBM bytes": 1000, "program bytes": 1000, TOLERATED[0]: 5.0}
    actual = {"peak bytes": 1011, "HBM bytes": 985, "program bytes": 1009, TOLERATED[0]: 50.0}
    assert changes("T5, training, v5e", actual, golden) == [
        "T5, training, v5e: peak bytes grew by 1.1%, from 1,000 to 1,011",
        "T5, training, v5e: HBM bytes shrank by 1.5%, from 1,000 to 985",
    ]
