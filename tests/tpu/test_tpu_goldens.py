# SPDX-License-Identifier: Apache-2.0
"""Memory, HBM traffic and size of TPU programs, in a golden file.

Two layers of each family, at a size's own widths: a scan compiles them as it does many.
T5X_LITE_WRITE_GOLDEN=1 pytest -m "" tests/tpu/test_tpu_goldens.py writes what it compiles; read the
diff.
"""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

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
PROGRAMS = [
    *((family, "decode", chip) for family in SIZES for chip in TOPOLOGIES),
    ("T5", "training", "v5e"),
    ("Llama", "training", "v5e"),
]
# What a test fails for; seconds of compiling are for the reader.
TOLERANCE, TOLERATED = 0.01, ("compile seconds",)


def versions() -> dict[str, str]:
    """Versions that decide a program besides this repository."""
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def figures_of(family: str, step: str, chip: str) -> dict[str, float]:
    """Figures of a compiled program.

    Args:
      family: key of SIZES.
      step: "training" or "decode".
      chip: key of TOPOLOGIES.
    """
    bindings = ["config.Stack.layers=2", "config.Model.vocab=4096", "BATCH_SIZE=8"]
    bindings += ["config.Mesh.fsdp=1", 'TASK_FEATURE_LENGTHS={"inputs": 512, "targets": 128}']
    files = ["configs/runs/pretrain.gin", f"configs/models/{SIZES[family]}.gin"]
    if family == "Llama":
        bindings += ["config.Model.encoder=None"]
    run = gin_file.load_run(files, bindings)
    size = steps.Decoding(8, 128) if step == "decode" else None
    figures = compiled.figures(run, chips.parse_topology(TOPOLOGIES[chip]), size)
    assert figures.unknown_loops == () and figures.moved
    return {
        "peak bytes": figures.memory.peak,
        "HBM bytes": figures.moved,
        "program bytes": figures.memory.kinds["generated code"],
        "compile seconds": round(figures.compile_seconds, 1),
    }


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


def check_program(family: str, step: str, chip: str) -> None:
    """Compares a program with the golden file, or writes it there.

    Args:
      family: key of SIZES.
      step: "training" or "decode".
      chip: key of TOPOLOGIES.
    """
    golden = json.loads(PATH.read_text()) if PATH.exists() else {"programs": {}}
    writes, name = bool(os.environ.get("T5X_LITE_WRITE_GOLDEN")), f"{family}, {step}, {chip}"
    if not writes and golden["versions"] != versions():
        pytest.skip(f"the golden programs are those of {golden['versions']}")
    actual = figures_of(family, step, chip)
    if writes:
        golden["versions"] = versions()
        golden["programs"] = dict(sorted({**golden["programs"], name: actual}.items()))
        PATH.write_text(json.dumps(golden, indent=1) + "\n")
    assert not changes(name, actual, golden["programs"][name])


def test_the_decode_step_of_llama_is_the_golden_one():
    check_program("Llama", "decode", "v5e")


@pytest.mark.slow
@pytest.mark.exhaustive  # A training step compiles for half a minute to two and a half.
@pytest.mark.parametrize("family, step, chip", PROGRAMS)
def test_every_program_is_the_golden_one(family, step, chip):
    check_program(family, step, chip)


def test_a_change_names_the_program_and_the_way():
    golden = {"peak bytes": 1000, "HBM bytes": 1000, "program bytes": 1000, "compile seconds": 5.0}
    actual = {"peak bytes": 1011, "HBM bytes": 985, "program bytes": 1009, "compile seconds": 50.0}
    assert changes("T5, training, v5e", actual, golden) == [
        "T5, training, v5e: peak bytes grew by 1.1%, from 1,000 to 1,011",
        "T5, training, v5e: HBM bytes shrank by 1.5%, from 1,000 to 985",
    ]
