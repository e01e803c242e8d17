# SPDX-License-Identifier: Apache-2.0
"""Meshes, microbatches and rematerialisation for a slice: pruned by arithmetic, the best compiled.

What was compiled is kept in a file, so a search that was ended goes on where it was.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from t5x_lite import config, config_file
from t5x_lite.planning import arithmetic, report
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.figures import Figures, estimate
from t5x_lite.training import bar, costs

REMATS = ("none", "products", "layers")
MICROBATCHES = (1, 2, 4, 8, 16)
# What by arithmetic needs no more than this much of a chip's memory is worth compiling: arithmetic
# can say too much, by 10 % for T5 1.1 XXL on v5e:16x16.
HOPE = 1.15
# Rows are split into parts of no fewer tokens: below, the batch alone gives chips enough to do.
LEAST_PART = 1024


class Candidate(NamedTuple):
    """One way to run, and what arithmetic says of it."""

    run: config.Run
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
        """What to add to the command line for it."""
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
    """sizes, and the same chips with rows split over some of those of `data`, each part long."""
    found = [sizes | {"context": 1}]
    for context in range(2, sizes["data"] + 1):
        parts = [length / context for length in lengths if length]
        if sizes["data"] % context == 0 and min(parts) >= LEAST_PART:
            found.append(sizes | {"data": sizes["data"] // context, "context": context})
    return found


def candidates(run: config.Run, slice_: Slice) -> list[Candidate]:
    """Every way that may fit by arithmetic, the fastest first."""
    known, found = arithmetic.parts(run), []
    lengths = costs.row_lengths(run.model.layout, run.data.lengths)
    every = [each for sizes in meshes(slice_.count) for each in with_split_rows(sizes, lengths)]
    for sizes in every:
        shards = sizes["data"] * sizes["fsdp"]
        mesh = dataclasses.replace(run.mesh, **sizes)
        for micro in MICROBATCHES:
            if run.train.batch_size % (shards * micro):
                continue
            for remat in REMATS:
                train = dataclasses.replace(run.train, microbatches=micro, remat=remat)
                own = dataclasses.replace(run, mesh=mesh, train=train)
                try:
                    figures = arithmetic.figures(own, slice_, known)
                except ValueError:
                    continue
                if figures.memory.peak <= HOPE * slice_.chip.memory:
                    found.append(Candidate(own, figures))
    # Of equally fast ones that which needs less.
    return sorted(found, key=lambda each: (each.seconds, each.figures.memory.peak))


def search(
    ways: list[Candidate],
    limit: int,
    compile: Callable[[config.Run], Figures],
    kept: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """The first `limit` of ways that fit, compiled, with their figures as `report.record` writes
    them and their candidate's name, by estimated time. The console is told of every one.

    At most three times as many are tried. What is in the file `kept` is not compiled again.
    """
    results, seconds = read(kept), []
    fitting: list[dict[str, Any]] = []
    for way in ways[: 3 * limit]:
        key = identity(way)
        if key not in results:
            console.print(f"compiling {way.name}{remaining(seconds, limit - len(fitting))}")
            began = time.perf_counter()
            results[key] = report.record(compile(way.run))
            seconds.append(time.perf_counter() - began)
            write(kept, results)
        found = results[key] | {"name": way.name, "bindings": way.bindings}
        console.print(f"  {'fits' if found['memory']['fits'] else 'does not fit'}: {way.name}")
        if found["memory"]["fits"]:
            fitting.append(found)
        if len(fitting) == limit:
            break
    return sorted(fitting, key=lambda each: each["estimate"]["scheduled"])


def remaining(seconds: list[float], left: int) -> str:
    """How long the rest takes at least, once a compilation has been timed."""
    if not seconds:
        return " (up to a few minutes each)"
    return f" (about {bar.duration(left * sum(seconds) / len(seconds))} are left)"


def identity(way: Candidate) -> str:
    """What decides the figures of a way: config, slice, and the versions that compile it."""
    versions = [metadata.version(name) for name in ("jax", "libtpu")]
    text = "\n".join([config_file.text(way.run), way.figures.slice.name, *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read(path: Path) -> dict[str, Any]:
    """What was kept, nothing where there is no such file.

    Raises:
      ValueError: the file is not one of these.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of plans ({error}): move it away") from error
    plans = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(plan, dict) and "memory" in plan for plan in plans):
        raise ValueError(f"{path} is not a file of plans: move it away")
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
