# SPDX-License-Identifier: Apache-2.0
"""An output folder that is either whole or not there."""

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIX = ".unfinished"
LOCK = ".converting"


class OutputError(ValueError):
    """The output cannot go where it should."""


def check(to: str | Path) -> Path:
    """The folder to write; OutputError where something is there already."""
    # The folder's own name is wanted, of "." too.
    to = Path(to).absolute()
    if to.is_dir() and not to.is_symlink() and not any(to.iterdir()):
        return to
    if to.exists() or to.is_symlink():
        raise OutputError(f"{to} is there already: choose another folder, or remove it first")
    return to


@contextlib.contextmanager
def folder(to: str | Path) -> Iterator[Path]:
    """A folder beside `to` to write into, that gets its name when all of it is written.

    What goes wrong removes it; what a killed process left of one is removed by the next.

    Raises:
      OutputError: `to` is there already, another process writes it, or it cannot be written.
    """
    to = check(to)
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
                remove(entry)
            yield work
            check(to)
            (work / LOCK).unlink()
            to_disk(work)
            work.rename(to)
            fsync(to.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Holds back Ctrl-C and SIGTERM; calling what it gives lets through one that came.

    Threads of TensorStore write while Python goes on, and make the folders that they write to: a
    folder removed in the midst of that comes back. Call it where nothing is being written. A second
    signal is not held back.
    """
    came: list[int] = []

    def note(number: int, frame) -> None:
        came.append(number)
        if len(came) > 1:
            answer()

    def answer() -> None:
        if came:
            number = came[-1]
            came.clear()  # a handler that returns is called once
            before[number](number, None)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal that is ignored, or ends the process without Python, stays as it is.
    ours = [number for number, handler in before.items() if callable(handler)]
    try:
        for number in ours:
            signal.signal(number, note)
        yield answer
    finally:
        for number in ours:
            signal.signal(number, before[number])
    answer()


def remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def to_disk(folder: Path) -> None:
    """Returns when everything in folder would survive a power failure."""
    for path in (folder, *folder.rglob("*")):
        fsync(path)


def fsync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
