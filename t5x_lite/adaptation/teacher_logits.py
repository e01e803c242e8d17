# SPDX-License-Identifier: Apache-2.0
"""A teacher's top-k logits on disk: its most probable ids at every target of every step.

settings.json            settings of the logits; checked before they are continued or used
00000000/, 00000016/ ..  a chunk of steps, named by its first one: ids.npy [n b t k],
                         log_probabilities.npy [n b t k + 1], rows.npy [n b], a digest of each row;
                         digests.json, digests of these files

A chunk is written under another name, brought to the disk and renamed, so that a chunk with its
name is complete. Its digests are checked when it is read.
"""

import dataclasses
import functools
import json
import logging
import shutil
import tokenize
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch, TeacherLogits
from t5x_lite.config import aliases
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.data import content
from t5x_lite.data.cache import MALFORMED
from t5x_lite.utils.atomic_files import sync_folder, write_atomically
from t5x_lite.utils.paths import local_path

log = logging.getLogger(__name__)

SETTINGS = "settings.json"
UNFINISHED = ".unfinished"
DIGESTS = "digests.json"
ARRAYS = ("ids", "log_probabilities", "rows")
# Settings that training checks by name; rows are compared by their digests.
COMPARED = ("teacher", "temperature", "top_k", "batch_size")


def logits_settings(run: TrainingRun) -> dict[str, Any]:
    """Settings of the run's config that its saved logits depend on."""
    cfg, data = run.distillation, dataclasses.replace(run.data, cache_dir="")
    assert cfg is not None
    # The checksum keeps the layout's former name: folders of earlier versions stay valid.
    layout = next(old for old, new in aliases.LAYOUTS.items() if new == run.model.layout)
    return {
        "teacher": cfg.teacher,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "batch_size": run.train.batch_size,
        "seed": run.seed,
        "data": zlib.crc32(repr((layout, data)).encode()),
    }


def row_digests(batch: Batch) -> np.ndarray:
    """Checksums [b] of the rows that the teacher reads."""
    parts = (batch.inputs, batch.input_segments, batch.targets, batch.target_segments, batch.prefix)
    present = [np.ascontiguousarray(part) for part in parts if part is not None]
    rows = range(len(batch.targets))
    sums = [zlib.crc32(b"".join(part[row].tobytes() for part in present)) for row in rows]
    return np.array(sums, np.uint32)


class TeacherLogitsWriter:
    """Writer of a folder of saved logits; it continues an unfinished folder."""

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        """Creates the folder, or continues one with the same settings.

        Args:
          path: the folder.
          settings: `logits_settings` and the steps of a chunk ("chunk").

        Raises:
          ValueError: the folder has other content, or logits with other settings.
        """
        self.path, self.chunk = local_path(path), settings["chunk"]
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / SETTINGS
        if about.exists():
            check_equal_settings(read_settings(self.path), settings, tuple(settings), self.path)
        else:
            config.require(
                not [each for each in self.path.iterdir() if not each.name.startswith(".")],
                f"{self.path} is not empty and holds no answers: choose another --output",
            )
            write_atomically(about, json.dumps(settings, indent=1) + "\n")
        for left in self.path.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left)
        for place in sorted(self.path.glob("[0-9]*")):
            try:
                check_chunk(place)
            except ValueError as error:
                log.warning("%s: it is written again", error)
                shutil.rmtree(place)

    def done(self) -> int:
        """Number of complete steps, counted from the first."""
        return count_steps(self.path)

    def missing(self, steps: int) -> list[int]:
        """First steps of the chunks that lack some of the first `steps` steps."""
        return [
            first
            for first in range(0, steps, self.chunk)
            if chunk_steps(self.path / f"{first:08d}") < min(self.chunk, steps - first)
        ]

    def write(self, first: int, steps: list[TeacherLogits], rows: list[np.ndarray]) -> None:
        """Writes a chunk, in place of a shorter one of the same first step.

        Args:
          first: first step of the chunk.
          steps: logits of each step.
          rows: `row_digests` of each step.
        """
        place = self.path / f"{first:08d}"
        partial = place.with_name(place.name + UNFINISHED)
        partial.mkdir()
        ids = np.stack([each.ids for each in steps])
        small = ids.max(initial=0) < 2**16
        np.save(partial / "ids.npy", ids.astype(np.uint16) if small else ids)
        logarithms = [
            np.where(each.known[..., None], each.log_probabilities, -np.inf) for each in steps
        ]
        np.save(partial / "log_probabilities.npy", np.stack(logarithms).astype(np.float32))
        np.save(partial / "rows.npy", np.stack(rows))
        digests = content.digest_files(sorted(partial.iterdir()))
        named = {Path(path).name: digest for path, digest in digests.items()}
        (partial / DIGESTS).write_text(json.dumps(named, indent=1) + "\n")
        sync_folder(partial)
        if place.exists():
            shorter = place.with_name(f"{place.name}-shorter{UNFINISHED}")
            place.rename(shorter)
            shutil.rmtree(shorter)
        partial.rename(place)


def count_steps(path: Path) -> int:
    """Number of steps of a folder, counted from the first without a gap."""
    done = 0
    while steps := chunk_steps(path / f"{done:08d}"):
        done += steps
    return done


def chunk_steps(place: Path) -> int:
    """Number of steps of a chunk; 0 where there is none that can be read."""
    try:
        return len(np.load(place / "rows.npy", mmap_mode="r"))
    except (OSError, ValueError, TypeError, EOFError, tokenize.TokenError):
        return 0


