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
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_model
from test_training_run import make_run, wait_for_step, with_train

from t5x_lite import config, config_file, processes
from t5x_lite.training import checkpoint, folder, loop, records
from t5x_lite.training.folder import FolderError

DEVICES = 4
# Without LLVM's costly passes, as in conftest.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Held-out losses, and no text: decoding takes longer to compile than all the rest.
UNMEASURED = config.Evaluate(examples=0, batches=0)
SCORED = config.Evaluate(examples=0, batches=1, batch_size=8)


def run_of(layout: str, path: Path, steps: int, **changes) -> config.Run:
    run = make_run(path, path / "run", steps, **{"evaluate": SCORED} | changes)
    model = dataclasses.replace(toy_model(layout, layers=1), vocab=512, dropout=0.1)
    return dataclasses.replace(run, model=model)


@contextlib.contextmanager
def together(runs: list[config.Run], path: Path):
    """The training command in as many processes as there are runs, which share four devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--coordinator=localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": QUICK,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // len(runs)),
    }
    started = []
    try:
        for number, run in enumerate(runs):
            file = path / f"{number}.gin"
            file.write_text(config_file.text(run))
            command = [sys.executable, "-m", "t5x_lite.train", f"--gin_file={file}"]
            if len(runs) > 1:
                command += [meeting, f"--processes={len(runs)}", f"--process={number}"]
            told = dict(stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(command, env=environment, **told))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ended(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status of each, and what the command itself said at its end."""
    found = []
    for process in started:
        said = process.communicate(timeout=300)[1]
        assert "Traceback" not in said
        own = [line for line in said.splitlines() if line.startswith("t5x_lite.train:")]
        found.append((process.returncode, "\n".join(own) or said))
    return found


def train(run: config.Run, count: int, path: Path) -> None:
    with together([run] * count, path) as started:
        for status, said in ended(started):
            assert status == 0, said


def measured(run: config.Run) -> dict[str, dict[int, float]]:
    """What was recorded, but for times."""
    names = ("loss", "accuracy", "gradient_norm", "bits_per_byte", "exact_match", "padding")
    found = records.read(Path(run.model_dir))
    return {name: found[name] for name in found if name.split("/")[1] in names}


