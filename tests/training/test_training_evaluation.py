# SPDX-License-Identifier: Apache-2.0
"""Laws of evaluation during training: nothing that it meets costs steps, and none is left out."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import mark_exhaustive
from test_training_run import make_run, with_train

from t5x_lite import config
from t5x_lite.checkpoints import checkpoint_io, manager, selection, step_folders
from t5x_lite.data.task import TaskScores
from t5x_lite.evaluation import metrics
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.training import loop
from t5x_lite.training.reporting import metric_writers

EVERY = config.Evaluate(every=2, examples=2, batches=1, batch_size=8, metrics=("exact_match",))


def run_of(path: Path, **changes) -> config.Run:
    options = {"evaluate": EVERY, "checkpoint": config.Checkpoint(every=2, keep=9)} | changes
    return make_run(path, path / "run", 4, **options)


def lines(run: config.Run) -> list[dict]:
    text = (Path(run.model_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_metric_that_fails_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    def broken(predictions, references):
        if len(predictions) > 1:
            raise KeyError("answers")
        return {"exact_match": 0.0}  # when it is asked for the names of its values

    monkeypatch.setitem(metrics.METRICS, "exact_match", broken)
    run = run_of(tmp_path, checkpoint=config.Checkpoint(every=2, keep=9, metric="exact_match"))
    report = loop.train(run)
    assert report["steps"] == 4 and report["loss"] > 0
    assert "KeyError" in report["not_computed"]["exact_match"]
    recorded = [line["not_computed"] for line in lines(run) if "not_computed" in line]
    assert len(recorded) == 2 and recorded[0].keys() == {"validation/exact_match"}
    assert step_folders.list_steps(run.model_dir) == [2, 4]
    assert capfd.readouterr().err.count("exact_match not computed: KeyError") == 2
    # A finished run is not evaluated again.
    assert loop.train(run) == report


@pytest.mark.slow
def test_files_beside_the_weights_that_cannot_be_written_end_no_run(tmp_path, monkeypatch, capfd):
    run = run_of(tmp_path)
    Path(run.model_dir).mkdir()
    (Path(run.model_dir) / "predictions").write_text("in the way")
    monkeypatch.setattr(loop.curves, "draw_learning_curve", lambda path: [][1])
    report = loop.train(with_train(run, steps=2))
    assert report["steps"] == 2 and "exact_match" in report
    assert "could not be written" in report["not_computed"]["predictions"]
    assert "no learning curve (IndexError" in capfd.readouterr().err


@pytest.mark.slow
def test_a_tasks_own_metrics_are_added_and_take_no_name_of_ours(tmp_path, monkeypatch):
    def score(self, predictions):
        return TaskScores({"loss": 9.0, "mine": 2.0}, {"other": "it has no value"})

    monkeypatch.setattr("t5x_lite.data.datasets.Dataset.score", score)
    monkeypatch.setattr(Evaluator, "uses_task_metrics", lambda self: True)
    run = run_of(tmp_path, evaluate=dataclasses.replace(EVERY, every=0, metrics=()))
    report = loop.train(with_train(run, steps=1))
    assert (report["mine"], report["task/loss"]) == (2.0, 9.0) and report["loss"] != 9.0
    assert report["not_computed"] == {"other": "it has no value"}


def fail_once(monkeypatch, at: int, error: Exception) -> None:
    """Makes the evaluation `at` a step raise an error, once, by monkeypatch."""
    measure, failed = Evaluator.__call__, []

    def call(self, params, step, on_progress=None):
        if step == at and not failed:
            failed.append(step)
            raise error
        return measure(self, params, step, on_progress)

    monkeypatch.setattr(Evaluator, "__call__", call)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, every", mark_exhaustive([(2, 100), (4, 4), (4, 100)], kept=[(2, 100), (4, 4)])
)
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(
    tmp_path, monkeypatch, at, every
):
    run = run_of(tmp_path, checkpoint=config.Checkpoint(every=every, keep=9))
    fail_once(monkeypatch, at, RuntimeError("the decoder broke"))
    with pytest.raises(RuntimeError, match="the decoder broke"):
        loop.train(run)
    assert step_folders.list_steps(run.model_dir) == [at]
    loop.train(run)
    notes = selection.readable_metadata(Path(run.model_dir) / "checkpoints")
    assert notes[4].metrics and notes[at].metrics
    steps = list(metric_writers.read_metrics(Path(run.model_dir))["validation/loss"])
    assert steps == [2, 4]
    assert [line["step"] for line in lines(run) if "train/loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_data_that_fail_cost_no_step(tmp_path, monkeypatch):
    run = run_of(tmp_path, checkpoint=config.Checkpoint(every=100))
    prefetch = loop.data.prefetch

    class Broken:
        def __init__(self, batches, start, stop):
            self.inner = prefetch(batches, start, stop)
            self.waited = 0.0

        def __next__(self):
            step, batch = next(self.inner)
            if step == 3:
                raise KeyError("of a preprocessor")
            return step, batch

        def close(self):
            self.inner.close()

    monkeypatch.setattr(loop.data, "prefetch", Broken)
    with pytest.raises(KeyError):
        loop.train(run)
    assert step_folders.list_steps(run.model_dir) == [3]


@pytest.mark.slow
def test_metrics_are_added_to_the_checkpoint_that_was_saved_before(tmp_path):
    best = config.Checkpoint(every=2, keep=1, metric="loss")
    run = run_of(tmp_path, checkpoint=best)
    loop.train(run)
    root = Path(run.model_dir) / "checkpoints"
    notes = selection.readable_metadata(root)
    measured = metric_writers.read_metrics(Path(run.model_dir))["validation/loss"]
    assert selection.best_step(notes) == min(measured, key=measured.get)
    assert {step: note.metrics["loss"] for step, note in notes.items()} == {
        step: measured[step] for step in notes
    }
    manager.load_params(run.model_dir, best=True)


@pytest.mark.slow
def test_a_kill_between_save_and_evaluation_leaves_no_gap(tmp_path):
    run = run_of(tmp_path)
    loop.train(run)
    whole = metric_writers.read_metrics(Path(run.model_dir))
    # As after a kill: the last checkpoint has no metrics, and nothing was written after it.
    root = Path(run.model_dir)
    note = checkpoint_io.read_metadata(root / "checkpoints" / "4")
    bare = dataclasses.replace(note, metrics={})
    checkpoint_io.write_metadata(root / "checkpoints" / "4", bare)
    kept = [line for line in lines(run) if not (line["step"] == 4 and "validation/loss" in line)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (root / "report.json").unlink()
    loop.train(run)
    again = metric_writers.read_metrics(root)
    assert again["validation/loss"] == whole["validation/loss"]
    assert checkpoint_io.read_metadata(root / "checkpoints" / "4").metrics == note.metrics
    # The other half: the checkpoint has them, the line is missing.
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    loop.train(with_train(run, steps=5))
    assert metric_writers.read_metrics(root)["validation/loss"][4] == whole["validation/loss"][4]


@pytest.mark.slow
def test_an_older_report_is_not_taken_for_that_of_a_longer_run(tmp_path):
    run = run_of(tmp_path, evaluate=config.Evaluate(examples=0, batches=0))
    loop.train(run)
    report = Path(run.model_dir) / "report.json"
    before = report.read_text()
    longer = with_train(run, steps=6)
    loop.train(longer)
    for content in (before, "", '{"steps": '):
        report.write_text(content)
        assert loop.train(longer)["steps"] == 6
        assert json.loads(report.read_text())["steps"] == 6


@pytest.mark.slow
def test_removed_checkpoints_leave_no_step_twice(tmp_path):
    run = run_of(tmp_path, evaluate=config.Evaluate(examples=0, batches=0))
    loop.train(run)
    shutil.rmtree(Path(run.model_dir) / "checkpoints" / "4")
    loop.train(run)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
