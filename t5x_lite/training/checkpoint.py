# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saved in the background, the last ones and the best one kept."""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import config, processes
from t5x_lite.training import archive
from t5x_lite.training.archive import CheckpointError, Damaged, Note
from t5x_lite.training.state import TrainState
from t5x_lite.training.state import size as state_size

FOLDER = "checkpoints"
DAMAGED = ".damaged"
# Renamed before deletion: a run killed while deleting leaves no half checkpoint under its number.
DELETING = ".deleting"
UNFINISHED = ".orbax-checkpoint-tmp"
# Seconds for writing one: orbax measures them by the time of day, which may be set meanwhile.
PATIENCE = 7 * 24 * 3600
NO_SPACE = "No space left on device"


def steps(model_dir: str | Path) -> list[int]:
    """The steps of which a run folder has a whole checkpoint, ascending."""
    folder = Path(model_dir) / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def best_step(notes: dict[int, Note]) -> int | None:
    """The step best by the metric that the newest note names; the later one of equals."""
    if not notes or notes[max(notes)].best is None:
        return None
    metric, higher = notes[max(notes)].best
    sign = 1 if higher else -1
    scored = [
        (sign * note.metrics[metric], step)
        for step, note in notes.items()
        if np.isfinite(note.metrics.get(metric, np.nan))
    ]
    return max(scored)[1] if scored else None


class Checkpoints:
    """Writes and restores the checkpoints of one run folder; one process at a time."""

    def __init__(self, model_dir: str | Path, cfg: config.Checkpoint):
        import orbax.checkpoint as ocp

        self.folder = Path(model_dir).resolve() / FOLDER
        self.cfg = cfg
        if processes.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        processes.wait()
        self.had_files = self.has_files()
        self.notes = readable_notes(self.folder)
        self.pending: Note | None = None
        self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=PATIENCE)

    def save(self, state: TrainState, note: Note) -> None:
        """Begins to write a checkpoint of `state`, after the one before is done.

        Raises:
          CheckpointError: the one before, or the beginning of this one, could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        parts = archive.parts(state)
        note = dataclasses.replace(
            note,
            best=(self.cfg.metric, self.cfg.higher_is_better) if self.cfg.metric else None,
            arrays={item: archive.describe(arrays) for item, arrays in parts.items()},
        )
        items = {item: ocp.args.PyTreeSave(arrays) for item, arrays in parts.items()}
        items["note"] = ocp.args.JsonSave(archive.note_text(note))
        self.pending = note
        self.attempt(lambda: self.begin(note.step, items, state_size(state)))

    def begin(self, step: int, items: dict[str, Any], size: int) -> None:
        """Starts the writer's threads; raises OSError at once where the disk is too small."""
        import orbax.checkpoint as ocp

        self.stand_again()
        free = shutil.disk_usage(self.folder).free
        if free < size:
            # Found here, a full disk is one sentence; found in the threads, it is many tracebacks.
            raise OSError(f"{NO_SPACE}: it takes {mebibytes(size)}, {mebibytes(free)} are free")
        path = self.folder / str(step)
        self.writer.save(path, args=ocp.args.Composite(**items), force=False)

    def stand_again(self) -> None:
        """Makes the folder anew where somebody removed it, but not where all of MODEL_DIR is gone:
        under the empty place of a disk that was unmounted nobody would look for checkpoints."""
        if self.is_gone():
            raise OSError(self.gone())
        if self.folder.exists():
            return
        warnings.warn(f"{self.folder} was removed: its checkpoints are lost", stacklevel=2)
        self.folder.mkdir(exist_ok=True)
        self.notes.clear()

    def has_files(self) -> bool:
        """Whether anything but checkpoints is in MODEL_DIR: its lock, its config, its metrics."""
        return any(self.folder.parent.glob("*.*"))

    def is_gone(self) -> bool:
        """Whether MODEL_DIR was moved or unmounted; there may be another folder of that name, since
        orbax's threads make every folder that they write to."""
        there = self.folder.parent.exists()
        return not there or (self.had_files and not self.has_files())

    def gone(self) -> str:
        return f"{self.folder.parent} is empty or gone: was its disk unmounted?"

    def wait(self) -> None:
        """Returns when what was begun is on disk, and older checkpoints are removed."""
        self.attempt(self.writer.wait_until_finished)
        if self.pending is not None:
            self.notes[self.pending.step] = self.pending
            self.pending = None
            self.prune()

    def attempt(self, write: Callable[[], Any]) -> None:
        """Runs write; what goes wrong becomes a CheckpointError that says where things stand."""
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            step = self.pending.step if self.pending else "?"
            self.pending = None
            if processes.lost(error):
                raise
            raise CheckpointError(self.trouble(step, error)) from error

    def trouble(self, step, error: Exception) -> str:
        cause = archive.first_line(error)
        if self.is_gone():
            cause = self.gone()
        elif NO_SPACE in str(error) and not cause.startswith(NO_SPACE):
            cause = f"{NO_SPACE}, {mebibytes(shutil.disk_usage(self.folder).free)} are free"
        with contextlib.suppress(OSError):
            remove_leftovers(self.folder)
            if self.is_gone():
                self.folder.rmdir()
                self.folder.parent.rmdir()
        last = f"step {max(self.notes)} is whole" if self.notes else "there is none yet"
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {cause}.\n"
            f"Of the checkpoints before, {last}. When there is room, the same command goes on."
        )

    def prune(self) -> None:
        """Removes all whole checkpoints but the last `keep` and the best."""
        kept = {*sorted(self.notes)[-self.cfg.keep :], best_step(self.notes)}
        for step in set(self.notes) - kept:
            if processes.first():
                remove(self.folder / str(step))
            del self.notes[step]

    def restore(self, expected: TrainState, tell: Callable[[str], None]):
        """The newest usable state with its note, or None where there is no checkpoint.

        A damaged one is told, renamed to <step>.damaged, and the one before it is used.

        Raises:
          Mismatch: the newest is of another model.
          Damaged: there are checkpoints and none can be used.
        """
        there = json.loads(processes.from_first(json.dumps(steps(self.folder.parent))))
        for step in reversed(there):
            try:
                return self.read(step, expected)
            except Damaged as error:
                self.notes.pop(step, None)
                if not processes.first():
                    continue
                aside = set_aside(self.folder / str(step))
                tell(f"Damaged checkpoint: {error}\nIt is kept as {aside}; using the one before.")
        if there:
            raise Damaged(
                f"None of the checkpoints in {self.folder} can be read (steps {there}). "
                "Start in another MODEL_DIR, or put a copy back."
            )
        return None

    def read(self, step: int, expected: TrainState) -> tuple[TrainState, Note]:
        folder = self.folder / str(step)
        damage = ""
        try:
            note = archive.read_note(folder)
        except Damaged as error:
            damage = str(error)
        archive.check_everywhere(damage)
        parts = {
            item: archive.restore(folder, item, note, shapes)
            for item, shapes in archive.parts(expected).items()
        }
        return archive.join(parts, expected), note

    def close(self) -> None:
        self.wait()
        self.writer.close()


