# SPDX-License-Identifier: Apache-2.0
"""MODEL_DIR: one run, one process, one config."""

import contextlib
import dataclasses
import difflib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from t5x_lite import config, config_file, data, processes
from t5x_lite.training import checkpoint

CONFIG = "config.gin"
VOCABULARY = "vocabulary"
# Seconds until what one machine writes is seen by others: NFS looks again after 30 by default.
VISIBLE = 40.0
FREE_OF_TRAIN = ("steps", "log_every", "tensorboard", "patience", "remat", "unroll")


class FolderError(ValueError):
    """MODEL_DIR cannot be used for this run; the message says why and what to do."""


@contextlib.contextmanager
def locked(model_dir: Path):
    """Holds MODEL_DIR for this process; the lock goes with the process, however it ends.

    Raises:
      FolderError: another process trains there, or the folder cannot be written.
    """
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        file = open(model_dir / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise FolderError(f"MODEL_DIR {model_dir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FolderError(
                f"Another process ({file.read().strip() or 'unknown'}) trains in {model_dir}. "
                "Wait for it, stop it, or choose another MODEL_DIR."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


@contextlib.contextmanager
def held(model_dir: Path):
    """`locked` for all processes of a run at once: the first one holds it.

    Raises:
      FolderError: as `locked`, or the processes do not see the same folder.
    """
    with locked(model_dir) if processes.first() else contextlib.nullcontext():
        check_shared(model_dir)
        yield


def check_shared(model_dir: Path) -> None:
    """Raises FolderError unless every process sees what the first one wrote there."""
    holder = model_dir / ".lock"
    said = processes.from_first(holder.read_text() if processes.first() else "")
    until = time.monotonic() + VISIBLE
    while not (seen := holder.exists() and holder.read_text() == said):
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    found = processes.everyone(str(seen))
    apart = [str(process) for process, there in enumerate(found) if there != "True"]
    if apart:
        raise FolderError(
            f"MODEL_DIR {model_dir} of process {', '.join(apart)} is not that of process 0: give a "
            "folder that all machines share (NFS, Filestore, a mounted bucket)"
        )


def agree(run: config.Run, tell: Callable[[str], None]) -> None:
    """`check`, and that all processes run the same config.

    Raises:
      FolderError: as `check`.
      ProcessesError: the configs differ.
    """
    processes.agree("The config", config_file.text(run))
    if processes.first():
        check(run, tell)


def replace(path: Path, text: str) -> None:
    """Writes text to path whole, or leaves what was there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


def check(run: config.Run, tell: Callable[[str], None]) -> None:
    """Returns if MODEL_DIR holds no run with checkpoints, or this one.

    What does not change the meaning of the steps done so far may change (see `follow`); it is told.

    Raises:
      FolderError: the folder holds a run of another config; the difference is in the message.
    """
    path = Path(run.model_dir) / CONFIG
    text = config_file.text(run)
    if not path.exists() or not checkpoint.steps(run.model_dir) or path.read_text() == text:
        return
    before = path.read_text()
    try:
        followed = follow(config_file.from_text(before), run)
    except ValueError as error:
        raise FolderError(refusal(path, before, text, f"It cannot be read: {error}\n")) from error
    if followed != run:
        raise FolderError(refusal(path, config_file.text(followed), text))
    tell("Going on with a changed config:\n" + difference(before, text, path, context=0))


def write(run: config.Run, vocabularies: tuple) -> None:
    """What is needed to read the weights: the resolved config and both vocabularies."""
    replace(Path(run.model_dir) / CONFIG, config_file.text(run))
    data.save_pair(Path(run.model_dir) / VOCABULARY, *vocabularies)


def follow(saved: config.Run, run: config.Run) -> config.Run:
    """The saved run with the fields of `run` that may change when a run goes on.

    They are: the length of the run, what is logged, evaluated, decoded, saved and when, patience,
    the mesh, what the backward pass recomputes, and where the files are. (A longer run stretches a
    linear, cosine or wsd schedule; another mesh or recomputation changes roundings.)
    """
    take = lambda part, source, *names: dataclasses.replace(
        part, **{name: getattr(source, name) for name in names}
    )
    train = take(saved.train, run.train, *FREE_OF_TRAIN)
    data = take(saved.data, run.data, "cache_dir", "eval_split")
    free = ("model_dir", "evaluate", "checkpoint", "decode", "mesh")
    return dataclasses.replace(take(saved, run, *free), train=train, data=data)


def refusal(path: Path, before: str, text: str, why: str = "") -> str:
    return (
        f"{path.parent} holds the run of another config (- there, + asked for). Choose another "
        f"MODEL_DIR, or give the same config.\n{why}{difference(before, text, path, context=1)}"
    )


def difference(before: str, after: str, path: Path, context: int) -> str:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), str(path), "this run", lineterm="", n=context
    )
    return "\n".join(lines)
