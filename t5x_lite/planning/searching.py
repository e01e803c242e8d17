# SPDX-License-Identifier: Apache-2.0
"""Meshes, microbatches and rematerialization for a slice: pruned by arithmetic, the best compiled.

Compiled figures are kept in a file, so an interrupted search continues where it was.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from t5x_lite.cli.progress import format_duration
from t5x_lite.config import gin_file
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.planning import arithmetic, report
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.figures import Figures, estimate
from t5x_lite.training import flops
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically

REMATS = ("none", "minimal", "full")
MICROBATCHES = (1, 2, 4, 8, 16)
# A candidate that by arithmetic needs no more than this much of a chip's memory is worth compiling:
# arithmetic can overestimate, by 10 % for T5 1.1 XXL on v5e:16x16.
HOPE = 1.15
# Rows are split into parts of no fewer tokens: below, the batch alone gives chips enough to do.
LEAST_PART = 1024


class Candidate(NamedTuple):
    """One config of a run, and its figures by arithmetic."""

    run: TrainingRun
    figures: Figures

    @property
    def seconds(self) -> float:
        return estimate(self.figures).scheduled

    @property
    def name(self) -> str:
        mesh = self.figures.mesh
        sizes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
        train = self.run.train
        return f"{sizes} microbatches={train.microbatches} remat={train.remat}"

    @property
    def bindings(self) -> str:
        """Options of the command line that select it."""
        sizes = {"context": 1} | self.figures.mesh
        mesh = " ".join(f"--gin.config.Mesh.{axis}={size}" for axis, size in sizes.items())
        train = self.run.train
        return (
            f"{mesh} --gin.config.Train.microbatches={train.microbatches} "
            f"--gin.config.Train.remat={train.remat}"
        )


def meshes(count: int) -> list[dict[str, int]]:
    """Every way to write the number of chips as data x fsdp x tensor."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    return [
        {"data": count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
        for fsdp in divisors
        for tensor in divisors
        if count % (fsdp * tensor) == 0
    ]


def with_split_rows(sizes: dict[str, int], lengths: Iterable[int]) -> list[dict[str, int]]:
    """Mesh sizes, and those that split rows over some of the chips of `data`, in parts of at least
    LEAST_PART tokens."""
    result = [sizes | {"context": 1}]
    for context in range(2, sizes["data"] + 1):
        parts = [length / context for length in lengths if length]
        if sizes["data"] % context == 0 and min(parts) >= LEAST_PART:
            result.append(sizes | {"data": sizes["data"] // context, "context": context})
    return result


def candidates(run: TrainingRun, slice_: Slice) -> list[Candidate]:
    """Every candidate that may fit by arithmetic, the fastest first."""
    shapes, result = arithmetic.step_shapes(run), []
    lengths = flops.row_lengths(run.model.batch_layout, run.data.lengths)
    every = [each for sizes in meshes(slice_.count) for each in with_split_rows(sizes, lengths)]
    for sizes in every:
        shards = sizes["data"] * sizes["fsdp"]
        mesh = dataclasses.replace(run.mesh, **sizes)
        for micro in MICROBATCHES:
            if run.train.batch_size % (shards * micro):
                continue
            for remat in REMATS:
                train = dataclasses.replace(run.train, microbatches=micro, remat=remat)
                changed = dataclasses.replace(run, mesh=mesh, train=train)
                try:
                    figures = arithmetic.figures(changed, slice_, shapes)
                except ValueError:
                    continue
                if figures.memory.peak <= HOPE * slice_.chip.memory:
                    result.append(Candidate(changed, figures))
    # Of equally fast ones, the one that needs less memory comes first.
    return sorted(result, key=lambda each: (each.seconds, each.figures.memory.peak))


def search(
    ways: list[Candidate],
    limit: int,
    compile: Callable[[TrainingRun], Figures],
    kept: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Compiles candidates until `limit` of them fit; at most three times as many are tried.

    Args:
      ways: candidates, the most promising first.
      limit: number of fitting candidates to find.
      compile: figures of a run by the compiler.
      kept: file of earlier results, which are not compiled again; new ones are added.
      console: receives a line about each candidate.

    Returns:
      The figures of those that fit, as `report.record` writes them, with the candidate's name and
      bindings, by estimated time.
    """
    results, seconds = read_results(kept), []
    fitting: list[dict[str, Any]] = []
    for way in ways[: 3 * limit]:
        key = identity(way)
        if key not in results:
            console.print(f"compiling {way.name}{remaining(seconds, limit - len(fitting))}")
            began = time.perf_counter()
            results[key] = report.record(compile(way.run))
            seconds.append(time.perf_counter() - began)
            write_results(kept, results)
        result = results[key] | {"name": way.name, "bindings": way.bindings}
        console.print(f"  {'fits' if result['memory']['fits'] else 'does not fit'}: {way.name}")
        if result["memory"]["fits"]:
            fitting.append(result)
        if len(fitting) == limit:
            break
    return sorted(fitting, key=lambda each: each["estimate"]["scheduled"])


def remaining(seconds: list[float], left: int) -> str:
    """Text of the least time that the rest takes, once a compilation has been timed."""
    if not seconds:
        return " (up to a few minutes each)"
    return f" (about {format_duration(left * sum(seconds) / len(seconds))} are left)"


def identity(way: Candidate) -> str:
    """Digest of all that determines a candidate's figures: config, slice, compiler versions."""
    versions = [metadata.version(name) for name in ("jax", "libtpu")]
    text = "\n".join([gin_file.to_text(way.run), way.figures.slice.name, *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_results(path: Path) -> dict[str, Any]:
    """Reads the results of earlier searches; {} where the file does not exist.

    Raises:
      ValueError: the file is not one of these.
    """
    try:
        results = bounded_files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of plans ({error}): move it away") from error
    plans = results.values() if isinstance(results, dict) else [None]
    if not all(isinstance(plan, dict) and "memory" in plan for plan in plans):
        raise ValueError(f"{path} is not a file of plans: move it away")
    return results


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes the results, and the folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")
