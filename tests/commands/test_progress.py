# SPDX-License-Identifier: Apache-2.0
"""Laws of progress: a bar on a terminal, else a line at times; a sum at the end."""

import io

import pytest
from rich.console import Console

from t5x_lite.cli.progress import Progress, stderr_console, waiting


def test_progress_is_a_line_at_times_and_a_sum_at_the_end(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress("lines", 50, start=10) as progress:
        for done in range(11, 51):
            clock[0] += 1.0
            progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["lines 13/50  1.0/s  ETA 0:37", "lines 34/50  1.0/s  ETA 0:16"]
    assert lines[2:] == ["50 lines in 0:40, 1.0/s"]
    with pytest.raises(KeyError), Progress("lines", None) as progress:
        clock[0] += 100.0
        progress(5)
        raise KeyError
    assert capsys.readouterr().err == "lines 5  0.1/s\n"


def test_progress_on_a_terminal_is_a_bar_that_is_taken_away_after_an_error():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with pytest.raises(KeyError), Progress("step", 9, console=console) as progress:
        progress.advance(4)
        progress.show("loss 3.5")
        progress.bar.refresh()
        raise KeyError
    text = screen.getvalue()
    assert "4/9" in text and "loss 3.5" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    assert not stderr_console(quiet=True).is_terminal


def test_the_rate_is_that_of_the_last_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress("step", 1000)
    assert progress.seconds_left() is None
    clock[0] += 60.0  # compiling
    for done in range(1, 101):
        progress.advance(done)
        assert progress.seconds_left() is None or done > 1
        clock[0] += 0.01
    assert progress.seconds_left() == pytest.approx(9.0)
    with progress.pause():
        clock[0] += 300.0  # an evaluation
    progress.advance(101)
    assert progress.seconds_left() == pytest.approx(8.99)
    for done in range(102, 112):
        clock[0] += 10.0
        progress.advance(done)
    assert progress.seconds_left() == pytest.approx(8890.0)


def test_what_is_waited_for_is_shown_while_it_is_waited_for(capsys):
    with waiting(stderr_console(), "Compiling"):
        assert capsys.readouterr().err == "Compiling ...\n"
