# SPDX-License-Identifier: Apache-2.0
"""benchmarks/device.py: no second of a lent GPU is lost, and all of it runs without one."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def device(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import device

    return device


class Clock:
    """A clock that stands still but for cases, each of which takes all of its time.

    Attributes:
      now: seconds.
      cases: those that ran, with the seconds that they had.
    """

    def __init__(self, device, monkeypatch):
        self.now, self.cases = 0.0, []
        monkeypatch.setattr(device.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(device, "run_case", self.run)
        self.row = device.report.Row

    def run(self, case, seconds, rehearse):
        """A row of a case.

        Args:
          case: which.
          seconds: that it has.
          rehearse: unused.
        """
        self.cases.append((case, seconds))
        self.now += seconds
        note = "did not end" if case.name == "ceilings" else ""
        system = "case" if note else "t5x_lite"
        return [self.row(case.key, system, "seconds", None if note else seconds, note)]


def options(device, **changes) -> argparse.Namespace:
    fields = dict(only=list(device.STAGES), rehearse=False, again=False)
    return argparse.Namespace(**fields | changes)


def test_it_stops_before_its_limit_and_goes_on_where_it_was(device, monkeypatch, tmp_path):
    clock, path = Clock(device, monkeypatch), tmp_path / "device.json"
    device.measure_all(device.Record(path), options(device), ending=560)
    assert clock.now <= 560
    first = [case.key for case, _ in clock.cases]
    assert first[0] == "machine: ceilings" and len(set(first)) == len(first)
    spent = dict.fromkeys(device.STAGES, 0.0)
    for case, seconds in clock.cases:
        assert seconds <= case.seconds
        spent[case.stage] += seconds
    assert all(spent[stage] for stage in ("correctness", "training", "attention", "decoding"))

    device.measure_all(device.Record(path), options(device), ending=clock.now + 300)
    again = [case.key for case, _ in clock.cases][len(first) :]
    assert again and not set(again) & set(first)
    rows = json.loads(path.read_text())["rows"]
    assert [row["of"] for row in rows] == [*first, *again]


def test_a_stage_leaves_its_time_to_others_and_takes_no_more_at_first(
    device, monkeypatch, tmp_path
):
    clock = Clock(device, monkeypatch)
    device.measure_all(device.Record(tmp_path / "x.json"), options(device), ending=10_000)
    assert {case.key for case, _ in clock.cases} == {case.key for case in device.CASES}
    spent, over = dict.fromkeys(device.STAGES, 0.0), []
    for case, seconds in clock.cases:
        spent[case.stage] += seconds
        over.append(spent[case.stage] > device.STAGES[case.stage])
    # The budgets hold until each stage has had its own.
    assert over == sorted(over) and over[-1]


def test_what_failed_is_tried_again_only_with_again(device, monkeypatch, tmp_path):
    clock, path = Clock(device, monkeypatch), tmp_path / "device.json"
    for again in (False, False, True):
        only = options(device, only=["machine"], again=again)
        device.measure_all(device.Record(path), only, ending=clock.now + 100)
    assert [case.name for case, _ in clock.cases] == ["ceilings", "ceilings"]


def test_a_case_that_does_not_end_is_ended_with_a_note(device):
    case = device.Case("machine", "ceilings", 1, {})
    (row,) = device.run_case(case, 0.2, rehearse=True)
    assert row.note.startswith("did not end")


def test_a_case_that_fails_says_why(device):
    case = device.Case("machine", "no such case", 1, {})
    (row,) = device.run_case(case, 60, rehearse=True)
    assert row.note.startswith("ended with 1") and "StopIteration" in row.note


def test_all_that_the_package_needs_is_there_or_carried(device):
    needed = device.dependencies()
    assert {*device.PRESENT, *device.UNUSED} <= needed.keys()
    assert not set(device.PRESENT) & set(device.UNUSED)
    assert device.carried() == [needed["gin-config"]]
    assert device.tree_bytes() < device.LARGEST


def test_cases_have_names_of_their_own_and_every_stage_has_a_rehearsal(device):
    keys = [case.key for case in device.CASES]
    assert len(set(keys)) == len(keys)
    rehearsed = {case.stage for case in device.CASES if case.tiny is not None}
    assert rehearsed == device.STAGES.keys()


@pytest.mark.slow
@pytest.mark.exhaustive  # A dozen processes, each of which compiles: two minutes.
def test_the_whole_script_runs_without_a_gpu(tmp_path):
    path = tmp_path / "device.json"
    command = [sys.executable, ROOT / "benchmarks/device.py", "--rehearse", "--json", path]
    done = subprocess.run([*command, "--limit", "400"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if "WRONG" in row.get("note", "")]
    metrics = {row.get("metric") for row in rows}
    wanted = {"deviation", "sequences/s", "milliseconds", "GB/s", "tokens/s, plain:1", "TFLOP/s"}
    assert wanted <= metrics
