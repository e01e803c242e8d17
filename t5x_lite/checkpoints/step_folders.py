# SPDX-License-Identifier: Apache-2.0
"""Folders of the checkpoints of a run: their names, and what may be done to them.

On a disk a checkpoint has its name when it is complete. A store has no renaming, so a complete one
has a file that says so, which is written last and removed first.
"""

import contextlib
import hashlib
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from t5x_lite.config.checked import LARGEST_INT
from t5x_lite.utils.paths import is_address, parse_path

FOLDER = "checkpoints"
# The vocabularies of the run, beside its checkpoints.
VOCABULARY_FOLDER = "vocabulary"
DAMAGED = ".damaged"
# Renamed before deletion: a run killed while deleting leaves no half checkpoint under its number.
DELETING = ".deleting"
UNFINISHED = ".orbax-checkpoint-tmp"
# Orbax's last file of a checkpoint, on disks too: a run may be copied to a store.
COMMITTED = "commit_success.txt"
# Name of the threads that remove checkpoints from a store.
REMOVER = "removal of a checkpoint"


def vocabulary_digest(model_dir: str | Path) -> str | None:
    """Digest of the files that the vocabularies of a run are read from; None if it has none."""
    digest, count = hashlib.sha256(), 0
    for side in ("inputs", "targets"):
        for name in ("vocabulary.json", "model"):
            path = parse_path(model_dir) / VOCABULARY_FOLDER / side / name
            if path.is_file():
                digest.update(f"{side} {name} {path.stat().st_size}\n".encode() + path.read_bytes())
                count += 1
    return digest.hexdigest() if count else None


def list_steps(model_dir: str | Path) -> list[int]:
    """The steps of which a run folder has a complete checkpoint, ascending.

    Raises:
      OSError: the folder is there and cannot be read; that is not the same as no checkpoint.
    """
    folder = parse_path(model_dir) / FOLDER
    names = [name for name in list_names(model_dir) if is_step(name)]
    return sorted(int(name) for name in names if is_complete(folder / name))


def is_complete(path: Path) -> bool:
    """True for the folder of a checkpoint that was written to its end."""
    return not is_address(path) or (path / COMMITTED).exists()


def is_step(name: str) -> bool:
    """True for a name under which a run saves a step: 7, and not 07, a digit of another script, or
    a number beyond every Train.steps."""
    return re.fullmatch(r"0|[1-9][0-9]{0,9}", name) is not None and int(name) <= LARGEST_INT


def list_damaged(model_dir: str | Path) -> list[str]:
    """Names of the checkpoints that were set aside."""
    return sorted(name for name in list_names(model_dir) if DAMAGED in name)


def list_names(model_dir: str | Path) -> list[str]:
    """Names in the folder of checkpoints; [] if there is none."""
    try:
        return [path.name for path in (parse_path(model_dir) / FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_checkpoint(path: Path) -> None:
    """Removes the folder of a checkpoint: first what makes it one, its name or its last file."""
    if is_address(path):
        # A thread that the end of the process waits for: training does not.
        threading.Thread(target=remove_from_store, args=(path,), name=REMOVER).start()
        return
    doomed = path.with_name(path.name + DELETING)
    # Somebody who made room by hand may have been faster.
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        remove_tree(doomed)


def remove_from_store(path: Path) -> None:
    """Removes a checkpoint in a store, or leaves it for the next start of the run where the store
    does not answer."""
    with contextlib.suppress(OSError):
        (path / COMMITTED).unlink(missing_ok=True)
        remove_tree(path)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run had half written or half deleted."""
    for name in list_names(folder.parent):
        begun = name.isdecimal() and not is_complete(folder / name)
        if begun or UNFINISHED in name or name.endswith(DELETING):
            remove_tree(folder / name)


def remove_tree(path: Any) -> None:
    """Removes a folder, of a disk or of a store, unless somebody was faster."""
    if is_address(path):
        path.remove_tree()
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that its step can be written again; nothing is deleted."""
    count, aside = 1, path.with_name(path.name + DAMAGED)
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{count}")
    path.rename(aside)
    return aside