def check_chunk(place: Path) -> None:
    """Checks the files of a chunk by their digests, once for each state of a file.

    Chunks of earlier versions have no digests and are not checked.

    Raises:
      ValueError: a file is missing or has changed.
    """
    if not (place / DIGESTS).exists():
        return
    try:
        expected = json.loads((place / DIGESTS).read_text())
        paths = [place / f"{name}.npy" for name in ARRAYS]
        digests = content.digest_files(paths, place.parent)
        changed = [path.name for path in paths if digests[str(path)] != expected[path.name]]
    except (FileNotFoundError, *MALFORMED) as error:
        raise ValueError(f"{place} is damaged ({type(error).__name__}: {error})") from error
    if changed:
        raise ValueError(f"{place} is damaged ({', '.join(changed)} changed)")


def read_chunk(place: Path) -> dict[str, np.ndarray]:
    """Maps the arrays of a chunk into memory, by name.

    Raises:
      ValueError: a file has changed, or they are not arrays of the same steps.
    """
    check_chunk(place)
    try:
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error})") from error
    ids, logarithms, rows = (arrays[name] for name in ARRAYS)
    fits = ids.ndim == 4 and rows.shape == ids.shape[:2]
    fits = fits and logarithms.shape == (*ids.shape[:3], ids.shape[3] + 1)
    kinds = "".join(each.dtype.kind for each in (ids, logarithms, rows))
    if not fits or kinds not in ("ufu", "ifu"):
        raise ValueError(f"{place} is damaged (its arrays are not of the same steps)")
    return arrays


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a folder; raises ValueError if it has none."""
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        if type(settings["chunk"]) is not int or settings["chunk"] < 1:
            raise ValueError(f"chunk is {settings['chunk']!r:.80}")
        return settings
    except (OSError, *MALFORMED) as error:
        raise ValueError(
            f"{path} holds no answers of a teacher ({SETTINGS}: {error}). Write them with "
            "python -m t5x_lite.distill answers"
        ) from error


def check_equal_settings(saved: dict, current: dict, names: tuple[str, ...], path: Path) -> None:
    """Raises ValueError with the first setting that differs.

    Args:
      saved: settings of the folder.
      current: settings of the run.
      names: settings to compare.
      path: the folder, for the message.
    """
    for name in names:
        config.require(
            saved.get(name) == current.get(name),
            f"The answers in {path} are of {name} {saved.get(name)!r}, but here it is "
            f"{current.get(name)!r}. Write others with python -m t5x_lite.distill answers "
            "--output=ANOTHER_FOLDER",
        )


class SavedTeacherLogits:
    """Saved logits for the batches of a run, this host's rows of them.

    Raises:
      ValueError: the folder has none, has other settings, or has fewer steps than the run.
    """

    def __init__(self, run: TrainingRun, host: int = 0, hosts: int = 1):
        assert run.distillation is not None and run.distillation.answers is not None
        self.path = local_path(run.distillation.answers)
        settings = read_settings(self.path)
        check_equal_settings(settings, logits_settings(run), COMPARED, self.path)
        steps = count_steps(self.path)
        config.require(
            steps >= run.train.steps,
            f"{self.path} has answers for {steps} steps, but Train.steps is {run.train.steps}. "
            "python -m t5x_lite.distill answers goes on with them",
        )
        size, self.vocab = run.train.batch_size // hosts, run.model.vocab
        self.rows, self.chunk = slice(host * size, (host + 1) * size), settings["chunk"]
        self.open = functools.lru_cache(maxsize=2)(self.open_chunk)

    def open_chunk(self, first: int) -> dict[str, np.ndarray]:
        """Maps the arrays of a chunk into memory, by name.

        Raises:
          ValueError: they are damaged, or have ids that the model lacks.
        """
        place = self.path / f"{first:08d}"
        try:
            arrays = read_chunk(place)
        except ValueError as error:
            raise ValueError(
                f"{error}. Write its answers again: python -m t5x_lite.distill answers "
                f"--output={self.path}"
            ) from error
        largest = int(arrays["ids"].max(initial=0))
        config.require(
            0 <= int(arrays["ids"].min(initial=0)) <= largest < self.vocab,
            f"The answers in {place} have id {largest}, but Model.vocab is {self.vocab}: they are "
            "of a teacher with another vocabulary",
        )
        return arrays

    def teacher_data(self, batch: Batch, step: int) -> TeacherLogits:
        """Reads the teacher's logits for a batch.

        Raises:
          ValueError: they are missing, or were saved for other rows.
        """
        chunk = self.open(step // self.chunk * self.chunk)
        at = step % self.chunk
        config.require(
            at < len(chunk["rows"]),
            f"The answers in {self.path} for step {step} are missing: {SETTINGS} has chunks of "
            f"{self.chunk} steps, and this one has {len(chunk['rows'])}. Write them again: python "
            f"-m t5x_lite.distill answers --output={self.path}",
        )
        config.require(
            np.array_equal(chunk["rows"][at, self.rows], row_digests(batch)),
            f"The answers in {self.path} for step {step} are of other data: they were written with "
            "another Data, Run.seed or Model layout. Write them again with this config",
        )
        logarithms = np.array(chunk["log_probabilities"][at, self.rows])
        ids = chunk["ids"][at, self.rows].astype(np.int32)
        return TeacherLogits(ids, logarithms, logarithms[..., 0] > -np.inf)
