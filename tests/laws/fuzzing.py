# SPDX-License-Identifier: Apache-2.0
"""Attacks a reader with broken files by seed, one at a time, and watches how it takes them.

A reader may succeed, or raise ValueError or OSError with the name of a file or folder in its
message. Anything else is a `Fault`: another exception, a message without a name, more than
`SECONDS` or `MEMORY`, or a file written, changed or removed.
"""

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fuzz_formats import mutate_file
from fuzz_target import Target
from fuzz_targets import TARGETS

SECONDS = 10
MEMORY = 10**9
TEST_SECONDS = 600
# What is no Exception ends a round late, or, in a library's own code, the process: see `limits`.
GRACE = 5
CRASH, HANG, FULL, UNNAMED, WRITES = "crash", "hang", "memory", "unnamed", "writes"
KINDS = (CRASH, HANG, FULL, UNNAMED, WRITES)


class Fault(NamedTuple):
    """Fault of a round; the same target, seed and round reproduce it.

    Attributes:
      target: name of the reader.
      seed: seed of the draws.
      round: number of the round.
      file: the file that was changed.
      kind: one of KINDS.
      what: describes the fault.
    """

    target: str
    seed: int
    round: int
    file: str
    kind: str
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
    """SECONDS of the processor (a Hang) and MEMORY more address space than now (MemoryError).

    A library that does not return to Python is ended by the kernel GRACE seconds later.

    A worker of the tests has other threads, which such a lack of memory would end, and garbage of a
    thousand tests, whose collection is counted: there a Hang is one of TEST_SECONDS on the clock.
    """

    def stop(number, frame):
        raise Hang

    alone = "PYTEST_CURRENT_TEST" not in os.environ
    # Processor time, so that a busy machine does not count as a hang; wall-clock time where nothing
    # runs at all.
    clocks = {signal.SIGALRM: (signal.ITIMER_REAL, 15 * SECONDS if alone else TEST_SECONDS)}
    if alone:
        clocks[signal.SIGPROF] = (signal.ITIMER_PROF, SECONDS)
    before = {number: signal.signal(number, stop) for number in clocks}
    for timer, seconds in clocks.values():
        signal.setitimer(timer, seconds)
    try:
        with resource_limits() if alone else contextlib.nullcontext():
            yield
    finally:
        for timer, _ in clocks.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def resource_limits() -> Iterator[None]:
    """The kernel's limits of `limits`: address space, and processor time with GRACE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    cpu_soft, cpu_hard = resource.getrlimit(resource.RLIMIT_CPU)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + GRACE, cpu_hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_soft, cpu_hard))


def is_memory_error(error: BaseException | None) -> bool:
    """True for an error that memory caused, also where a reader wrapped it."""
    chain: list[BaseException] = []
    while error is not None and not any(error is each for each in chain):  # some are circles
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(isinstance(each, MemoryError) or "bad_alloc" in str(each) for each in chain)


def describe_fault(
    error: BaseException, names: set[str], above: tuple[str, ...]
) -> tuple[str, str] | None:
    """Kind and description of the fault that an error is; None for an error of the right kind.

    Args:
      error: what the reader raised.
      names: files and folders that it may name.
      above: other sources that it may name.
    """
    text = str(error)
    if isinstance(error, Hang):
        return HANG, f"takes more than {SECONDS} s of the processor"
    if is_memory_error(error):
        return FULL, f"takes more than {MEMORY:,} bytes: {type(error).__name__}: {text[:200]}"
    if isinstance(error, ValueError | OSError):
        if any(name in text for name in (*names, *above)):
            return None
        return UNNAMED, f"{type(error).__name__} names no file: {text[:300]}"
    where = traceback.extract_tb(error.__traceback__)
    frames = " ".join([f"{Path(each.filename).name}:{each.lineno}" for each in where][-6:])
    return CRASH, f"{type(error).__name__}: {text[:200]} ({frames})"


def read_folder(target: Target, folder: Path, file: Path) -> tuple[bool, tuple[str, str] | None]:
    """Reads a folder: True if the reader accepts it, and the fault if it fails otherwise.

    Args:
      target: the reader.
      folder: folder to read.
      file: file that was changed, which an error has to name.
    """
    logging.disable()  # of lines that are left out
    try:
        with warnings.catch_warnings(), limits():
            warnings.simplefilter("ignore")
            target.read(folder)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        parts = {folder.name, *file.relative_to(folder).parts}
        names = parts | {path.name for path in folder.iterdir()}
        return False, describe_fault(error, names - {""}, target.names)
    finally:
        logging.disable(logging.NOTSET)
    return True, None


def break_file(folder: Path, seed: int, number: int) -> tuple[Path, bytes]:
    """The file that a round changes, and its new content.

    Args:
      folder: folder of the target.
      seed: seed of the draws.
      number: number of the round.
    """
    draw = random.Random(f"{seed}:{number}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # Settings decide more than numbers do.
    settings = [path for path in paths if path.suffix in (".json", ".gin")]
    path = draw.choice(draw.choice((paths, settings or paths)))
    return path, mutate_file(path.relative_to(folder).as_posix(), path.read_bytes(), draw)


def prepare(name: str, scratch: Path) -> None:
    """Writes the whole files of a target below `scratch`; AssertionError if they are refused."""
    target, folder = TARGETS[name], toy_folder(name, scratch)
    folder.mkdir()
    target.make(folder)
    if target.repairs:
        shutil.copytree(folder, scratch / "whole")
    accepted, fault = read_folder(target, folder, folder / "whole")
    if not accepted:
        raise AssertionError(f"{name}: whole files are refused: {fault}")


def toy_folder(name: str, scratch: Path) -> Path:
    """The folder that a target reads."""
    return scratch / f"toy_{name}"


def attack(
    name: str, scratch: Path, rounds: range, seed: int
) -> Iterator[tuple[bool, Fault | None]]:
    """Runs rounds; yields whether the reader accepts the folder, and its fault if there is one.

    Args:
      name: target in `TARGETS`.
      scratch: folder that `prepare` wrote to.
      rounds: numbers of the rounds.
      seed: seed of the draws.
    """
    target, folder = TARGETS[name], toy_folder(name, scratch)
    for number in rounds:
        path, changed = break_file(folder, seed, number)
        content, file = path.read_bytes(), str(path.relative_to(folder))
        path.write_bytes(changed)
        before = files_below(scratch)
        accepted, fault = read_folder(target, folder, path)
        if target.repairs:
            shutil.rmtree(folder)
            shutil.copytree(scratch / "whole", folder)
        else:
            if fault is None and files_below(scratch) != before:
                fault = WRITES, "a file was written, changed or removed"
            path.write_bytes(content)
        yield accepted, fault and Fault(name, seed, number, file, *fault)
