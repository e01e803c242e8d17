# SPDX-License-Identifier: Apache-2.0
"""Laws of several processes, on real ones: they train as one does, and end together."""

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import COMPILE_QUICKLY, mark_exhaustive, toy_model
from test_training_run import make_run, wait_for_step, with_train

from t5x_lite import config, processes
from t5x_lite.checkpoints import manager, step_folders
from t5x_lite.config import gin_file
from t5x_lite.training import loop, model_dir
from t5x_lite.training.model_dir import ModelDirError
from t5x_lite.training.reporting import metric_writers
from t5x_lite.utils.exit_status import MISTAKE, TRY_AGAIN

DEVICES = 4
# Held-out losses, and no text: decoding takes longer to compile than all the rest.
UNMEASURED = config.Evaluate(examples=0, batches=0)
TRAIN = ["-m", "t5x_lite.train"]
SCORED = config.Evaluate(examples=0, batches=1, batch_size=8)


def run_of(layout: str, path: Path, steps: int, **changes) -> config.Run:
    run = make_run(path, path / "run", steps, **{"evaluate": SCORED} | changes)
    model = dataclasses.replace(toy_model(layout, layers=1), vocab=512, dropout=0.1)
    return dataclasses.replace(run, model=model)


@contextlib.contextmanager
def together(runs: list[config.Run], path: Path, programs: Sequence[list[str]] = (TRAIN, TRAIN)):
    """The training command in as many processes as there are runs, which share four devices.

    Args:
      runs: config of each process.
      path: folder for their .gin files.
      programs: arguments of Python for each of the first processes; the others train.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--coordinator=localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": COMPILE_QUICKLY,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // len(runs)),
    }
    started = []
    try:
        for number, run in enumerate(runs):
            file = path / f"{number}.gin"
            file.write_text(gin_file.to_text(run))
            program = programs[number] if number < len(programs) else TRAIN
            command = [sys.executable, *program, f"--gin_file={file}"]
            if len(runs) > 1:
                command += [meeting, f"--processes={len(runs)}", f"--process={number}"]
            pipes = dict(stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(command, env=environment, **pipes))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ended(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status of each, and what the command itself said at its end."""
    collected = []
    for process in started:
        output = process.communicate(timeout=300)[1]
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("t5x_lite.train:")]
        collected.append((process.returncode, "\n".join(errors) or output))
    return collected


def train(run: config.Run, count: int, path: Path) -> None:
    with together([run] * count, path) as started:
        for status, output in ended(started):
            assert status == 0, output


def measured(run: config.Run) -> dict[str, dict[int, float]]:
    """Recorded metrics, without times."""
    names = ("loss", "accuracy", "gradient_norm", "bits_per_byte", "exact_match", "padding")
    collected = metric_writers.read_metrics(Path(run.model_dir))
    return {name: collected[name] for name in collected if name.split("/")[1] in names}


def assert_alike(run: config.Run, expected: config.Run) -> None:
    here, there = measured(run), measured(expected)
    assert here.keys() == there.keys()
    for name, values in there.items():
        assert here[name] == pytest.approx(values, rel=1e-5), name


# Four start no code that two do not.
@pytest.mark.slow
@pytest.mark.parametrize("later", mark_exhaustive([2, 4], kept=[2]))
def test_processes_train_an_encoder_decoder_as_one_which_goes_on(tmp_path, later):
    run = run_of("encoder_decoder", tmp_path, steps=6, mesh=config.Mesh(data=2, fsdp=2))
    train(with_train(run, steps=3), 2, tmp_path)
    train(run, later, tmp_path)
    nowhere_else = dict(model_dir=str(tmp_path / "alone"), mesh=config.Mesh())
    alone = dataclasses.replace(run, evaluate=dataclasses.replace(SCORED, every=3), **nowhere_else)
    loop.train(alone)
    assert_alike(run, alone)
    params, step = manager.load_params(run.model_dir)
    assert step == 6 and np.isfinite(params["embedding"]).all()
    assert not list(Path(run.model_dir).glob("metrics-*"))


@pytest.mark.slow
def test_two_processes_that_share_every_row_train_a_decoder_as_one_which_goes_on(tmp_path):
    decoded = config.Evaluate(every=3, examples=4, batches=1, batch_size=8)
    run = run_of("decoder_only", tmp_path, steps=6, mesh=config.Mesh(tensor=4), evaluate=decoded)
    train(with_train(run, steps=3), 2, tmp_path)
    run = dataclasses.replace(run, mesh=config.Mesh())
    loop.train(run)
    alone = dataclasses.replace(run, model_dir=str(tmp_path / "alone"))
    loop.train(alone)
    assert_alike(run, alone)


