# SPDX-License-Identifier: Apache-2.0
"""A step compiled for TPU chips that need not be there, and what its program tells."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from t5x_lite import config
from t5x_lite.planning import chips, collectives, counted, hlo, steps, trips
from t5x_lite.planning.figures import Figures, Memory

SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
AMOUNT = re.compile(r"([\d.]+)([KMGT])")


def devices(slice_: chips.Slice) -> list:
    """The described devices of a slice.

    Raises:
      ValueError: there is no such slice.
    """
    from jax.experimental import topologies

    # One device for a chip's two cores, as on all others.
    more = {"chip_config_name": "megacore"} if slice_.chip.kind == "TPU v4" else {}
    try:
        with without_complaints():
            described = topologies.get_topology_desc(slice_.name, platform="tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"--topology={slice_.name}: there is no such slice: {reason}") from error
    return list(described.devices)


@contextlib.contextmanager
def without_complaints() -> Iterator[None]:
    """What libtpu writes to file descriptor 2 where it finds no TPU is dropped."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def figures(
    run: config.Run, slice_: chips.Slice, decoding: steps.Decoding | None = None
) -> Figures:
    """The training step of run on a slice, or one turn of decoding, by the compiler's program.

    Where it does not fit, only memory is told.

    Raises:
      ValueError: the mesh does not suit the slice or the model.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    if run.mesh.slices > 1:
        raise ValueError(
            f"--topology={slice_.name} is one slice, but Mesh.slices={run.mesh.slices}: plan "
            "one of them with Mesh.slices = 1, or all by arithmetic with --chips"
        )
    own = devices(slice_)
    step = steps.decode(run, own, decoding) if decoding else steps.training(run, own)
    mesh = jax.sharding.get_mesh()
    where = collectives.wiring(mesh, slice_)
    what = "decode step" if decoding else "training step"
    known = (what, "compiled", slice_, dict(mesh.shape))
    began = time.perf_counter()
    try:
        executable, text = program(step.trace.lower())
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted(step, slice_.chip, str(error))
        seconds = time.perf_counter() - began
        return Figures(*known, memory, step.tokens, step.model_flops, compile_seconds=seconds)
    seconds = time.perf_counter() - began
    module = hlo.parse(text)
    run_of = trips.executions(module)
    work = counted.work(module, run_of)
    return Figures(
        *known,
        held(step, slice_.chip, executable.memory_analysis()),
        step.tokens,
        step.model_flops,
        flops=work.flops,
        moved=work.moved,
        collectives=tuple(collectives.collectives(module, run_of, where)),
        unknown_loops=run_of.unknown,
        compile_seconds=seconds,
    )


def program(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The executable, and the optimized program as the compiler itself writes it down.

    `executable.as_text()` goes through the reader of jaxlib, which refuses some programs of a
    newer libtpu (0.10.2 with 0.0.52: asynchronous instructions of UL2 20B on v5p:2x2x4).

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={"xla_dump_to": folder})
        written = sorted(Path(folder).glob("*.after_optimizations.txt"))
        return executable, written[-1].read_text() if written else executable.as_text()


def held(step: steps.Step, chip: chips.Chip, analysis) -> Memory:
    """The memory of a program that fits."""
    kinds = step.kinds | {
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "generated code": analysis.generated_code_size_in_bytes,
    }
    return Memory(kinds, analysis.peak_memory_in_bytes, chip.memory)


def exhausted(step: steps.Step, chip: chips.Chip, said: str) -> Memory:
    """The memory of a program that the compiler refused as too large.

    Raises:
      jax.errors.JaxRuntimeError: it was refused for another reason.
    """
    if "RESOURCE_EXHAUSTED" not in said or "hbm" not in said.lower():
        raise jax.errors.JaxRuntimeError(said)
    needed, available = amounts(said, chip)
    return Memory(step.kinds, needed, available, max(1, needed - available), said)


def amounts(said: str, chip: chips.Chip) -> tuple[int, int]:
    """Bytes that a program needs and that there are, by the compiler's message."""
    patterns = (
        r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)",
        r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT])",
    )
    for pattern in patterns:
        if found := re.search(pattern, said):
            return tuple(amount(text) for text in found.groups())
    return chip.memory + 1, chip.memory


def amount(text: str) -> int:
    """ "15.75G" in bytes."""
    number, unit = AMOUNT.fullmatch(text).groups()
    return int(float(number) * SIZES[unit])