def tell_once() -> None:
    """For a command: what goes wrong in orbax's threads reaches us as an error that we tell.

    Logs that repeat it are left out, and its other writers' complaints that their loop has ended.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def readable_notes(folder: Path) -> dict[int, Note]:
    notes = {}
    for step in steps(folder.parent):
        try:
            notes[step] = archive.read_note(folder / str(step))
        except Damaged:
            # Told when it is the one to restore; it is no candidate for the best until then.
            continue
    return notes


def remove(path: Path) -> None:
    doomed = path.with_name(path.name + DELETING)
    # Somebody who made room by hand may have been faster.
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run had half written or half deleted."""
    for path in folder.iterdir():
        if UNFINISHED in path.name or path.name.endswith(DELETING):
            shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that its step can be written again; nothing is deleted."""
    count, aside = 1, path.with_name(path.name + DAMAGED)
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{count}")
    path.rename(aside)
    return aside


def load_params(folder: str | Path, step: int | None = None, best: bool = False):
    """The weights of a run folder as a nested dict of numpy arrays, and their step.

    The newest checkpoint unless `step` names one or `best` asks for the best by the run's metric; a
    damaged newest one is warned about and the one before it is used.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    there = steps(folder)
    root = Path(folder).resolve() / FOLDER
    if not there:
        raise CheckpointError(f"{root} holds no checkpoint: is {folder} the MODEL_DIR of a run?")
    if best:
        step = best_step(readable_notes(root))
        if step is None:
            raise CheckpointError(f"{root}: no metric names the best (set Checkpoint.metric)")
    if step is not None:
        if step not in there:
            raise CheckpointError(f"{root} has no step {step}; it has {there}")
        return read_params(root / str(step)), step
    for step in reversed(there):
        try:
            return read_params(root / str(step)), step
        except Damaged as error:
            warnings.warn(f"{error}; using the checkpoint before it", stacklevel=2)
    raise CheckpointError(f"None of the checkpoints in {root} can be read (steps {there})")


def read_params(folder: Path) -> dict:
    flat = archive.restore(folder, "params", archive.read_note(folder))
    nested: dict = {}
    for name, array in flat.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = array
    return nested
