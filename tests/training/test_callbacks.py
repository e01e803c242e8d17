# SPDX-License-Identifier: Apache-2.0
"""Laws of a user's callbacks: when they are called, and that they change and end nothing."""

import sys
import time
from pathlib import Path

import pytest
from test_training_run import make_run, with_train

from t5x_lite import config, processes
from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.training import callbacks, loop, preflight
from t5x_lite.training.callbacks import Callback, CallbackList, RunMoment
from t5x_lite.training.reporting import metric_writers

HERE = __name__
CALLS: list[tuple] = []


class Empty(Callback):
    """Overrides nothing."""


class Recorder(Callback):
    """Records every call."""

    def before_step(self, moment):
        CALLS.append(("before", moment.step))

    def after_step(self, moment):
        CALLS.append(("after", moment.step, moment.values()))

    def after_evaluation(self, moment, values, failures):
        CALLS.append(("evaluation", moment.step, values["loss"]))

    def after_save(self, moment, step, folder):
        # Complete: its metadata can be read.
        CALLS.append(("save", step, checkpoint_io.read_metadata(folder).step))

    def at_end(self, moment, report):
        CALLS.append(("end", moment.step, report["loss"]))


class Broken(Callback):
    """Fails in its second step, and spoils what it is given."""

    def after_step(self, moment):
        moment.params.clear()
        if moment.step == 2:
            raise ZeroDivisionError("of the user")

    def after_evaluation(self, moment, values, failures):
        values.clear()


class Exiting(Callback):
    """Ends the process, it believes."""

    def before_step(self, moment):
        sys.exit("enough")


class Slow(Callback):
    """Takes 20 ms."""

    def after_step(self, moment):
        time.sleep(0.02)


class Everywhere(Recorder):
    """Is called in every process."""

    every_process = True


class Unwilling(Callback):
    """Refuses to be made."""

    def __init__(self, run):
        raise RuntimeError("not with this config")


def named(*kinds) -> tuple[str, ...]:
    return tuple(f"{HERE}.{kind.__name__}" for kind in kinds)


def toy_run(*kinds) -> config.Run:
    train = config.Train(steps=4, batch_size=4, callbacks=named(*kinds))
    stack = config.Stack(layers=1, embed=8, heads=1, head_dim=8, mlp=8)
    return config.Run("unused", config.Model(vocab=384, decoder=stack), train=train)


def listed(*kinds):
    """Callbacks of a run, and what they have reported."""
    lines: list[str] = []
    return CallbackList(toy_run(*kinds), lines.append), lines


def moment(step: int = 1) -> RunMoment:
    return RunMoment(toy_run(), step, {"w": 1})


def test_a_callback_that_fails_is_reported_once_and_called_no_more():
    active, lines = listed(Broken, Exiting, Recorder)
    CALLS.clear()
    active.call("after_step", moment(2))
    assert "The callback test_callbacks.Broken failed in after_step at step 2 (" in lines[0]
    assert "ZeroDivisionError: of the user" in lines[0] and "training goes on" in lines[0]
    active.call("before_step", moment(2))
    assert "Exiting failed in before_step" in lines[1] and len(lines) == 2
    for _ in range(2):
        active.call("after_step", moment(2))
        active.call("before_step", moment(2))
    assert len(lines) == 2 and list(active.active) == list(named(Recorder))
    # Those behind the failing one were called all the same.
    assert [call[0] for call in CALLS] == ["after", "before"] + ["after", "before"] * 2


