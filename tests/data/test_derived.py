# SPDX-License-Identifier: Apache-2.0
"""Laws of Model.vocab and Model.dtype where no config binds them: data and device decide."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub_server
import pytest

from t5x_lite import config, data, processes
from t5x_lite.config import gin_file
from t5x_lite.data import derived
from t5x_lite.training import host
from t5x_lite.utils import hub_errors

LINES = """
include "runs/common.gin"
include "models/t5_tiny.gin"
MODEL_DIR = "runs/mine"
TRAIN_STEPS = 2
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {"inputs": 32, "targets": 32}
MIXTURE_OR_TASK_NAME = "stdlib_docstrings"
config.Schedule.kind = "constant"
config.Schedule.peak = 0.001
"""

CANVAS = """
INITIAL_CHECKPOINT_PATH = "g2p"
config.Model.canvas = @config.Canvas()
config.Canvas.block = 4
"""


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "run.gin"
    file.write_text(LINES + f'MODEL_DIR = "{tmp_path}/run"\n')
    return str(file)


def save(path: str, *bindings: str) -> None:
    """Leaves a MODEL_DIR as a run of these bindings does."""
    run = gin_file.load_run(path, bindings)
    (Path(run.model_dir) / "checkpoints/1").mkdir(parents=True)
    (Path(run.model_dir) / "config.gin").write_text(gin_file.to_text(run))


def test_vocab_is_the_vocabulary_rounded_up_unless_bound(path):
    # Bytes, three special ids and 100 sentinels.
    (pair,) = {vocabulary.size for vocabulary in data.open_vocabularies(data.load_run(path).data)}
    assert (pair, data.load_run(path).model.vocab) == (359, 384)
    assert data.load_run(path, ["config.Model.vocab=500"]).model.vocab == 500
    with pytest.raises(gin_file.ConfigError, match="bind 'vocab'"):
        gin_file.load_run(path)
    with pytest.raises(ValueError, match="bind vocab. The run has no data"):
        data.load_run(path, ["config.Run.data=None"])
    with pytest.raises(ValueError, match="did you mean stdlib_docstrings"):
        data.load_run(path, ["MIXTURE_OR_TASK_NAME=stdlib_docstring"])


@pytest.mark.parametrize("sizes, vocab", [((1, 128), 128), ((129, 1), 256), ((3, 300), 384)])
def test_vocab_covers_both_vocabularies(path, monkeypatch, sizes, vocab):
    pair = [SimpleNamespace(size=size) for size in sizes]
    monkeypatch.setattr(derived, "open_vocabularies", lambda cfg: pair)
    assert data.load_run(path).model.vocab == vocab


def test_dtype_is_that_of_the_device_unless_bound(path):
    run = data.load_run(path)
    assert host.with_device_dtype(run, [path], []).model.dtype == "float32"
    bound = ["config.Model.dtype=bfloat16"]
    run = data.load_run(path, bound)
    assert host.with_device_dtype(run, [path], bound).model.dtype == "bfloat16"
    preset = ["configs/runs/quickstart.gin"]
    run = data.load_run(preset)
    assert host.with_device_dtype(run, preset, []) is run == gin_file.load_run(preset)


def test_a_run_that_goes_on_keeps_what_it_was_saved_with(path):
    saved = ["config.Model.vocab=512", "config.Model.dtype=bfloat16"]
    save(path, *saved)
    run = host.with_device_dtype(data.load_run(path), [path], [])
    assert run == gin_file.load_run(path, saved)
    old = ["config.Model.activations=float32", "config.Model.vocab=512"]
    run = host.with_device_dtype(data.load_run(path, old), [path], old)
    assert run.model.dtype == "float32"  # the old name binds it too


def test_a_run_that_begins_with_a_checkpoint_may_bind_a_canvas(tmp_path):
    path = tmp_path / "canvas.gin"
    path.write_text(LINES.replace('include "models/t5_tiny.gin"\n', "") + CANVAS)
    model = derived.load_run(str(path)).model
    assert model.canvas == config.Canvas(4)
    assert dataclasses.replace(model, canvas=None) == derived.open_model("g2p")


def test_a_config_of_a_saved_run_names_both(path):
    run = host.with_device_dtype(data.load_run(path), [path], [])
    text = gin_file.to_text(run)
    assert "config.Model.vocab = 384" in text and "config.Model.dtype = 'float32'" in text
    assert gin_file.from_text(text) == run


def test_libtpu_is_quiet_on_a_machine_without_a_tpu(tmp_path):
    code = "from t5x_lite.training import host; host.prepare_jax(); import jax; jax.devices()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "TPU", "XLA"))}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")


AGREE = """
import sys
from t5x_lite import processes
from t5x_lite.data import derived
meeting = processes.Rendezvous(sys.argv[1], 2, int(sys.argv[2]))
with processes.process_group(meeting, "test"):
    for name in ("owner/moving", "owner/absent"):
        try:
            print(derived.agree_on_commit(name))
        except ValueError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_processes_agree_on_the_commit_of_a_branch_that_moves(tmp_path, monkeypatch):
    commits = []

    def move(handler):
        answer = find_answer(handler)
        commits.append(handler.hub.add("owner/moving", {"a": b"%d" % len(commits)}))
        return answer

    find_answer = hub_server.Handler.find_answer
    monkeypatch.setattr(hub_server.Handler, "find_answer", move)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    with hub_server.HubServer() as served:
        commits.append(served.add("owner/moving", {"a": b""}))
        environment = os.environ | served.environment(tmp_path)
        pipes = dict(env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        command = [sys.executable, "-c", AGREE, where]
        started = [subprocess.Popen([*command, str(number)], **pipes) for number in range(2)]
        outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    lines = {output.strip() for output, _ in outputs}
    (first, second) = lines.pop().splitlines()
    assert lines == set() and first == f"owner/moving@{commits[0]}"
    assert second.startswith("HubError There is no owner/absent here and no model")
    assert [each.path for each in served.served] == [
        "/api/models/owner/moving",
        "/api/models/owner/absent",
    ]


def test_every_process_ends_with_the_status_of_the_first(monkeypatch):
    answer = json.dumps({"error": "cannot be reached", "kind": "HubUnreachable"})
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "broadcast_text", lambda text: answer)
    with pytest.raises(hub_errors.HubUnreachable, match="cannot be reached"):
        derived.agree_on_commit("owner/name")
