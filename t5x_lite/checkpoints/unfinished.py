# SPDX-License-Identifier: Apache-2.0
"""Output folders that are either complete or absent."""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from t5x_lite.utils.paths import is_address, parse_output_path
from t5x_lite.utils.remote_lock import LockedError, RemoteLock

SUFFIX = ".unfinished"
LOCK = ".converting"
# Files by which a checkpoint of each format is known.
MARKS = ("config.gin", "config.json", "checkpoint")


class OutputError(ValueError):
    """The output cannot go where it should."""


def check_output_folder(to: str | Path) -> Path:
    """The folder to write.

    Raises:
      OutputError: something is there already.
    """
    # Absolute, for the folder's own name where it is ".".
    to = parse_output_path(to).absolute()
    if to.is_dir() and not to.is_symlink() and not any(to.iterdir()):
        return to
    if to.exists() or to.is_symlink():
        raise OutputError(f"{to} is there already: choose another folder, or remove it first")
    return to


@contextlib.contextmanager
def unfinished_folder(to: str | Path) -> Generator[Path]:
    """A folder beside `to` to write into, that gets its name when all of it is written.

    An error removes it; the leftovers of a killed process are removed by the next. What goes to a
    store is written to a temporary folder first, and uploaded, the files of MARKS last.

    Raises:
      OutputError: `to` is there already, another process writes it, or it cannot be written.
    """
    to = check_output_folder(to)
    if is_address(to):
        with uploaded_folder(to) as work:
            yield work
        return
    work = to.with_name(to.name + SUFFIX)
    try:
        work.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in work.iterdir() if entry.name != LOCK]
        if others and not (work / LOCK).exists():
            raise OutputError(f"{work} is there already and not from a conversion: remove it first")
        lock = (work / LOCK).open("a")
    except OSError as error:
        raise OutputError(f"{work} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"Another process is writing {to}: wait for it") from error
        try:
            for entry in others:
                remove_path(entry)
            yield work
            check_output_folder(to)
            (work / LOCK).unlink()
            sync_folder(work)
            work.rename(to)
            sync_path(to.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextlib.contextmanager
def uploaded_folder(to: Any) -> Generator[Path]:
    """`unfinished_folder` of a `RemotePath`."""
    lock = RemoteLock(to.with_name(to.name + SUFFIX))
    try:
        lock.acquire()
    except LockedError as error:
        raise OutputError(f"Another process ({error}) is writing {to}: wait for it") from error
    except OSError as error:
        raise OutputError(f"{to} cannot be written: {error.strerror}") from error
    with contextlib.closing(lock), tempfile.TemporaryDirectory(prefix="t5x_lite-") as work:
        yield Path(work)
        check_output_folder(to)
        try:
            to.upload(Path(work), MARKS)
        except BaseException:
            with contextlib.suppress(OSError):
                to.remove_tree()
            raise


@contextlib.contextmanager
def delay_signals() -> Generator[Callable[[], None]]:
    """Holds back Ctrl-C and SIGTERM; calling the function that it yields handles one that came.

    Threads of TensorStore write while Python goes on, and create the folders that they write to: a
    folder removed in the midst of that comes back. Call it where nothing is being written. A second
    signal is not held back.
    """
    pending: list[int] = []

    def hold(number: int, frame) -> None:
        pending.append(number)
        if len(pending) > 1:
            answer()

    def answer() -> None:
        if pending:
            number = pending[-1]
            pending.clear()  # a handler that returns is called once
            before[number](number, None)

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    # A signal that is ignored, or ends the process without Python, stays as it is.
    handled = [number for number, handler in before.items() if callable(handler)]
    try:
        for number in handled:
            signal.signal(number, hold)
        yield answer
    finally:
        for number in handled:
            signal.signal(number, before[number])
    answer()


def remove_path(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Writes a folder to disk; when it returns, everything in it would survive a power failure."""
    for path in (folder, *folder.rglob("*")):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Writes a file, or the names in a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
