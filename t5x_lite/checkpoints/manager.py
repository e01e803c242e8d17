# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: saved in the background, the last ones and the best one kept."""

import concurrent.futures
import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_lite import config, processes
from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.checkpoints.checkpoint_io import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointWriteError,
    DamagedCheckpointError,
    RemovedCheckpointError,
)
from t5x_lite.checkpoints.selection import (
    best_step,
    check_state_shapes,
    read_newest,
    readable_metadata,
    select_steps,
)
from t5x_lite.checkpoints.step_folders import (
    FOLDER,
    remove_checkpoint,
    remove_leftovers,
    set_aside,
    vocabulary_digest,
)
from t5x_lite.checkpoints.train_state import TrainState, tree_bytes
from t5x_lite.checkpoints.weight_paths import nest_tree
from t5x_lite.utils.paths import is_address, parse_path

# Seconds for writing one: orbax measures them by the time of day, which may be set meanwhile.
PATIENCE = 7 * 24 * 3600
NO_SPACE = "No space left on device"
# How often a reader takes a newer checkpoint, where the run that trains removes the one it reads.
ATTEMPTS = 20


class CheckpointManager:
    """Writes and restores the checkpoints of one run folder; one process at a time."""

    def __init__(self, model_dir: str | Path, cfg: config.Checkpoint):
        self.folder = parse_path(model_dir).resolve() / FOLDER
        self.cfg = cfg
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        processes.barrier()
        self.had_files = self.has_files()
        self.metadata = readable_metadata(self.folder)
        self.vocabulary: str | None = None
        self.vocabulary_read = False
        self.pending: CheckpointMetadata | None = None
        self.background = concurrent.futures.ThreadPoolExecutor(1, "metrics of checkpoints")
        self.adding: concurrent.futures.Future | None = None
        self.writer = checkpoint_io.open_writer(self.folder, PATIENCE)

    def read_vocabulary(self) -> None:
        """Computes the digest of the run's vocabularies, which checkpoints name. Where it is not
        called, the first `save` does, and waits for the answers of a store."""
        self.vocabulary, self.vocabulary_read = vocabulary_digest(self.folder.parent), True

    def save(self, state: TrainState, metadata: CheckpointMetadata) -> None:
        """Begins to write a checkpoint of `state`, after the one before is done.

        Raises:
          CheckpointError: the one before, or the beginning of this one, could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if processes.is_first() and not self.vocabulary_read:
            self.read_vocabulary()
        parts = checkpoint_io.state_items(state)
        metadata = dataclasses.replace(
            metadata,
            best=(self.cfg.metric, self.cfg.higher_is_better) if self.cfg.metric else None,
            arrays={item: checkpoint_io.describe_arrays(arrays) for item, arrays in parts.items()},
            vocabulary=self.vocabulary,
        )
        items: dict[str, Any] = {
            item: ocp.args.PyTreeSave(arrays) for item, arrays in parts.items()
        }
        items["note"] = ocp.args.JsonSave(checkpoint_io.metadata_json(metadata))
        self.pending = metadata
        self.run_writer(lambda: self.start_writer(metadata.step, items, tree_bytes(state)))

    def start_writer(self, step: int, items: dict[str, Any], size: int) -> None:
        """Starts the writer's threads.

        Args:
          step: name of the checkpoint's folder.
          items: orbax's arguments by item.
          size: bytes of all arrays.

        Raises:
          OSError: the disk is too small, or MODEL_DIR is gone.
        """
        import orbax.checkpoint as ocp

        self.recreate_folder()
        free = None if is_address(self.folder) else shutil.disk_usage(self.folder).free
        if free is not None and free < size:
            # Noticed here, a full disk is one sentence; noticed in the threads, it is many
            # tracebacks.
            raise OSError(
                f"{NO_SPACE}: it takes {format_mebibytes(size)}, {format_mebibytes(free)} are free"
            )
        path = checkpoint_io.orbax_path(self.folder / str(step))
        self.writer.save(path, args=ocp.args.Composite(**items), force=False)

    def recreate_folder(self) -> None:
        """Creates the folder again where somebody removed it.

        Raises:
          OSError: all of MODEL_DIR is gone; below the mount point of an unmounted disk, checkpoints
            would not be found again.
        """
        if is_address(self.folder):  # a store has no folders
            return
        if self.is_gone():
            raise OSError(self.gone_message())
        if self.folder.exists():
            return
        warnings.warn(f"{self.folder} was removed: its checkpoints are lost", stacklevel=2)
        self.folder.mkdir(exist_ok=True)
        self.metadata.clear()

    def has_files(self) -> bool:
        """True if anything but checkpoints is in MODEL_DIR: its lock, its config, its metrics."""
        return not is_address(self.folder) and any(self.folder.parent.glob("*.*"))

    def is_gone(self) -> bool:
        """True if MODEL_DIR was moved or unmounted; there may be another folder of that name, since
        orbax's threads create every folder that they write to."""
        if is_address(self.folder):
            return False
        exists = self.folder.parent.exists()
        return not exists or (self.had_files and not self.has_files())

    def gone_message(self) -> str:
        return f"{self.folder.parent} is empty or gone: was its disk unmounted?"

    def wait(self) -> None:
        """Returns when what was begun is on disk, and older checkpoints are removed."""
        adding, self.adding = self.adding, None
        if adding is not None:
            self.run_writer(adding.result)
        self.run_writer(self.writer.wait_until_finished)
        pending, self.pending = self.pending, None
        if pending is not None:
            self.metadata[pending.step] = pending
        if pending is not None or adding is not None:
            self.prune()

    def run_writer(self, write: Callable[[], Any]) -> None:
        """Runs write; an error becomes CheckpointWriteError, with the state of the checkpoints."""
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            step = self.pending.step if self.pending else "?"
            self.pending = None
            if processes.is_lost(error):
                raise
            raise CheckpointWriteError(self.describe_failure(step, error)) from error

    def describe_failure(self, step: int | str, error: Exception) -> str:
        cause = processes.first_line(error)[:300]
        if self.is_gone():
            cause = self.gone_message()
        elif NO_SPACE in str(error) and not cause.startswith(NO_SPACE):
            cause = f"{NO_SPACE}, {format_mebibytes(shutil.disk_usage(self.folder).free)} are free"
        with contextlib.suppress(OSError):
            remove_leftovers(self.folder)
            if self.is_gone():
                self.folder.rmdir()
                self.folder.parent.rmdir()
        last = f"step {max(self.metadata)} is complete" if self.metadata else "there is none yet"
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {cause}.\n"
            f"Of the checkpoints before, {last}. When there is room, the same command goes on."
        )

    def check_writer(self) -> None:
        """Raises CheckpointError as soon as the background writer has failed."""
        if self.adding is not None and self.adding.done():
            self.wait()
        if self.pending is not None:
            self.run_writer(self.writer.check_for_errors)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds an evaluation to a checkpoint that is saved already; in a store, in the background.

        Args:
          step: of the checkpoint.
          metrics: values by name.

        Raises:
          CheckpointError: the checkpoint could not be written.
        """
        in_store = is_address(self.folder)
        if not in_store or self.adding is not None:
            self.wait()
        pending = self.pending is not None and self.pending.step == step
        saved = self.pending if pending else self.metadata.get(step)
        if saved is None:
            return
        metadata = dataclasses.replace(saved, metrics=metrics)
        if pending:
            self.pending = metadata
        else:
            self.metadata[step] = metadata
        if processes.is_first():
            self.adding = self.background.submit(self.rewrite_metadata, metadata)
        if not in_store:
            self.wait()

    def rewrite_metadata(self, metadata: CheckpointMetadata) -> None:
        """Writes other metadata for a checkpoint, once it is complete."""
        self.writer.wait_until_finished()
        checkpoint_io.write_metadata(self.folder / str(metadata.step), metadata)

    def prune(self) -> None:
        """Removes all complete checkpoints but the last `keep` and the best."""
        kept = {*sorted(self.metadata)[-self.cfg.keep :], best_step(self.metadata)}
        for step in set(self.metadata) - kept:
            if processes.is_first():
                remove_checkpoint(self.folder / str(step))
            del self.metadata[step]

    def restore(
        self,
        expected: TrainState,
        report: Callable[[str], None],
        ignore_damaged: bool = False,
    ) -> tuple[TrainState, CheckpointMetadata] | None:
        """Reads the newest usable state; None if there are no checkpoints.

        Where the newest ones are damaged, they are reported and renamed to <step>.damaged, after
        the one before them was read. What cannot be read now is left as it is.

        Args:
          expected: shapes and placements of the state.
          report: is called with a text about each damaged checkpoint.
          ignore_damaged: true to begin anew where only damaged checkpoints stand.

        Raises:
          CheckpointError: the newest is of another model, only damaged ones stand, or the disk
            does not answer.
        """
        restored, damaged = read_newest(
            self.folder, lambda step: self.read_state(step, expected), ignore_damaged
        )
        for step, error in damaged.items():
            self.metadata.pop(step, None)
            if processes.is_first():
                aside = set_aside(self.folder / str(step))
                report(f"Damaged checkpoint: {error}\nIt is kept as {aside}.")
        return restored

    def read_state(self, step: int, expected: TrainState) -> tuple[TrainState, CheckpointMetadata]:
        """The state of one step, placed as `expected` says, and its metadata."""
        folder = self.folder / str(step)
        problem = None
        try:
            metadata = checkpoint_io.read_metadata(folder)
        except CheckpointError as error:
            problem = error
        checkpoint_io.check_all_processes(problem)
        check_state_shapes(folder, metadata, expected)
        parts = {
            item: checkpoint_io.restore_arrays(folder, item, metadata, shapes)
            for item, shapes in checkpoint_io.state_items(expected).items()
        }
        return checkpoint_io.join_items(parts, expected), metadata

    def close(self) -> None:
        self.wait()
        self.background.shutdown()
        self.writer.close()


def format_mebibytes(size: int) -> str:
    """Bytes as text, "12.3 MiB"."""
    return f"{size / 2**20:,.1f} MiB"


def load_params(
    folder: str | Path, step: int | None = None, best: bool = False
) -> tuple[dict[str, Any], int]:
    """Reads the weights of a run folder into the host's memory.

    Args:
      folder: MODEL_DIR of the run, which may train meanwhile.
      step: which checkpoint; None for the newest. A damaged newest one is warned about, and the one
        before it is used.
      best: the best checkpoint by the run's metric.

    Returns:
      A nested dict of numpy arrays, and their step.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it cannot be read now.
    """
    for _ in range(ATTEMPTS - 1 if step is None else 0):
        # A run that trains removes older checkpoints, but never without a newer one.
        with contextlib.suppress(RemovedCheckpointError):
            return read_selected(folder, step, best)
    return read_selected(folder, step, best)


def read_selected(folder: str | Path, step: int | None, best: bool) -> tuple[dict[str, Any], int]:
    """`load_params`, of the checkpoints that stand when it begins.

    Args:
      folder: MODEL_DIR of the run.
      step: which checkpoint; None for the newest.
      best: the best checkpoint by the run's metric.
    """
    root = parse_path(folder).resolve() / FOLDER
    steps = select_steps(folder, step, best)
    if best or step is not None:
        return read_params(root / str(steps[0])), steps[0]
    for each in steps:
        try:
            return read_params(root / str(each)), each
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}; using the checkpoint before it", stacklevel=3)
    raise CheckpointError(f"None of the checkpoints in {root} can be read (steps {steps[::-1]})")


def read_params(folder: Path) -> dict[str, Any]:
    """The weights of one checkpoint as a nested dict of numpy arrays."""
    metadata = checkpoint_io.read_metadata(folder)
    return nest_tree(checkpoint_io.restore_arrays(folder, "params", metadata))
