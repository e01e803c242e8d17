# SPDX-License-Identifier: Apache-2.0
"""Faults of real runs of two processes: each goes on, and ends as the run that had none."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
from test_faults import JUMPING, LIMITED, digests
from test_processes import TRAIN, UNMEASURED, ended, run_of, together, train
from test_training_run import losses, wait_for_step

from t5x_lite import config
from t5x_lite.checkpoints import step_folders
from t5x_lite.utils.exit_status import FAILURE, MISTAKE, TRY_AGAIN

STEPS, HELD = 30, 12
# Each process has a clock of its own.
CLOCKS = [["-c", JUMPING], ["-c", JUMPING.replace("Random(0)", "Random(1)")]]
# Training that waits before a step while a file exists, and soon misses a silent process.
HELD_PROGRAM = f"""
import sys, time
from pathlib import Path
from t5x_lite import processes, train
from t5x_lite.training import loop
file, take_step, processes.LOST = Path(sys.argv[1]), loop.Training.take_step, 5.0
def wait(training, number, *rest):
    while number == {HELD} and file.exists():
        time.sleep(0.01)
    return take_step(training, number, *rest)
loop.Training.take_step = wait
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> config.Run:
    """A finished run without a fault, whose weights lie in both processes."""
    path = tmp_path_factory.mktemp("calm")
    saving = config.Checkpoint(every=3, keep=3)
    options = dict(mesh=config.Mesh(fsdp=4), checkpoint=saving, evaluate=UNMEASURED)
    run = run_of("decoder_only", path, steps=STEPS, **options)
    train(run, 2, path)
    return run


def beside(calm: config.Run, path: Path) -> config.Run:
    return dataclasses.replace(calm, model_dir=str(path / "faulty"))


def assert_same(run: config.Run, calm: config.Run) -> None:
    assert digests(run, STEPS) == digests(calm, STEPS)
    assert losses(Path(run.model_dir)) == losses(Path(calm.model_dir))
    assert step_folders.list_steps(run.model_dir) == step_folders.list_steps(calm.model_dir)


def kill_while_saving(run: config.Run, path: Path, victim: int, programs: list) -> None:
    """Kills one process while a checkpoint is half written, after one that is whole.

    Args:
      run: config of both.
      path: folder for their .gin files.
      victim: which is killed.
      programs: arguments of Python for each.
    """
    folder = Path(run.model_dir) / "checkpoints"
    before = max(step_folders.list_steps(run.model_dir), default=0)
    with together([run, run], path, programs) as started:
        while started[victim].poll() is None:
            halves = list(folder.glob(f"*{step_folders.UNFINISHED}*"))
            if halves and max(step_folders.list_steps(run.model_dir), default=0) > before:
                break
            time.sleep(0.001)
        started[victim].kill()
        assert started[victim].wait() == -signal.SIGKILL
        other = started[1 - victim]
        output = other.communicate(timeout=300)[1]
        # JAX itself ends those that lost the coordinator, in its own words.
        assert other.returncode != 0 and (victim == 0 or other.returncode == TRY_AGAIN), output
        assert "Traceback" not in output
    assert max(step_folders.list_steps(run.model_dir)) < STEPS


# A minute of several processes. test_faults has the kill and the clocks of one process,
# test_processes the end of the others.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_killed_while_saving_and_clocks_that_jump_change_nothing(tmp_path, calm):
    run = beside(calm, tmp_path)
    kill_while_saving(run, tmp_path, victim=1, programs=CLOCKS)
    with together([run, run], tmp_path, CLOCKS) as started:
        assert [status for status, _ in ended(started)] == [0, 0]
    assert_same(run, calm)


@pytest.mark.exhaustive
def test_the_first_process_killed_while_saving_changes_nothing(tmp_path, calm):
    run = beside(calm, tmp_path)
    kill_while_saving(run, tmp_path, victim=0, programs=[TRAIN, TRAIN])
    train(run, 2, tmp_path)
    assert_same(run, calm)


@pytest.mark.exhaustive
def test_a_disk_that_takes_no_more_from_one_process_ends_both(tmp_path, calm):
    run = beside(calm, tmp_path)
    for limited in (1, 0):
        programs = [TRAIN, TRAIN]
        programs[limited] = ["-c", LIMITED, "8192"]
        with together([run, run], tmp_path, programs) as started:
            for status, output in ended(started):
                assert status == FAILURE and "could not be written" in output, output
    train(run, 2, tmp_path)
    assert_same(run, calm)


@pytest.mark.exhaustive
def test_a_host_that_is_silent_is_lost(tmp_path, calm):
    run = beside(calm, tmp_path)
    pause = tmp_path / "pause"
    pause.touch()
    with together([run, run], tmp_path, [["-c", HELD_PROGRAM, str(pause)]] * 2) as started:
        wait_for_step(started[0], Path(run.model_dir), HELD)
        started[1].send_signal(signal.SIGSTOP)
        ((status, output),) = ended(started[:1])
        assert status == TRY_AGAIN and "process 1 of 2 is lost" in output
    train(run, 2, tmp_path)
    assert_same(run, calm)


@pytest.mark.exhaustive
def test_a_second_start_in_one_folder_is_refused_and_disturbs_nothing(tmp_path, calm):
    run = beside(calm, tmp_path)
    pause, second = tmp_path / "pause", tmp_path / "second"
    pause.touch()
    second.mkdir()
    with together([run, run], tmp_path, [["-c", HELD_PROGRAM, str(pause)]] * 2) as first:
        wait_for_step(first[0], Path(run.model_dir), HELD)
        with together([run, run], second) as started:
            for status, output in ended(started):
                assert status == MISTAKE
                assert f"Another process (process {first[0].pid} on " in output
        pause.unlink()
        assert [status for status, _ in ended(first)] == [0, 0]
    assert_same(run, calm)
