# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files: a file is complete or unchanged."""

import contextlib
import os
from pathlib import Path

from t5x_lite.utils.paths import is_address, parse_path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it to `path`.

    If the process is killed or the disk is full, `path` keeps its former content. A store replaces
    an object as a whole by itself.

    Args:
      path: the file to write or to replace.
      content: text, which is written as UTF-8, or bytes.

    Raises:
      OSError: the file cannot be written, or its folder does not exist.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_address(path):
        parse_path(path).write_bytes(content)
        return
    path = Path(path)
    # In the same folder, as renaming is atomic only within a file system. The process id in the
    # name separates two processes that write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until a folder and its files are on the disk.

    A folder that is renamed before that may be there after a power failure without its content.

    Raises:
      OSError: the disk is full or fails.
    """
    for path in sorted(Path(folder).iterdir()):
        sync_path(path)
    with contextlib.suppress(OSError):  # some mounted stores do not know this of folders
        sync_path(folder)


def sync_path(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
