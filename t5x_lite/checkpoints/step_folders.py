# SPDX-License-Identifier: Apache-2.0
"""Folders of the checkpoints of a run: their names, and what may be done to them."""

import contextlib
import shutil
from pathlib import Path

FOLDER = "checkpoints"
DAMAGED = ".damaged"
# Renamed before deletion: a run killed while deleting leaves no half checkpoint under its number.
DELETING = ".deleting"
UNFINISHED = ".orbax-checkpoint-tmp"


def list_steps(model_dir: str | Path) -> list[int]:
    """The steps of which a run folder has a complete checkpoint, ascending.

    Raises:
      OSError: the folder is there and cannot be read; that is not the same as no checkpoint.
    """
    return sorted(int(name) for name in list_names(model_dir) if name.isdecimal())


def list_damaged(model_dir: str | Path) -> list[str]:
    """Names of the checkpoints that were set aside."""
    return sorted(name for name in list_names(model_dir) if DAMAGED in name)


def list_names(model_dir: str | Path) -> list[str]:
    """Names in the folder of checkpoints; [] if there is none."""
    try:
        return [path.name for path in (Path(model_dir) / FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_checkpoint(path: Path) -> None:
    """Removes the folder of a checkpoint, its name first."""
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
