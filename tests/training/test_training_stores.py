# SPDX-License-Identifier: Apache-2.0
"""Laws of runs whose MODEL_DIR is in a store: as on a disk, bit for bit, whatever fails."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import mark_exhaustive
from stores import SECRET
from test_processes import run_of, train
from test_training_run import make_run, started

from t5x_lite import config
from t5x_lite.checkpoints import checkpoint_io, manager, step_folders
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.training import loop
from t5x_lite.training import model_dir as folder
from t5x_lite.training.model_dir import ModelDirError
from t5x_lite.training.reporting import metric_writers
from t5x_lite.utils.paths import parse_path
from t5x_lite.utils.remote_lock import read_owner

UNMEASURED = config.Evaluate(examples=0, batches=0)
# test_remote_paths compares what paths do in both stores; a run adds nothing to that but time.
IN_S3, IN_GS = (
    pytest.mark.parametrize(
        "shared_store", mark_exhaustive(["s3", "gs"], kept=[one]), indirect=True
    )
    for one in ("s3", "gs")
)


def short(path: Path, model_dir: str, steps: int = 8, every: int = 2) -> config.Run:
    saving = config.Checkpoint(every=every, keep=2)
    run = make_run(path, Path("unused"), steps, evaluate=UNMEASURED, checkpoint=saving)
    return dataclasses.replace(run, model_dir=model_dir)


def digests(model_dir: str | Path, step: int) -> dict:
    """Of every weight and of the optimizer."""
    path = parse_path(model_dir) / "checkpoints" / str(step)
    return checkpoint_io.read_metadata(path).arrays


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory):
    """A run of eight steps, and the digests of its end."""
    path = tmp_path_factory.mktemp("disk")
    run = short(path, str(path / "run"))
    loop.train(run)
    return path, run, digests(run.model_dir, 8)


@pytest.mark.slow
@IN_S3
def test_a_run_in_a_store_leaves_what_one_on_a_disk_leaves(store, on_a_disk, capfd):
    path, on_disk, expected = on_a_disk
    run = dataclasses.replace(on_disk, model_dir=store.address("whole"))
    report = loop.train(run)
    assert digests(run.model_dir, 8) == expected
    assert step_folders.list_steps(run.model_dir) == [6, 8]
    root = parse_path(run.model_dir)
    assert json.loads((root / "report.json").read_text()) == report
    lines = metric_writers.read_metrics(root)["train/loss"]
    assert lines == metric_writers.read_metrics(Path(on_disk.model_dir))["train/loss"]
    assert (root / "learning_curve.png").stat().st_size > 1000
    weights, step = manager.load_params(run.model_dir)
    same, _ = manager.load_params(on_disk.model_dir)
    assert step == 8 and np.array_equal(weights["embedding"], same["embedding"])
    for output in (*capfd.readouterr(), *map(str, store.requests)):
        assert SECRET not in output
    everything = b"".join(each.read_bytes() for each in root.list_files())
    assert SECRET.encode() not in everything
    assert loop.train(run) == report


@pytest.mark.slow
@IN_GS
def test_a_killed_run_goes_on_in_a_store_bitwise(store, tmp_path):
    whole = short(tmp_path, str(tmp_path / "run"))
    # A process of its own, as the killed one is: it has other devices than the tests.
    with started(whole, tmp_path / "whole.gin") as process:
        assert process.wait(timeout=300) == 0, process.communicate()
    expected = digests(whole.model_dir, 8)
    run = dataclasses.replace(whole, model_dir=store.address("killed-run"))
    with started(run, tmp_path / "run.gin") as process:
        until = time.monotonic() + 300
        # In the midst of a checkpoint: its first object is there.
        while not any("/checkpoints/4/" in name for _, name in unquoted(store)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    steps = step_folders.list_steps(run.model_dir)
    assert all(step < 8 for step in steps)
    with started(run, tmp_path / "again.gin") as process:
        assert process.wait(timeout=300) == 0, process.communicate()
    assert digests(run.model_dir, 8) == expected
    lines = metric_writers.read_metrics(parse_path(run.model_dir))["train/loss"]
    assert lines == metric_writers.read_metrics(Path(whole.model_dir))["train/loss"]
    assert step_folders.list_steps(run.model_dir) == [6, 8]


def unquoted(store) -> list[tuple[str, str]]:
    return [(method, re.sub("%2F", "/", name, flags=re.I)) for method, name in [*store.requests]]


@pytest.mark.slow
@IN_GS
def test_a_second_process_is_refused(store, tmp_path):
    run = short(tmp_path, store.address("two"), steps=2)
    with folder.lock_folder(parse_path(run.model_dir)):
        with started(run, tmp_path / "run.gin") as process:
            output = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "Traceback" not in output
    assert f"Another process (process {os.getpid()} on " in output
    assert "choose another MODEL_DIR" in output


@pytest.mark.slow
@IN_S3
def test_two_processes_train_in_a_store_as_on_a_disk(store, tmp_path):
    mesh = config.Mesh(data=2, fsdp=2)
    run = run_of("encoder_decoder", tmp_path, steps=4, mesh=mesh, evaluate=UNMEASURED)
    there = dataclasses.replace(run, model_dir=store.address("shared"))
    train(run, 2, tmp_path)
    train(there, 2, tmp_path)
    assert digests(there.model_dir, 4) == digests(run.model_dir, 4)
    root = parse_path(there.model_dir)
    lines = metric_writers.read_metrics(root)["train/loss"]
    assert lines == metric_writers.read_metrics(Path(run.model_dir))["train/loss"]
    assert read_owner(root) != ""


def test_a_run_stops_before_it_writes_where_another_one_has_its_lock(store):
    with folder.lock_folder(parse_path(store.address("stolen"))) as check:
        check()
        parse_path(store.address("stolen/.lock/00000007")).write_bytes(b'{"owner": "process 7"}')
        until = time.monotonic() + 300
        with pytest.raises(ModelDirError, match=r"Another process \(process 7\) trains in"):
            while time.monotonic() < until:
                check()
                time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared_store, failure",
    mark_exhaustive(
        [(name, failure) for name in ("s3", "gs") for failure in ("503", "reset")],
        kept=[("s3", "503"), ("gs", "reset")],
    ),
    indirect=["shared_store"],
)
def test_a_store_that_fails_in_the_middle_costs_nothing(store, on_a_disk, failure):
    path, on_disk, expected = on_a_disk
    run = dataclasses.replace(on_disk, model_dir=store.address(f"fails-{failure}"))
    count = [0]

    def fails(method: str, name: str) -> str:
        # Not the lock: of a creation that is not answered nobody knows whether it was done.
        if ".lock" in name or "ifGenerationMatch=0" in name:
            return ""
        count[0] += 1
        return failure if count[0] % 9 == 0 and count[0] < 150 else ""

    with store.failing(fails):
        loop.train(run)
    assert digests(run.model_dir, 8) == expected and count[0] > 100


@pytest.mark.slow
@IN_GS
def test_a_store_that_takes_no_checkpoint_ends_the_run_with_its_state(store, on_a_disk):
    path, on_disk, expected = on_a_disk
    run = dataclasses.replace(on_disk, model_dir=store.address("refused"))

    def fails(method: str, name: str) -> str:
        written = method in ("PUT", "POST") and re.search(r"checkpoints(/|%2F)4", name)
        return "403" if written else ""

    with store.failing(fails), pytest.raises(checkpoint_io.CheckpointWriteError) as raised:
        loop.train(run)
    assert "step 2 is complete" in str(raised.value) and SECRET not in str(raised.value)
    assert step_folders.list_steps(run.model_dir) == [2]
    loop.train(run)
    assert digests(run.model_dir, 8) == expected


@pytest.mark.slow
def test_a_checkpoint_is_complete_at_its_last_object(store, on_a_disk):
    path, run, expected = on_a_disk
    copy = parse_path(store.address("copied-run"))
    copy.upload(Path(run.model_dir))
    # Copied from a disk as it is, as `gsutil cp -r` does.
    assert step_folders.list_steps(copy) == [6, 8]
    assert open_checkpoint(str(copy)).step == 8 and digests(copy, 8) == expected
    step = copy / "checkpoints" / "8"
    (step / step_folders.COMMITTED).unlink()
    assert step_folders.list_steps(copy) == [6]
    (step / step_folders.COMMITTED).write_text("")
    assert step_folders.list_steps(copy) == [6, 8]
    aside = step_folders.set_aside(copy / "checkpoints" / "6")
    assert aside.name == "6.damaged" and step_folders.list_steps(copy) == [8]
    assert step_folders.list_damaged(copy) == ["6.damaged"]
    step_folders.remove_from_store(step)
    assert step_folders.list_steps(copy) == [] and not step.exists()


@pytest.mark.slow
def test_damage_is_told_from_a_store_that_does_not_answer(store, on_a_disk):
    path, run, _ = on_a_disk
    copy = parse_path(store.address("damaged"))
    copy.upload(Path(run.model_dir))
    params = copy / "checkpoints" / "8" / "params"
    with store.failing(lambda method, name: "403" if "params" in name else ""):
        with pytest.raises(checkpoint_io.UnreadableCheckpointError, match="cannot be read now"):
            manager.load_params(copy)
    chunks = [each for each in params.list_files() if each.parent.name == "d"]
    for each in chunks:
        content = each.read_bytes()
        each.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="using the checkpoint before it"):
        assert manager.load_params(copy)[1] == 6


@pytest.mark.slow
@IN_S3
def test_signals_save_to_a_store(store, on_a_disk, tmp_path):
    run = short(tmp_path, store.address("signaled"), steps=100_000, every=100_000)
    with started(run, tmp_path / "run.gin") as process:
        until = time.monotonic() + 300
        metrics = parse_path(run.model_dir) / "metrics.jsonl"
        while not metrics.exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, process.communicate()
    (step,) = step_folders.list_steps(run.model_dir)
    assert max(metric_writers.read_metrics(metrics.parent)["train/loss"]) == step
