# SPDX-License-Identifier: Apache-2.0
"""Faults of disks, folders, data and clocks, tried on real training processes."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from conftest import COMPILE_QUICKLY
from test_training_run import losses, make_run, started, wait_for_step, with_train

from t5x_lite import config
from t5x_lite.checkpoints import checkpoint_io, manager, step_folders, train_state
from t5x_lite.config import gin_file
from t5x_lite.training import loop, preflight
from t5x_lite.utils.exit_status import FAILURE, MISTAKE

UNMEASURED = config.Evaluate(examples=0, batches=0)


def short(path: Path, name: str, steps: int, every: int = 5) -> config.Run:
    saving = config.Checkpoint(every=every, keep=3)
    return make_run(path, path / name, steps, evaluate=UNMEASURED, checkpoint=saving)


def ended(process: subprocess.Popen, status: int = FAILURE) -> str:
    """The message of a process that was refused or failed: one, and no traceback."""
    output = process.communicate(timeout=300)[1]
    assert process.returncode == status, output
    assert "Traceback" not in output
    (message,) = output.split("t5x_lite.train: error: ")[1:]
    return message


def refused(run: config.Run, text: Path) -> str:
    with started(run, text) as process:
        return ended(process, MISTAKE)


@contextlib.contextmanager
def lives(run: config.Run, text: Path, step: int):
    """A process of a run, whose config is in the file text, that has come to a step and goes on."""
    with started(run, text) as process:
        wait_for_step(process, Path(run.model_dir), step)
        assert process.poll() is None
        yield process


def digests(run: config.Run, step: int) -> dict:
    """Of every weight and of the optimizer."""
    return checkpoint_io.read_metadata(Path(run.model_dir) / "checkpoints" / str(step)).arrays


@pytest.mark.slow
def test_a_folder_that_vanishes_or_belongs_to_another_run_is_told(tmp_path):
    run = short(tmp_path, "run", steps=100_000)
    path = Path(run.model_dir)
    with lives(run, tmp_path / "run.gin", 12) as process:
        output = refused(run, tmp_path / "second.gin")
        assert (
            f"Another process (process {process.pid} on " in output and "choose another" in output
        )
        path.rename(tmp_path / "away")
        output = ended(process)
    assert "could not be written" in output and "goes on" in output
    assert f"{path} is empty or gone" in output
    assert not (path / "config.gin").exists()


def test_removed_checkpoints_are_told_and_training_saves_on(tmp_path):
    (tmp_path / "config.gin").write_text("")
    saved = manager.CheckpointManager(tmp_path, config.Checkpoint(keep=2))

    def begun():
        return train_state.begin_state({"weight": jnp.arange(4.0)}, optax.sgd(0.1))

    def save(step):
        return saved.save(
            begun()._replace(step=jnp.int32(step)), checkpoint_io.CheckpointMetadata(step, "config")
        )

    save(1)
    saved.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match="its checkpoints are lost"):
        save(2)
    saved.wait()
    assert step_folders.list_steps(tmp_path) == [2]
    (tmp_path / "config.gin").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(checkpoint_io.CheckpointError, match="was its disk unmounted"):
        save(3)


# Training with a limit on the size of files, and with a clock set twice a second, by hours.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from t5x_lite import train
sys.exit(train.main(sys.argv[2:]))
"""
JUMPING = """
import random, sys, time
now, quiet, draw = time.time, time.monotonic, random.Random(0)
jumps = [draw.uniform(-1e5, 1e5) for _ in range(10_000)]
time.time = lambda: now() + jumps[int(quiet() * 2) % len(jumps)]
time.time_ns = lambda: int(time.time() * 1e9)
from t5x_lite import train
sys.exit(train.main(sys.argv[1:]))
"""


