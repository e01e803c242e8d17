# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk: for every step of a run, its most probable ids at every target.

settings.json            what decides the answers; checked before they are continued or used
00000000/, 00000016/ ..  a chunk of steps, named by its first one: ids.npy [n b t k],
                         log_probabilities.npy [n b t k + 1], rows.npy [n b], a digest of each row

A chunk is written beside its place and renamed, so that one with its name is whole.
"""

import dataclasses
import functools
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Answers, Batch

SETTINGS = "settings.json"
UNFINISHED = ".unfinished"
# What training compares by itself; rows are compared by their digests.
COMPARED = ("teacher", "temperature", "top_k", "batch_size")


def settings(run: config.Run) -> dict[str, Any]:
    """What the answers for a run depend on, as far as its config says."""
    cfg, what = run.distillation, dataclasses.replace(run.data, cache_dir="")
    return {
        "teacher": cfg.teacher,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "batch_size": run.train.batch_size,
        "seed": run.seed,
        "data": zlib.crc32(repr((run.model.layout, what)).encode()),
    }


def digests(batch: Batch) -> np.ndarray:
    """A check sum [b] of what a teacher is to read of each row."""
    parts = (batch.inputs, batch.input_segments, batch.targets, batch.target_segments, batch.prefix)
    there = [np.ascontiguousarray(part) for part in parts if part is not None]
    rows = range(len(batch.targets))
    sums = [zlib.crc32(b"".join(part[row].tobytes() for part in there)) for row in rows]
    return np.array(sums, np.uint32)


class Folder:
    """A folder of answers that is being written."""

    def __init__(self, path: str | Path, told: dict[str, Any]):
        """Begins the folder, or goes on with one that was made with the same settings.

        Raises:
          ValueError: there is something else, or answers that were made otherwise.
        """
        self.path, self.chunk = Path(path), told["chunk"]
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / SETTINGS
        if about.exists():
            compare(read_settings(self.path), told, tuple(told), self.path)
        else:
            config.require(
                not [each for each in self.path.iterdir() if each.name != ".lock"],
                f"{self.path} is not empty and holds no answers: choose another --output",
            )
            written = self.path / f"{SETTINGS}{UNFINISHED}"
            written.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            written.rename(about)
        for left in self.path.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left)

    def done(self) -> int:
        """How many steps from the first one on are there."""
        return whole_steps(self.path)

    def first(self) -> int:
        """The step that the next chunk begins with; a shorter last chunk is written anew."""
        return self.done() // self.chunk * self.chunk

    def write(self, first: int, steps: list[Answers], rows: list[np.ndarray]) -> None:
        """Adds the chunk that begins with step `first`, in place of one that was shorter."""
        place = self.path / f"{first:08d}"
        beside = place.with_name(place.name + UNFINISHED)
        beside.mkdir()
        ids = np.stack([each.ids for each in steps])
        small = ids.max(initial=0) < 2**16
        np.save(beside / "ids.npy", ids.astype(np.uint16) if small else ids)
        logarithms = [
            np.where(each.known[..., None], each.log_probabilities, -np.inf) for each in steps
        ]
        np.save(beside / "log_probabilities.npy", np.stack(logarithms).astype(np.float32))
        np.save(beside / "rows.npy", np.stack(rows))
        if place.exists():
            shorter = place.with_name(f"{place.name}-shorter{UNFINISHED}")
            place.rename(shorter)
            shutil.rmtree(shorter)
        beside.rename(place)


def whole_steps(path: Path) -> int:
    """Steps from the first one on of which the folder has answers."""
    done = 0
    while (rows := path / f"{done:08d}" / "rows.npy").exists():
        done += len(np.load(rows, mmap_mode="r"))
    return done


def read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} holds no answers of a teacher ({SETTINGS}: {error}). Write them with "
            "python -m t5x_lite.distill answers"
        ) from error


def compare(there: dict, here: dict, names: tuple[str, ...], path: Path) -> None:
    """Raises ValueError naming the first setting that differs."""
    for name in names:
        config.require(
            there.get(name) == here.get(name),
            f"The answers in {path} are of {name} {there.get(name)!r}, but here it is "
            f"{here.get(name)!r}. Write others with python -m t5x_lite.distill answers "
            "--output=ANOTHER_FOLDER",
        )


class Answered:
    """The answers to the batches of a run, this host's rows of them.

    Raises:
      ValueError: there are none, they were made otherwise, or are too few for the run.
    """

    def __init__(self, run: config.Run, host: int = 0, hosts: int = 1):
        self.path = Path(run.distillation.answers)
        told = read_settings(self.path)
        compare(told, settings(run), COMPARED, self.path)
        there = whole_steps(self.path)
        config.require(
            there >= run.train.steps,
            f"{self.path} has answers for {there} steps, but Train.steps is {run.train.steps}. "
            "python -m t5x_lite.distill answers goes on with them",
        )
        size = run.train.batch_size // hosts
        self.rows, self.chunk = slice(host * size, (host + 1) * size), told["chunk"]
        self.open = functools.lru_cache(maxsize=2)(self.open_chunk)

    def open_chunk(self, first: int) -> dict[str, np.ndarray]:
        folder = self.path / f"{first:08d}"
        names = ("ids", "log_probabilities", "rows")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}

    def lesson(self, batch: Batch, step: int) -> Answers:
        """What the teacher answered to this batch.

        Raises:
          ValueError: it answered to another one.
        """
        found = self.open(step // self.chunk * self.chunk)
        at = step % self.chunk
        config.require(
            np.array_equal(found["rows"][at, self.rows], digests(batch)),
            f"The answers in {self.path} for step {step} are of other data: they were written with "
            "another Data, Run.seed or Model layout. Write them again with this config",
        )
        logarithms = np.array(found["log_probabilities"][at, self.rows])
        ids = found["ids"][at, self.rows].astype(np.int32)
        return Answers(ids, logarithms, logarithms[..., 0] > -np.inf)
