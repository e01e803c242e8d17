# SPDX-License-Identifier: Apache-2.0
"""Laws of signals and readers, on real processes: signals end a run, saved; readers cannot."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMPILE_QUICKLY, mark_exhaustive
from test_training_run import losses, make_run, started, wait_for_step

from t5x_lite import config
from t5x_lite.checkpoints import step_folders
from t5x_lite.config import gin_file
from t5x_lite.data import prefetching

UNMEASURED = config.Evaluate(examples=0, batches=0)
# The training command with a change of the process before it.
PROGRAM = """
import sys
{change}
from t5x_lite import train
sys.exit(train.main(sys.argv[1:]))
"""


def endless(path: Path, **train) -> config.Run:
    saving = config.Checkpoint(every=100_000)
    run = make_run(path, path / "run", 100_000, evaluate=UNMEASURED, checkpoint=saving)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


@contextlib.contextmanager
def changed(run: config.Run, text: Path, change: str, stderr=subprocess.PIPE):
    """The training command of a run, whose config is written to text, in a process of its own in
    which a change was made before it begins; stderr as of Popen."""
    text.write_text(gin_file.to_text(run))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(change=change), f"--gin_file={text}"],
        env=os.environ | {"XLA_FLAGS": COMPILE_QUICKLY, "JAX_PLATFORMS": "cpu"},
        stderr=stderr,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", mark_exhaustive([signal.SIGHUP, signal.SIGUSR1], kept=[signal.SIGUSR1])
)
def test_every_signal_that_would_end_the_process_saves_first(tmp_path, number):
    run = endless(tmp_path)
    with started(run, tmp_path / "run.gin") as process:
        wait_for_step(process, tmp_path / "run", 5)
        process.send_signal(number)
        output = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    (step,) = step_folders.list_steps(tmp_path / "run")
    assert f"{number.name}: saved step {step}" in output
    assert f"{number.name}: ending" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_reader_that_goes_away_and_a_hangup_that_is_ignored_end_nothing(tmp_path):
    run = endless(tmp_path)
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    reading, writing = os.pipe()
    with changed(run, tmp_path / "run.gin", ignore, stderr=writing) as process:
        os.close(writing)
        wait_for_step(process, tmp_path / "run", 2)
        os.close(reading)
        process.send_signal(signal.SIGHUP)
        # The next lines on stderr fail; the first one comes after seconds.
        time.sleep(3)
        wait_for_step(process, tmp_path / "run", max(losses(tmp_path / "run")) + 20)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert len(step_folders.list_steps(tmp_path / "run")) == 1


# A quota on the size of files, as of `ulimit -f`, which SIGXFSZ and EFBIG report.
QUOTA = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24576, resource.RLIM_INFINITY))"
)


@pytest.mark.slow
def test_a_quota_on_files_ends_the_logs_and_not_the_run(tmp_path):
    run = endless(tmp_path, tensorboard=True)
    metrics, board = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "tensorboard"
    with open(tmp_path / "log", "w") as log:
        with changed(run, tmp_path / "run.gin", QUOTA, stderr=log) as process:
            text, deadline = "", time.monotonic() + 240
            while text.count("training goes on") < 2 and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.1)
                text = (tmp_path / "log").read_text()
            process.send_signal(signal.SIGTERM)
            # Saved, or refused by the quota: ended in any case.
            assert process.wait(timeout=300) in (128 + signal.SIGTERM, 1)
    assert text.count("training goes on") == 2
    assert metrics.stat().st_size <= 24576 and board.is_dir()


# Reading of data, and a device, that never come back; from the lock no signal wakes.
HANGING_DATA = """
import threading
from t5x_lite.data import batches
at = batches.Batches.at
batches.Batches.at = lambda self, step: at(self, step) if step < 4 else threading.Event().wait()
"""
HANGING_DEVICE = """
import ctypes
from t5x_lite.training import loop
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
take = loop.Training.take_step
def hang(self, number, *rest):
    take(self, number, *rest)
    if number == 4:
        self.writer.flush()
        library.pthread_mutex_init(mutex, None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
loop.Training.take_step = hang
"""


@pytest.mark.slow
def test_a_signal_is_answered_while_data_are_waited_for(tmp_path):
    with changed(endless(tmp_path), tmp_path / "run.gin", HANGING_DATA) as process:
        wait_for_step(process, tmp_path / "run", 4)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert step_folders.list_steps(tmp_path / "run") == [4]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_hangs(tmp_path):
    with changed(endless(tmp_path), tmp_path / "run.gin", HANGING_DEVICE) as process:
        wait_for_step(process, tmp_path / "run", 4)
        for _ in range(2):
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM


class Dying:
    """Batches whose thread ends without a word."""

    def at(self, step):
        return step


def test_the_death_of_the_thread_that_reads_batches_is_noticed(monkeypatch):
    monkeypatch.setattr(prefetching, "LOOK", 0.05)
    monkeypatch.setattr(prefetching.Prefetch, "fill", lambda self, *_: None)
    batches = prefetching.prefetch(Dying(), 0, 3)
    with pytest.raises(RuntimeError, match="thread that reads batches"):
        next(batches)