def run_program(program: str, words: list[str], run: config.Run, text: Path) -> subprocess.Popen:
    text.write_text(gin_file.to_text(run))
    command = [sys.executable, "-c", program, *words, f"--gin_file={text}"]
    environment = os.environ | {"XLA_FLAGS": COMPILE_QUICKLY, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_told_and_the_run_goes_on_later(tmp_path):
    run = short(tmp_path, "run", steps=12)
    loop.train(with_train(run, steps=5))
    process = run_program(LIMITED, ["4096"], run, tmp_path / "run.gin")
    output = ended(process)
    assert "step 10 could not be written" in output or "File too large" in output
    assert "same command goes on" in output
    assert step_folders.list_steps(run.model_dir) == [5]
    loop.train(run)
    whole = dataclasses.replace(run, model_dir=str(tmp_path / "whole"))
    loop.train(whole)
    assert losses(Path(run.model_dir)) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path):
    run = with_train(short(tmp_path, "run", steps=12), tensorboard=True)
    process = run_program(JUMPING, [], run, tmp_path / "run.gin")
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 0, output
    assert "training goes on" not in output
    calm = dataclasses.replace(run, model_dir=str(tmp_path / "calm"))
    with started(calm, tmp_path / "calm.gin") as process:
        assert process.wait() == 0
    assert digests(run, 12) == digests(calm, 12)
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "run", Path("/proc/run")):
        run = dataclasses.replace(short(tmp_path, "run", steps=4), model_dir=str(where))
        with pytest.raises(ValueError, match=f"MODEL_DIR {where} cannot be written"):
            loop.train(run)


@pytest.mark.parametrize(
    "name, kind", [("checkpoints", "a folder"), ("vocabulary", "a folder"), (".lock", "a file")]
)
def test_a_part_of_another_kind_is_refused_by_the_dry_run_too(name, kind, tmp_path):
    run = short(tmp_path, "run", steps=4)
    path = Path(run.model_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if kind == "a file" else path.write_text("")
    for start in (loop.train, lambda run: preflight.check_run(run, print)):
        with pytest.raises(ValueError, match=f"{name} is not {kind}, as a run writes it"):
            start(run)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_data_file_that_changes_or_goes_is_refused_by_name(tmp_path, stream):
    run = short(tmp_path, "run", steps=8)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, stream=stream))
    train = Path(run.data.task.train)
    run = with_files(run, train=str(tmp_path / "train*.tsv"))
    loop.train(with_train(run, steps=4))
    before = train.read_text()
    train.write_text(before + "abc\tcba\n")
    with pytest.raises(ValueError, match=f"{train} has changed"):
        loop.train(run)
    train.rename(tmp_path / "other.tsv")
    with pytest.raises(ValueError, match=r"matches no file: .*train\*\.tsv"):
        loop.train(run)
    (tmp_path / "train2.tsv").write_text(before[:-12])
    with pytest.raises(ValueError, match=f"{train} is gone, .*train2.tsv is new"):
        loop.train(run)


def with_files(run: config.Run, **changes) -> config.Run:
    task = dataclasses.replace(run.data.task, **changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, task=task))


@pytest.mark.slow
def test_a_data_file_that_changes_while_a_stream_is_read_ends_the_run(tmp_path):
    run = short(tmp_path, "run", steps=100_000)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, stream=True))
    train = Path(run.data.task.train)
    appended = []

    def append(*_):
        if not appended:
            appended.append(train.write_text(train.read_text() + "abc\tcba\n"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "evaluate_first", append)
        with pytest.raises(ValueError, match=f"changed while they were read: {train} has changed"):
            loop.train(run)


@pytest.mark.slow
def test_a_run_killed_in_start_step_and_save_is_bitwise_the_same(tmp_path):
    whole, killed = (short(tmp_path, name, steps=60, every=3) for name in ("whole", "killed"))
    with started(whole, tmp_path / "whole.gin") as process:
        assert process.wait() == 0
    path = Path(killed.model_dir)

    def halves():
        return list((path / "checkpoints").glob(f"*{step_folders.UNFINISHED}*"))

    moments = {
        "data": lambda: (path / ".lock").exists(),
        "compile": lambda: (path / "vocabulary").exists(),
        "step": lambda: max(losses(path), default=0) >= 2,
        "save": lambda: halves() and len(step_folders.list_steps(path)) > 1,
    }
    for moment in moments.values():
        with started(killed, tmp_path / "killed.gin") as process:
            while process.poll() is None and not moment():
                time.sleep(0.001)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    with started(killed, tmp_path / "killed.gin") as process:
        assert process.wait() == 0
    assert digests(whole, 60) == digests(killed, 60)
    assert losses(Path(whole.model_dir)) == losses(path)