def assert_alike(found: config.Run, expected: config.Run) -> None:
    here, there = measured(found), measured(expected)
    assert here.keys() == there.keys()
    for name, values in there.items():
        assert here[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.slow
def test_two_processes_and_then_four_train_an_encoder_decoder_as_one(tmp_path):
    run = run_of("pair", tmp_path, steps=6, mesh=config.Mesh(data=2, fsdp=2))
    train(with_train(run, steps=3), 2, tmp_path)
    train(run, 4, tmp_path)
    nowhere_else = dict(model_dir=str(tmp_path / "alone"), mesh=config.Mesh())
    alone = dataclasses.replace(run, evaluate=dataclasses.replace(SCORED, every=3), **nowhere_else)
    loop.train(alone)
    assert_alike(run, alone)
    params, step = checkpoint.load_params(run.model_dir)
    assert step == 6 and np.isfinite(params["embedding"]).all()
    assert not list(Path(run.model_dir).glob("metrics-*"))


@pytest.mark.slow
def test_two_processes_that_share_every_row_train_a_decoder_as_one_which_goes_on(tmp_path):
    decoded = config.Evaluate(every=3, examples=4, batches=1, batch_size=8)
    run = run_of("joined", tmp_path, steps=6, mesh=config.Mesh(tensor=4), evaluate=decoded)
    train(with_train(run, steps=3), 2, tmp_path)
    run = dataclasses.replace(run, mesh=config.Mesh())
    loop.train(run)
    alone = dataclasses.replace(run, model_dir=str(tmp_path / "alone"))
    loop.train(alone)
    assert_alike(run, alone)


@pytest.mark.slow
def test_two_processes_that_each_have_half_of_every_row_train_as_one(tmp_path):
    run = run_of("pair", tmp_path, steps=3, mesh=config.Mesh(context=4))
    train(run, 2, tmp_path)
    nowhere_else = dict(model_dir=str(tmp_path / "alone"), mesh=config.Mesh())
    alone = dataclasses.replace(run, **nowhere_else)
    loop.train(alone)
    assert_alike(run, alone)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_a_signal_to_one_saves_in_all(tmp_path):
    saving = config.Checkpoint(every=5)
    run = run_of("pair", tmp_path, steps=100_000, checkpoint=saving, evaluate=UNMEASURED)
    path = Path(run.model_dir)
    with together([run, run], tmp_path) as started:
        wait_for_step(started[0], path, 12)
        started[1].kill()
        assert started[1].wait() == -signal.SIGKILL
        ((status, said),) = ended(started[:1])
    assert status == processes.TRY_AGAIN
    assert said.count("\n") == 0 and "lost" in said and "goes on" in said
    before = max(checkpoint.steps(path))
    with together([run, run], tmp_path) as started:
        wait_for_step(started[0], path, max(records.read(path)["train/loss"]) + 8)
        started[1].send_signal(signal.SIGTERM)
        assert [status for status, _ in ended(started)] == [128 + signal.SIGTERM] * 2
    saved = max(checkpoint.steps(path))
    assert saved > before and saved == max(records.read(path)["train/loss"])


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both_with_its_message(tmp_path):
    run = run_of("pair", tmp_path, steps=4)
    with together([run, dataclasses.replace(run, seed=1)], tmp_path) as started:
        for status, said in ended(started):
            assert status == processes.REFUSED
            assert said.count("\n") == 0 and "The config of process 1 differ" in said
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
    file.write_text(config_file.text(run_of("pair", tmp_path, steps=4)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--coordinator=localhost:{free.getsockname()[1]}"
    words = [f"--gin_file={file}", meeting, "--processes=2", f"--process={process}"]
    command = [sys.executable, "-c", ALONE, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == processes.TRY_AGAIN
    assert done.stderr.count("\n") == 1 and "have not come at localhost" in done.stderr


def flags(*given: str) -> processes.Meeting | None:
    parser = argparse.ArgumentParser()
    processes.add(parser)
    return processes.meeting(parser.parse_args(given))


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


def test_places_with_several_processes_are_recognised(tmp_path):
    found = lambda **environment: processes.surroundings(environment, tmp_path)
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
    assert found() is None
    assert found(**slurm, SLURM_NTASKS="2") == "slurm"
    assert found(**slurm, SLURM_NTASKS="1") is None
    assert found(SLURM_JOB_ID="7", SLURM_NTASKS="2") is None  # outside of srun
    assert found(TPU_WORKER_HOSTNAMES="a,b") == "tpu"
    assert found(TPU_WORKER_HOSTNAMES="a") is None
    assert found(TPU_WORKER_HOSTNAMES="a", MEGASCALE_COORDINATOR_ADDRESS="b") == "tpu"
    assert found(KUBERNETES_SERVICE_HOST="x", JOB_COMPLETION_INDEX="0") == "kubernetes"
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "vendor").write_text("0x1ae0\n")
    assert found() == "tpu"
    assert found(JAX_PLATFORMS="cpu") is None


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
    watch = processes.Watch("command", board)
    clock = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    for second in range(0, 200, 10):
        clock[0] = float(second)
        watch.put("beat/0", str(second))
        if second <= 100:
            watch.put("beat/1", str(second))
        end = watch.why(watch.board())
        assert (end is not None) == (second > 100 + processes.LOST)
    assert end.status == processes.TRY_AGAIN and "process 1 of 2 is lost" in end.text
    watch.put("ended/1", "1 Train.steps must be at least 1")
    end = watch.why(watch.board())
    assert end == (1, "process 1 ended: Train.steps must be at least 1")


def test_another_folder_of_the_same_name_is_no_shared_one(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("process 1 on here")
    folder.check_shared(tmp_path)
    monkeypatch.setattr(folder, "VISIBLE", 0.0)
    monkeypatch.setattr(processes, "from_first", lambda text: "process 1 on another machine")
    with pytest.raises(FolderError, match="all machines share"):
        folder.check_shared(tmp_path)
