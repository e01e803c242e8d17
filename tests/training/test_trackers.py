# SPDX-License-Identifier: Apache-2.0
"""Laws of Weights & Biases and MLflow as sinks of metrics: offline, resumed, without secrets."""

import importlib.util
import json
import math
import struct

import pytest
from test_callbacks import toy_run
from test_training_run import make_run, with_train

from t5x_lite.training import loop, model_dir, preflight
from t5x_lite.training.reporting import metric_writers, trackers

# Of LevelDB's log format: bytes of a block, kinds of a record that is whole, and of its last part.
BLOCK, FULL, LAST = 1 << 15, 1, 4
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """MODEL_DIR, with the environment of services that are files beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    values = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_TRACKING_TOKEN": SECRET,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return folder


def write_lines(folder, name: str, start, steps: dict[int, float]) -> list[str]:
    """Writes lines as a run does that goes on from `start`.

    Args:
      folder: MODEL_DIR.
      name: the tracker.
      start: step of the checkpoint; None for a new run.
      steps: loss by step.
    """
    reported: list[str] = []
    run = with_train(toy_run(), trackers=(name,))
    opened = trackers.make_trackers(folder, run, start)
    writer = metric_writers.MetricWriter(folder, False, start, reported.append, opened)
    for step, loss in steps.items():
        writer.write(step, {"loss": loss})
        writer.write(step, {"loss/[S2S] prefix": loss + 1}, "validation", {"f1": "failed"})
        writer.flush()
    writer.close()
    return reported


def without_secrets(folder) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return bool(files) and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses
def test_mlflow_goes_on_with_its_run(offline, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    assert write_lines(offline, "mlflow", None, {1: 2.0, 2: 1.5}) == []
    identity = trackers.read_ids(offline)["mlflow"]
    assert write_lines(offline, "mlflow", 2, {3: math.nan, 4: 1.0}) == []
    assert trackers.read_ids(offline) == {"mlflow": identity}
    client = MlflowClient()
    run = client.get_run(identity)
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "4"
    history = {each.step: each.value for each in client.get_metric_history(identity, "train/loss")}
    assert history.pop(3) != history and history == {1: 2.0, 2: 1.5, 4: 1.0}
    held_out = client.get_metric_history(identity, "validation/loss/_S2S_ prefix")
    assert [each.value for each in held_out if each.step < 3] == [3.0, 2.5]
    assert without_secrets(tmp_path)
    # A run that begins anew in the folder is another one.
    write_lines(offline, "mlflow", None, {1: 2.0})
    assert trackers.read_ids(offline)["mlflow"] != identity


@pytest.mark.slow
def test_wandb_goes_on_with_its_run(offline, tmp_path):
    wandb = pytest.importorskip("wandb")
    assert write_lines(offline, "wandb", None, {1: 2.0, 2: 1.5}) == []
    identity = trackers.read_ids(offline)["wandb"]
    assert write_lines(offline, "wandb", 2, {3: math.nan, 4: 1.0}) == []
    assert trackers.read_ids(offline) == {"wandb": identity}
    wandb.teardown()  # wandb's process may write the last lines after a run has ended
    files = sorted(offline.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    lines = [line for path in files for line in read_history(path)]
    losses = {line["_step"]: line["train/loss"] for line in lines}
    assert len(files) == 2 and list(losses) == [1, 2, 3, 4]
    assert [losses[step] for step in (1, 2, 4)] == [2.0, 1.5, 1.0]
    assert lines[0]["validation/loss/[S2S] prefix"] == 3.0
    assert without_secrets(tmp_path)


def read_history(path) -> list[dict]:
    """Logged values of an offline file of Weights & Biases: protobuf in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, at, lines, begun = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        # A header of checksum, length and kind does not cross blocks of 32 KiB.
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
        length, kind = struct.unpack_from("<HB", content, at + 4)
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (FULL, LAST):
            continue
        record, begun = wandb_internal_pb2.Record.FromString(begun), b""
        if record.WhichOneof("record_type") == "history":
            values = record.history.item
            names = [item.key or "/".join(item.nested_key) for item in values]
            texts = [json.loads(item.value_json) for item in values]
            lines.append(dict(zip(names, texts, strict=True)))
    return lines


def test_a_tracker_that_is_not_installed_is_refused_at_the_door(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = with_train(make_run(tmp_path, tmp_path / "run", steps=4), trackers=("wandb",))
    for refuse in (preflight.check_run, lambda run, report: loop.train(run)):
        with pytest.raises(
            ValueError, match=r"Train.trackers needs wandb: pip install .*\[wandb\]"
        ):
            refuse(run, print)
    assert not (tmp_path / "run/config.gin").exists()


def test_a_tracker_that_fails_ends_neither_the_run_nor_other_files(tmp_path, monkeypatch):
    class Failing:
        """A service that is not there."""

        def __init__(self, *arguments):
            raise ConnectionError("no route")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    reported = write_lines(tmp_path, "wandb", None, {1: 2.0, 2: 1.0})
    assert reported == [
        "wandb is not written any more (ConnectionError: no route); training goes on."
    ]
    assert metric_writers.read_metrics(tmp_path)["train/loss"] == {1: 2.0, 2: 1.0}


def test_a_slow_tracker_holds_no_save(tmp_path, monkeypatch):
    opened = []

    class Waiting:
        """A service that records what it gets."""

        def __init__(self, *arguments):
            opened.append(self)
            self.lines = []

        def write(self, step, values, failures):
            self.lines.append(step)

        def flush(self):
            pytest.fail("a save waits for a tracker")

        def close(self):
            self.lines.append("closed")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Waiting)
    run = with_train(toy_run(), trackers=("mlflow",))
    makers = trackers.make_trackers(tmp_path, run, None)
    writer = metric_writers.MetricWriter(tmp_path, False, None, print, makers)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    # The end of a run waits for the lines, and then the service's run ends.
    monkeypatch.setattr(Waiting, "flush", lambda self: None)
    writer.close()
    assert opened[0].lines == [1, "closed"]


def test_settings_are_flat_and_those_of_a_run_may_change():
    run = with_train(toy_run(), trackers=("mlflow",))
    settings = trackers.list_settings(run)
    assert settings["train.steps"] == 4 and settings["model.decoder.layers"] == 1
    assert settings["train.trackers"] == ("mlflow",) and "data" not in settings
    assert {"trackers", "callbacks"} <= set(model_dir.CHANGEABLE_TRAIN_FIELDS)