def test_a_signal_passes_through_a_callback(monkeypatch):
    active, lines = listed(Recorder)
    monkeypatch.setattr(Recorder, "before_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        active.call("before_step", moment())
    assert not lines and list(active.active)


def interrupt(self, moment):
    raise KeyboardInterrupt


def test_a_slow_callback_is_reported_once_with_its_time(monkeypatch):
    monkeypatch.setattr(callbacks, "SLOW", 0.01)
    active, lines = listed(Slow)
    for _ in range(3):
        active.call("after_step", moment())
    assert len(lines) == 1 and "s for the callback test_callbacks.Slow in after_step" in lines[0]
    assert active.seconds["test_callbacks.Slow"] >= 0.06


def test_a_run_listens_only_where_a_method_is_overridden():
    active, _ = listed(Empty, Broken)
    heard = {"before_step", "after_step", "after_evaluation", "after_save", "at_end"}
    assert {name for name in heard if active.listens(name)} == {"after_step", "after_evaluation"}
    assert not any(map(listed()[0].listens, heard))


def test_process_0_alone_is_called_unless_a_class_says_otherwise(monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    assert list(listed(Recorder, Everywhere)[0].active) == list(named(Everywhere))


@pytest.mark.parametrize(
    "names, message",
    [
        (("no_such_module.Watch",), "no_such_module.Watch cannot be imported (ModuleNotFoundError"),
        (("test_callbacks.Missing",), "test_callbacks.Missing cannot be imported (AttributeError"),
        (("Watch",), "Watch cannot be imported"),
        (("subprocess.Popen",), "subprocess.Popen is not a class derived from"),
        (("test_callbacks.toy_run",), "test_callbacks.toy_run is not a class"),
        (("failing_callbacks.Watch",), "cannot be imported (NameError"),
        (named(Unwilling), "Unwilling cannot be made: RuntimeError: not with this config"),
    ],
    ids=["module", "name", "bare", "class", "function", "failing", "unwilling"],
)
def test_what_is_no_callback_is_refused_before_anything_runs(tmp_path, monkeypatch, names, message):
    (tmp_path / "failing_callbacks.py").write_text("undefined\n")
    monkeypatch.chdir(tmp_path)
    run = with_train(toy_run(), callbacks=names)
    with pytest.raises(ValueError) as raised:
        CallbackList(run, print)
    assert message in str(raised.value)


def test_a_module_of_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_watching.py").write_text(
        "from t5x_lite.training.callbacks import Callback\nclass Watch(Callback): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert list(callbacks.import_callbacks(("my_watching.Watch",))) == ["my_watching.Watch"]


def test_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="Train.callbacks has a name twice"):
        toy_run(Empty, Empty)


def test_a_dry_run_imports_them_too(tmp_path):
    run = make_run(tmp_path, tmp_path / "run", steps=4)
    run = with_train(run, callbacks=("no_such_module.Watch",))
    with pytest.raises(ValueError, match="no_such_module.Watch cannot be imported"):
        preflight.check_run(run, print)


@pytest.mark.slow
def test_a_run_with_callbacks_has_the_bits_of_one_without(tmp_path, monkeypatch, capfd):
    def run_with(name: str, *kinds):
        run = make_run(
            tmp_path,
            tmp_path / name,
            steps=4,
            evaluate=config.Evaluate(every=2, examples=0, batches=1, batch_size=8),
            checkpoint=config.Checkpoint(every=2, keep=1),
        )
        report = loop.train(with_train(run, callbacks=named(*kinds)))
        return report, checkpoint_io.read_metadata(tmp_path / name / "checkpoints/4")

    CALLS.clear()
    plain, saved = run_with("plain")
    # An empty callback asks for no values: none are fetched for it.
    with monkeypatch.context() as patch:
        patch.setattr(RunMoment, "values", lambda moment: pytest.fail("nobody asked"))
        empty, saved_empty = run_with("empty", Empty)
    watched, saved_watched = run_with("watched", Recorder, Broken)
    assert saved.arrays == saved_empty.arrays == saved_watched.arrays
    assert saved.metrics == saved_empty.metrics == saved_watched.metrics
    assert plain["loss"] == empty["loss"] == watched["loss"]
    assert "callback_seconds" not in plain and set(empty["callback_seconds"]) == set(named(Empty))
    assert "Broken failed in after_step at step" in capfd.readouterr().err
    logged = metric_writers.read_metrics(Path(tmp_path, "watched"))
    for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
        values = {call[1]: call[2][name] for call in CALLS if call[0] == "after"}
        assert values == pytest.approx(logged[f"train/{name}"], rel=1e-6)
    assert [call[:2] for call in CALLS] == [
        *[("before", 0), ("after", 1), ("before", 1), ("after", 2)],
        ("evaluation", 2),
        *[("before", 2), ("after", 3), ("before", 3), ("after", 4)],
        ("save", 2),
        ("evaluation", 4),
        ("save", 4),
        ("end", 4),
    ]
    assert all(call[1] == call[2] for call in CALLS if call[0] == "save")
    assert CALLS[-1][2] == CALLS[-3][2] == watched["loss"]