@pytest.mark.slow
def test_two_processes_that_each_have_half_of_every_row_train_as_one(tmp_path):
    run = run_of("encoder_decoder", tmp_path, steps=3, mesh=config.Mesh(context=4))
    train(run, 2, tmp_path)
    nowhere_else = dict(model_dir=str(tmp_path / "alone"), mesh=config.Mesh())
    alone = dataclasses.replace(run, **nowhere_else)
    loop.train(alone)
    assert_alike(run, alone)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_a_signal_to_one_saves_in_all(tmp_path):
    saving = config.Checkpoint(every=5)
    run = run_of("encoder_decoder", tmp_path, steps=100_000, checkpoint=saving, evaluate=UNMEASURED)
    path = Path(run.model_dir)
    with together([run, run], tmp_path) as started:
        wait_for_step(started[0], path, 12)
        started[1].kill()
        assert started[1].wait() == -signal.SIGKILL
        ((status, output),) = ended(started[:1])
    assert status == TRY_AGAIN
    assert output.count("\n") == 0 and "lost" in output and "goes on" in output
    before = max(step_folders.list_steps(path))
    with together([run, run], tmp_path) as started:
        wait_for_step(started[0], path, max(metric_writers.read_metrics(path)["train/loss"]) + 8)
        started[1].send_signal(signal.SIGTERM)
        assert [status for status, _ in ended(started)] == [128 + signal.SIGTERM] * 2
    saved = max(step_folders.list_steps(path))
    assert saved > before and saved == max(metric_writers.read_metrics(path)["train/loss"])


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both_with_its_message(tmp_path):
    run = run_of("encoder_decoder", tmp_path, steps=4)
    with together([run, dataclasses.replace(run, seed=1)], tmp_path) as started:
        for status, output in ended(started):
            assert status == MISTAKE
            assert output.count("\n") == 0 and "The config of process 1 differ" in output
    assert not (tmp_path / "run" / "config.gin").exists()


ALONE = """
import sys
from t5x_lite import processes, train
processes.MEET = 1
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_to_which_nobody_comes_says_so(tmp_path, process):
    file = tmp_path / "run.gin"
    file.write_text(gin_file.to_text(run_of("encoder_decoder", tmp_path, steps=4)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--coordinator=localhost:{free.getsockname()[1]}"
    words = [f"--gin_file={file}", meeting, "--processes=2", f"--process={process}"]
    command = [sys.executable, "-c", ALONE, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == TRY_AGAIN
    assert done.stderr.count("\n") == 1 and "have not come at localhost" in done.stderr


def flags(*arguments: str) -> processes.Rendezvous | None:
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    return processes.parse_rendezvous(parser.parse_args(arguments))


def test_all_flags_of_a_meeting_are_needed_and_checked():
    whole = ("--coordinator=localhost:1234", "--processes=2", "--process=1")
    assert flags(*whole) == ("localhost:1234", 2, 1)
    assert flags("--coordinator=localhost:1234", "--processes=1", "--process=0") is None
    with pytest.raises(processes.ProcessesError, match="--processes, --process missing"):
        flags(whole[0])
    with pytest.raises(processes.ProcessesError, match="not HOST:PORT"):
        flags("--coordinator=localhost", *whole[1:])
    with pytest.raises(processes.ProcessesError, match=r"not in 0\.\.1"):
        flags(*whole[:2], "--process=2")


def test_places_with_several_processes_are_recognized(tmp_path):
    def collected(**environment):
        return processes.detect_cluster(environment, tmp_path)

    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
    assert collected() is None
    assert collected(**slurm, SLURM_NTASKS="2") == "slurm"
    assert collected(**slurm, SLURM_NTASKS="1") is None
    assert collected(SLURM_JOB_ID="7", SLURM_NTASKS="2") is None  # outside of srun
    assert collected(TPU_WORKER_HOSTNAMES="a,b") == "tpu"
    assert collected(TPU_WORKER_HOSTNAMES="a") is None
    assert collected(TPU_WORKER_HOSTNAMES="a", MEGASCALE_COORDINATOR_ADDRESS="b") == "tpu"
    assert collected(KUBERNETES_SERVICE_HOST="x", JOB_COMPLETION_INDEX="0") == "kubernetes"
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "vendor").write_text("0x1ae0\n")
    assert collected() == "tpu"
    assert collected(JAX_PLATFORMS="cpu") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's abstract sockets")
def test_two_processes_of_one_index_are_refused_at_once():
    def claim(process, coordinator=f"localhost:{'8' * 200}"):
        return processes.claim_index(processes.Rendezvous(coordinator, 3, process))

    with claim(1), claim(2), claim(1, "elsewhere:8476"):
        with pytest.raises(processes.ProcessesError, match=r"--process=1 .*runs on this machine"):
            with claim(1):
                pass
    with claim(1), processes.claim_index(processes.Rendezvous()):
        pass


class Board:
    """The coordinator's board, without a coordinator."""

    def __init__(self):
        self.written: dict[str, str] = {}
        self.client, self.process_id, self.num_processes = self, 0, 2

    def key_value_set(self, name, value, allow_overwrite=False):
        self.written[name] = value

    def key_value_dir_get(self, beginning):
        return [(name, value) for name, value in self.written.items() if name.startswith(beginning)]


def test_a_process_without_sign_of_life_is_lost_and_one_that_ended_is_quoted(monkeypatch):
    board = Board()
    watchdog = processes.Watchdog("command", board)
    clock = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    for second in range(0, 200, 10):
        clock[0] = float(second)
        watchdog.put("beat/0", str(second))
        if second <= 100:
            watchdog.put("beat/1", str(second))
        end = watchdog.find_end(watchdog.board())
        assert (end is not None) == (second > 100 + processes.LOST)
    assert end.status == TRY_AGAIN and "process 1 of 2 is lost" in end.text
    watchdog.put("ended/1", "1 Train.steps must be at least 1")
    end = watchdog.find_end(watchdog.board())
    assert end == (1, "process 1 ended: Train.steps must be at least 1")


def test_another_folder_of_the_same_name_is_no_shared_one(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("process 1 on here")
    model_dir.check_shared(tmp_path)
    monkeypatch.setattr(model_dir, "VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr(processes, "broadcast_text", lambda text: "process 1 on another machine")
    with pytest.raises(ModelDirError, match="all machines share"):
        model_dir.check_shared(tmp_path)
