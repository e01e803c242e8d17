# SPDX-License-Identifier: Apache-2.0
"""A step compiled for TPU chips that need not be there, and the figures of its program."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from t5x_lite import config
from t5x_lite.planning import chips, collectives, counted, hlo, steps, trips
from t5x_lite.planning.figures import Figures, Memory
from t5x_lite.utils.not_none import not_none

SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
AMOUNT = re.compile(r"([\d.]+)([KMGT])")


def devices(slice_: chips.Slice) -> list:
    """The described devices of a slice.

    Raises:
      ValueError: the slice does not exist.
    """
    from jax.experimental import topologies

    # One device for a chip's two cores, as on all others.
    more = {"chip_config_name": "megacore"} if slice_.chip.kind == "TPU v4" else {}
    try:
        with without_complaints():
            described = topologies.get_topology_desc(slice_.name, platform="tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"--topology={slice_.name} does not exist: {reason}") from error
    return list(described.devices)


@contextlib.contextmanager
def without_complaints() -> Generator[None]:
    """Drops libtpu's complaints on file descriptor 2 that it finds no TPU."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check_slices(run: config.Run, slice_: chips.Slice) -> None:
    """Raises ValueError for a run on several slices: one is compiled."""
    if run.mesh.slices > 1:
        raise ValueError(
            f"--topology={slice_.name} is one slice, but Mesh.slices={run.mesh.slices}: plan "
            "one of them with Mesh.slices = 1, or all by arithmetic with --chips"
        )


def figures(
    run: config.Run, slice_: chips.Slice, decoding: steps.Decoding | None = None
) -> Figures:
    """Figures of a run's training step, or of one step of decoding, by the compiler's program.

    Where it does not fit, only memory is known.

    Args:
      run: config of the run.
      slice_: TPU slice to compile for.
      decoding: rows and lengths of a decode step; None for the training step.

    Raises:
      ValueError: the mesh does not suit the slice or the model.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    check_slices(run, slice_)
    described = devices(slice_)
    step = steps.decode(run, described, decoding) if decoding else steps.training(run, described)
    mesh = jax.sharding.get_mesh()
    where = collectives.mesh_wiring(mesh, slice_)
    known: dict[str, Any] = {
        "what": "decode step" if decoding else "training step",
        "source": "compiled",
        "slice": slice_,
        "mesh": dict(mesh.shape),
        "tokens": step.tokens,
        "model_flops": step.model_flops,
    }
    began = time.perf_counter()
    try:
        executable, text = compile_program(step.trace.lower())
    except jax.errors.JaxRuntimeError as error:
        memory = exceeded_memory(step, slice_.chip, str(error))
        seconds = time.perf_counter() - began
        return Figures(**known, memory=memory, compile_seconds=seconds)
    seconds = time.perf_counter() - began
    module = hlo.parse_module(text)
    runs = trips.executions(module)
    cost = counted.program_cost(module, runs)
    return Figures(
        **known,
        memory=fitting_memory(step, slice_.chip, executable.memory_analysis()),
        flops=cost.flops,
        moved=cost.moved,
        collectives=tuple(collectives.collectives(module, runs, where)),
        unknown_loops=runs.unknown,
        instructions=sum(len(each.instructions) for each in module.computations.values()),
        compile_seconds=seconds,
    )


def compile_program(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The executable, and the optimized program as the compiler itself writes it down.

    `executable.as_text()` goes through the reader of jaxlib, which refuses some programs of a
    newer libtpu (0.10.2 with 0.0.52: asynchronous instructions of UL2 20B on v5p:2x2x4).

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={"xla_dump_to": folder})
        written = sorted(Path(folder).glob("*.after_optimizations.txt"))
        return executable, written[-1].read_text() if written else not_none(executable.as_text())


def fitting_memory(step: steps.Step, chip: chips.Chip, analysis) -> Memory:
    """Memory of a program that fits by itself.

    Args:
      step: the traced step.
      chip: kind of chip.
      analysis: `memory_analysis()` of its executable.
    """
    kinds = step.kinds | {
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "generated code": analysis.generated_code_size_in_bytes,
    }
    peak = analysis.peak_memory_in_bytes + step.resident
    return Memory(kinds, peak, chip.memory, max(0, peak - chip.memory))


def exceeded_memory(step: steps.Step, chip: chips.Chip, message: str) -> Memory:
    """Memory of a program that the compiler refused as too large.

    Args:
      step: the traced step.
      chip: kind of chip.
      message: of the compiler.

    Raises:
      jax.errors.JaxRuntimeError: it was refused for another reason.
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        raise jax.errors.JaxRuntimeError(message)
    needed, available = amounts(message, chip)
    needed += step.resident
    return Memory(step.kinds, needed, available, max(1, needed - available), message)


def amounts(message: str, chip: chips.Chip) -> tuple[int, int]:
    """Bytes that a program needs and bytes of the chip, by the compiler's message."""
    patterns = (
        r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)",
        r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT])",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            return amount(match[1]), amount(match[2])
    return chip.memory + 1, chip.memory


def amount(text: str) -> int:
    """ "15.75G" in bytes."""
    number, unit = not_none(AMOUNT.fullmatch(text)).groups()
    return int(float(number) * SIZES[unit])
