# SPDX-License-Identifier: Apache-2.0
"""Laws of the files of metrics: no step twice, and no file that is dead or slow holds a run."""

import importlib
import io
import json
import threading

import pytest

from t5x_lite.training.reporting import metric_writers
from t5x_lite.training.reporting.metric_writers import BOARD, METRICS, MetricWriter


def write(path, start, steps, **options):
    writer = MetricWriter(path, True, start, **options)
    for step in steps:
        writer.write(step, {"loss": float(step), "skipped": 0})
    writer.close()


def board_steps(path) -> list[int]:
    """Steps that TensorBoard shows: purged where a later file began anew."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    steps: list[int] = []
    for file in sorted((path / BOARD).iterdir(), key=lambda file: file.stat().st_mtime_ns):
        records = io.BytesIO(file.read_bytes())
        while header := records.read(12):
            event = Event.FromString(records.read(int.from_bytes(header[:8], "little")))
            records.read(4)
            if event.session_log.status == SessionLog.START:
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    return steps


def line_steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / METRICS).read_text().splitlines()]


def test_a_run_that_goes_on_has_no_step_twice(tmp_path):
    write(tmp_path, None, range(1, 11))
    with open(tmp_path / METRICS, "a") as lines:
        lines.write('{"step": 11, "tra')  # as a kill leaves it
    write(tmp_path, 6, range(7, 10))
    assert line_steps(tmp_path) == list(range(1, 10))
    assert board_steps(tmp_path) == list(range(1, 10))


def test_a_new_run_keeps_what_one_before_it_wrote_under_other_names(tmp_path):
    for _ in range(3):
        write(tmp_path, None, [1, 2])
    assert line_steps(tmp_path) == board_steps(tmp_path) == [1, 2]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        METRICS,
        BOARD,
        "metrics-1.jsonl",
        "metrics-2.jsonl",
        *(f"{BOARD}-{i}" for i in (1, 2)),
    }


def test_reasons_are_recorded_beside_the_numbers(tmp_path):
    writer = MetricWriter(tmp_path, False, None)
    writer.write(4, {"loss": 1.0, "bad": float("nan")}, "validation", {"mine": "KeyError: 'a'"})
    writer.close()
    line = json.loads((tmp_path / METRICS).read_text())
    assert line["not_computed"] == {"validation/mine": "KeyError: 'a'"}
    assert line["validation/bad"] is None
    assert metric_writers.read_metrics(tmp_path)["validation/loss"] == {4: 1.0}


@pytest.mark.parametrize("line", ["[]", "3", '{"loss": 1}', '{"step": "x"}', '{"step": 1', "\x00"])
def test_lines_that_are_none_are_skipped(tmp_path, line):
    (tmp_path / METRICS).write_text(f'{{"step": 1, "train/loss": 2.5}}\n{line}\n')
    assert metric_writers.read_metrics(tmp_path) == {"train/loss": {1: 2.5}}


class DeadFile:
    """A file on a disk that takes no more."""

    def __init__(self, *_):
        self.lines = 0

    def write(self, *_):
        self.lines += 1
        if self.lines > 3:
            raise OSError(27, "File too large")

    def close(self):
        raise OSError(27, "File too large")


class HangingFile:
    """A file on a disk that does not answer."""

    release = threading.Event()

    def __init__(self, *_):
        pass

    def write(self, *_):
        self.release.wait()

    def close(self):
        pass


@pytest.mark.parametrize("name, file", [(METRICS, "JsonLines"), (BOARD, "EventFile")])
@pytest.mark.parametrize("kind", [DeadFile, HangingFile])
def test_a_dead_or_hanging_file_is_reported_once_and_dropped(
    tmp_path, monkeypatch, name, file, kind
):
    monkeypatch.setattr(metric_writers, file, kind)
    # The other file is given the time that a busy machine may need.
    monkeypatch.setattr(metric_writers, "FLUSH_SECONDS", 3.0)
    monkeypatch.setattr(metric_writers, "QUEUED", 80)
    monkeypatch.setattr(HangingFile, "release", threading.Event())
    # Beforehand: it imports boto3 where that is installed, which takes longer than the flush waits.
    importlib.import_module("tensorboardX")
    reports = []
    writer = MetricWriter(tmp_path, True, None, reports.append)
    for step in range(300):
        writer.write(step, {"loss": 1.0})
        if step % 50 == 49:
            # As before a checkpoint; the other file is not behind.
            writer.flush()
    writer.close()
    HangingFile.release.set()
    assert len(reports) == 1 and reports[0].startswith(name) and "training goes on" in reports[0]
    if name == BOARD:
        assert line_steps(tmp_path) == list(range(300))


def test_a_file_that_cannot_be_opened_is_dropped(tmp_path):
    (tmp_path / BOARD).write_text("in the way")
    (tmp_path / METRICS).mkdir()
    reports = []
    write(tmp_path, 3, range(4, 6), report=reports.append)
    assert sorted(text.split()[0] for text in reports) == [METRICS, BOARD]


def test_no_thread_is_left(tmp_path):
    before = set(threading.enumerate())
    write(tmp_path, None, [1])
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=300)
        assert not thread.is_alive()
