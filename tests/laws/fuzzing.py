# SPDX-License-Identifier: Apache-2.0
"""Breaks the files of a reader by seed, one at a time, and watches how the reader takes it.

A reader may succeed, or raise ValueError or OSError with the name of a file or folder in its
message. Anything else is a `Fault`: another exception, a message without a name, more than
`SECONDS` or `MEMORY`, or a file written, changed or removed.
"""

import contextlib
import os
import random
import resource
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fuzz_mutations import of_file
from fuzz_targets import TARGETS, Target

SECONDS = 20
MEMORY = 2 * 2**30


class Fault(NamedTuple):
    """Fault of a round; the same target, seed and round reproduce it.

    target names the reader, file the file that was changed; what describes the fault.
    """

    target: str
    seed: int
    round: int
    file: str
    what: str


class Hang(BaseException):
    """No Exception: a reader that catches those must not catch this one."""


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, by its path."""
    files = {}
    for root, _, names in os.walk(folder):
        for name in names:
            stat = os.stat(os.path.join(root, name))
            files[os.path.join(root, name)] = stat.st_size, stat.st_mtime_ns
    return files


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """SECONDS of the processor (a Hang) and MEMORY more address space than now (MemoryError)."""

    def alarm(number, frame):
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Processor time, so that a busy machine does not count as a hang; wall-clock time where nothing
    # runs at all.
    timers = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: 15 * SECONDS}
    before = [signal.signal(number, alarm) for number in (signal.SIGPROF, signal.SIGALRM)]
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def outcome(target: Target, folder: Path, file: str) -> tuple[bool, str | None]:
    """Reads a folder: True if the reader accepts it, and the fault if it fails otherwise.

    Args:
      target: the reader.
      folder: folder to read.
      file: file that was changed, which an error has to name.
    """
    try:
        with warnings.catch_warnings(), limits():
            warnings.simplefilter("ignore")
            target.read(folder)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except (ValueError, OSError) as error:
        text = str(error)
        parts = [folder.name, *Path(file).parts, *(path.name for path in folder.iterdir())]
        if any(part in text for part in parts):
            return False, None
        return False, f"{type(error).__name__} names no file: {text[:300]}"
    except Hang:
        return False, f"takes more than {SECONDS} s of the processor"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(each.filename).name}:{each.lineno}" for each in where][-6:]
        return False, f"{type(error).__name__}: {str(error)[:200]} ({' '.join(ours)})"
    return True, None


def broken(folder: Path, seed: int, number: int) -> tuple[Path, bytes]:
    """The file that a round changes, and its new content.

    Args:
      folder: folder of the target.
      seed: seed of the draw.
      number: number of the round.
    """
    draw = random.Random(f"{seed}:{number}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(paths)
    return path, of_file(path.name)(path.read_bytes(), draw)


def run(name: str, scratch: Path, rounds: range, seed: int) -> Iterator[tuple[bool, Fault | None]]:
    """Runs rounds; yields whether the reader accepts the folder, and its fault if there is one.

    Args:
      name: target in `TARGETS`.
      scratch: folder to work in.
      rounds: numbers of the rounds.
      seed: seed of the draws.
    """
    target, folder = TARGETS[name], scratch / f"toy_{name}"
    folder.mkdir()
    target.make(folder)
    content, fault = outcome(target, folder, folder.name)
    if not content:
        raise AssertionError(f"{name}: whole files are refused: {fault}")
    for number in rounds:
        path, changed = broken(folder, seed, number)
        whole = path.read_bytes()
        path.write_bytes(changed)
        there = files_below(scratch)
        content, what = outcome(target, folder, str(path.relative_to(folder)))
        if what is None and files_below(scratch) != there:
            what = "a file was written, changed or removed"
        file = str(path.relative_to(folder))
        yield content, what and Fault(name, seed, number, file, what)
        path.write_bytes(whole)
