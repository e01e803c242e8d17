# SPDX-License-Identifier: Apache-2.0
"""MODEL_DIR: one run, one process, one config."""

import contextlib
import dataclasses
import difflib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config, data, processes
from t5x_lite.checkpoints import manager, run_folder, sources, step_folders, text_settings
from t5x_lite.checkpoints.formats.huggingface import kept_fields
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.config import gin_file
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import explain_unwritable, is_address, parse_path

CONFIG = "config.gin"
LOCK = ".lock"
VOCABULARY = text_settings.VOCABULARY_FOLDER
# Seconds until other machines see what one has written: NFS refreshes after 30 by default.
VISIBLE_SECONDS = 40.0
CHANGEABLE_TRAIN_FIELDS = (
    "steps",
    "log_every",
    "tensorboard",
    "trackers",
    "callbacks",
    "max_consecutive_skips",
    "remat",
    "unroll",
)


class ModelDirError(ValueError):
    """MODEL_DIR cannot be used for this run; the message names the cause and a remedy."""


@contextlib.contextmanager
def lock_folder(model_dir: Path):
    """Locks MODEL_DIR for this process; the lock goes with the process, however it ends.

    Yields:
      A function that raises ModelDirError once another process has taken a bucket's lock over.

    Raises:
      ModelDirError: another process trains there, or the folder cannot be written.
    """
    if is_address(model_dir):
        with lock_address(model_dir) as check:
            yield check
        return
    check_writable(model_dir)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        file = open(model_dir / LOCK, "a+")
    except OSError as error:
        raise ModelDirError(f"MODEL_DIR {model_dir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ModelDirError(busy_message(model_dir, holder)) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield lambda: None


def check_writable(model_dir: Path) -> None:
    """Raises ModelDirError if nothing can be written to MODEL_DIR; makes nothing itself."""
    if is_address(model_dir):
        return
    if reason := explain_unwritable(model_dir):
        raise ModelDirError(f"MODEL_DIR {model_dir} cannot be written: {reason}")
    for name, is_folder in ((manager.FOLDER, True), (VOCABULARY, True), (LOCK, False)):
        path = Path(model_dir) / name
        if path.exists() and path.is_dir() != is_folder:
            kind = "a folder" if is_folder else "a file"
            raise ModelDirError(
                f"{path} is not {kind}, as a run writes it: move it away, or choose another "
                "MODEL_DIR"
            )


@contextlib.contextmanager
def lock_address(model_dir: Any):
    """`lock_folder` of a `RemotePath`."""
    from t5x_lite.utils.remote_lock import LockedError, RemoteLock

    def check() -> None:
        try:
            lock.check()
        except LockedError as error:
            raise ModelDirError(
                f"Another process ({error}) trains in {model_dir} now: this one, or the bucket, "
                "did not answer for a while. Nothing more is written here"
            ) from error

    lock = RemoteLock(model_dir)
    try:
        lock.acquire()
    except LockedError as error:
        raise ModelDirError(busy_message(model_dir, str(error))) from error
    except OSError as error:
        raise ModelDirError(f"MODEL_DIR {model_dir} cannot be written: {error.strerror}") from error
    with contextlib.closing(lock):
        yield check


def busy_message(model_dir: Path, holder: str) -> str:
    return (
        f"Another process ({holder}) trains in {model_dir}. Wait for it, stop it, or choose "
        "another MODEL_DIR."
    )


@contextlib.contextmanager
def lock_shared(model_dir: str | Path):
    """Locks MODEL_DIR for all processes of a run: the first one holds the lock.

    Yields:
      The function of `lock_folder`.

    Raises:
      ModelDirError: as `lock_folder`, or the processes do not see the same folder.
    """
    model_dir, first = parse_path(model_dir), processes.is_first()
    with lock_folder(model_dir) if first else contextlib.nullcontext(lambda: None) as check:
        check_shared(model_dir)
        yield check


def check_shared(model_dir: Path) -> None:
    """Raises ModelDirError unless every process sees what the first one wrote there."""
    content = processes.broadcast_text(read_holder(model_dir) if processes.is_first() else "")
    until = time.monotonic() + VISIBLE_SECONDS
    while not (visible := read_holder(model_dir) == content):
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    answers = processes.gather_texts(str(visible))
    apart = [str(process) for process, answer in enumerate(answers) if answer != "True"]
    if apart:
        raise ModelDirError(
            f"MODEL_DIR {model_dir} of process {', '.join(apart)} is not that of process 0: give a "
            "folder that all machines share (NFS, Filestore, gs://BUCKET/NAME)"
        )


def read_holder(model_dir: Any) -> str:
    """Text that names the process holding the lock of MODEL_DIR; "" where nobody has held it."""
    if is_address(model_dir):
        from t5x_lite.utils.remote_lock import read_owner

        return read_owner(model_dir)
    lock = model_dir / LOCK
    return lock.read_text() if lock.exists() else ""


def agree_on_config(run: config.Run, report: Callable[[str], None]) -> None:
    """Checks that all processes run the same config, and that MODEL_DIR fits it.

    Args:
      run: config of the run.
      report: is called with a text if the config has changed in a permitted way.

    Raises:
      ModelDirError: as `check_config`.
      ProcessesError: the configs differ.
    """
    processes.check_equal("The config", gin_file.to_text(run))
    if processes.is_first():
        check_config(run, report)


def check_config(run: config.Run, report: Callable[[str], None]) -> None:
    """Returns if MODEL_DIR holds no run with checkpoints, or this one.

    What does not change the meaning of the steps done so far may change (see `adopt_changes`).

    Args:
      run: config of the run.
      report: is called with the difference if such a field has changed.

    Raises:
      ModelDirError: the folder holds a run of another config; the difference is in the message.
    """
    path = parse_path(run.model_dir) / CONFIG
    text, steps = gin_file.to_text(run), step_folders.list_steps(run.model_dir)
    if not path.exists() or not steps:
        return
    try:
        bounded_files.check_regular(path, gin_file.MOST_BYTES)
        before = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ModelDirError(
            f"{path} cannot be read ({error}): copy it again from where the run was trained, or "
            "choose another MODEL_DIR"
        ) from error
    if before == text:
        check_saved_run(run, path.parent / manager.FOLDER / str(steps[-1]), report)
        return
    try:
        saved = gin_file.from_text(before)
        before, followed = gin_file.to_text(saved), adopt_changes(saved, run)  # in today's names
    except ValueError as error:
        raise ModelDirError(
            refusal_message(path, before, text, f"It cannot be read: {error}\n")
        ) from error
    if followed != run:
        raise ModelDirError(refusal_message(path, gin_file.to_text(followed), text))
    check_saved_run(run, path.parent / manager.FOLDER / str(steps[-1]), report)
    if before == text:
        return
    report("Going on with a changed config:\n" + config_difference(before, text, path, context=0))


def check_saved_run(run: config.Run, folder: Path, report: Callable[[str], None]) -> None:
    """Compares a run with what its newest checkpoint was saved with, in place of config.gin: that
    may have been edited, and the checkpoint may be another run's.

    Args:
      run: config of the run, which is that of config.gin.
      folder: the checkpoint that it would go on from.
      report: is called with the difference where the model is the same.

    Raises:
      ModelDirError: the weights are of another model.
    """
    saved = run_folder.read_saved_run(folder)
    if saved is None:
        return
    texts = gin_file.to_text(adopt_changes(saved, run)), gin_file.to_text(run)
    if texts[0] == texts[1]:
        return
    if changes := run_folder.list_changes(saved.model, run.model):
        raise ModelDirError(
            f"The checkpoint {folder} is of another model than {CONFIG} beside it: {changes}. "
            "Give the saved values in both configs, or choose another MODEL_DIR and name this one "
            "in INITIAL_CHECKPOINT_PATH"
        )
    report(
        f"Warning: the checkpoint {folder} was saved by a run of another config (- saved, + this "
        f"run):\n{config_difference(*texts, folder, context=0)}"
    )


def write_description(run: config.Run, vocabularies: tuple) -> None:
    """Writes what readers of the weights need: the resolved config, both vocabularies and the chat
    template of the checkpoint that these are from, and the fields that an export repeats.

    Once there are weights, what they depend on is left as it is, and the checkpoint that the run
    began with may be gone.
    """
    begins = data.run_vocabulary(run.model_dir) is None
    if begins:
        text = TextSettings(vocabularies, data.find_chat_template(not_none(run.data)))
        text_settings.write_vocabulary_folder(text, parse_path(run.model_dir) / VOCABULARY)
    write_atomically(parse_path(run.model_dir) / CONFIG, gin_file.to_text(run))
    if begins and run.checkpoint.initial is not None:
        source = sources.locate_source(run.checkpoint.initial, weights=False)
        kept = kept_fields.find_kept(source.path)
        kept_fields.save_kept(parse_path(run.model_dir), kept)


def read_report(path: Path, done: int) -> dict[str, Any] | None:
    """The report of a run of `done` steps; None if it was not written yet."""
    with contextlib.suppress(OSError, ValueError):
        report = bounded_files.read_json_object(path)
        return report if report.get("steps") == done else None
    return None


def adopt_changes(saved: config.Run, run: config.Run) -> config.Run:
    """The saved run with the fields of `run` that may change when a run goes on.

    They are: the length of the run, what is logged, evaluated, measured, decoded, saved and when,
    max_consecutive_skips, the mesh, what the backward pass recomputes, and where the files are.
    (A longer run stretches a linear, cosine or wsd schedule; another mesh or recomputation changes
    roundings.)
    """
    if saved.train is None or saved.data is None:  # a converted checkpoint, which did not train
        return saved
    train = take_fields(saved.train, run.train, CHANGEABLE_TRAIN_FIELDS)
    data = take_fields(saved.data, run.data, ("cache_dir", "eval_split"))
    data = dataclasses.replace(data, task=take_metrics(saved.data.task, not_none(run.data).task))
    changed = take_fields(saved, run, ("model_dir", "evaluate", "checkpoint", "decode", "mesh"))
    return dataclasses.replace(changed, train=train, data=data)


def take_metrics(to: Any, source: Any) -> Any:
    """A value of Data.task with the metrics of another one, which change no step."""
    if isinstance(to, config.TextSource) and type(source) is type(to):
        return dataclasses.replace(to, metrics=source.metrics)
    if isinstance(to, config.Mixture) and isinstance(source, config.Mixture):
        pairs = zip(to.tasks, source.tasks, strict=False)
        tasks = [take_metrics(*pair) for pair in pairs] + list(to.tasks[len(source.tasks) :])
        return dataclasses.replace(to, tasks=tuple(tasks))
    return to


def take_fields(to: Any, source: Any, names: Sequence[str]) -> Any:
    """Copies fields between two dataclasses of one type.

    Args:
      to: dataclass that the other fields come from.
      source: dataclass that the named fields come from.
      names: names of fields.
    """
    return dataclasses.replace(to, **{name: getattr(source, name) for name in names})


def refusal_message(path: Path, before: str, after: str, cause: str = "") -> str:
    """Message of a MODEL_DIR that holds the run of another config.

    Args:
      path: config.gin of MODEL_DIR.
      before: its text.
      after: text of this run's config.
      cause: lines to put before the difference.
    """
    difference = config_difference(before, after, path, context=1)
    return (
        f"{path.parent} holds the run of another config (- saved, + this run). Choose another "
        f"MODEL_DIR, or give the same config.\n{cause}{difference}"
    )


def config_difference(before: str, after: str, path: Path, context: int) -> str:
    """Unified diff of two configs.

    Args:
      before: text of the saved config.
      after: text of this run's config.
      path: file of the saved config.
      context: lines to show around a difference.
    """
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), str(path), "this run", lineterm="", n=context
    )
    return "\n".join(lines)
