# SPDX-License-Identifier: Apache-2.0
"""Laws of a whole run: its folder, its end, its interruptions."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import COMPILE_QUICKLY, mark_exhaustive, toy_model

from t5x_lite import config
from t5x_lite.checkpoints import manager, selection, step_folders
from t5x_lite.checkpoints.checkpoint_io import CheckpointError
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config import gin_file
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import loop, setup
from t5x_lite.training import model_dir as folder
from t5x_lite.training.model_dir import ModelDirError
from t5x_lite.training.reporting import metric_writers

LETTERS = "abcdefgh"


def write_task(path: Path) -> config.Files:
    """Words and themselves backwards."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list(LETTERS), 5)) for _ in range(300)]
    for name, part in (("train", words[:280]), ("validation", words[280:])):
        lines = [f"{word}\t{word[::-1]}" for word in part]
        (path / f"{name}.tsv").write_text("\n".join(["inputs\ttargets", *lines]) + "\n")
    return config.Files(
        name="backwards",
        train=str(path / "train.tsv"),
        validation=str(path / "validation.tsv"),
        inputs="inputs",
        vocabulary=config.Vocabulary("bytes"),
    )


def make_run(path: Path, model_dir: Path, steps: int, **changes) -> config.Run:
    model = dataclasses.replace(
        toy_model("encoder_decoder", layers=1, heads=2),
        vocab=512,
        dropout=changes.pop("dropout", 0.1),
    )
    return config.Run(
        model_dir=str(model_dir),
        model=model,
        data=config.Data(
            task=write_task(path), lengths={"inputs": 16, "targets": 16}, cache_dir=str(path / "c")
        ),
        train=config.Train(steps=steps, batch_size=8, log_every=1, tensorboard=False),
        schedule=config.Schedule("constant", 0.01),
        **{
            "evaluate": config.Evaluate(examples=4, batches=1, batch_size=8),
            "checkpoint": config.Checkpoint(every=4),
            "decode": config.Decode(max_new_tokens=8),
        }
        | changes,
    )


def with_train(run: config.Run, **changes) -> config.Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that came to its end, and its report."""
    path = tmp_path_factory.mktemp("finished")
    run = make_run(path, path / "run", steps=4)
    return run, loop.train(run)


@pytest.mark.slow
def test_a_run_leaves_everything_that_is_promised(finished):
    run, report = finished
    path = Path(run.model_dir)
    for name in ("config.gin", "vocabulary", "metrics.jsonl", "learning_curve.png"):
        assert (path / name).exists()
    assert json.loads((path / "report.json").read_text()) == report
    for name in ("exact_match", "loss", "train_seconds", "total_seconds"):
        assert report[name] >= 0
    assert report["target_tokens_per_second"] > 0
    assert step_folders.list_steps(path) == [4]
    values = metric_writers.read_metrics(path)
    assert list(values["train/loss"]) == [1, 2, 3, 4]
    assert list(values["validation/loss"]) == [4]
    assert 0 < values["train/padding"][1] < 1
    assert gin_file.from_text((path / "config.gin").read_text()) == run


@pytest.mark.slow
def test_a_finished_run_says_so_and_is_left_as_it_is(finished, capfd):
    run, report = finished
    assert loop.train(run) == report
    assert "finished" in capfd.readouterr().err


def test_another_config_is_refused_with_the_difference(finished):
    run, _ = finished
    other = dataclasses.replace(run, schedule=config.Schedule("constant", 0.02))
    with pytest.raises(ModelDirError, match=r"(?s)-.*peak = 0.01.*\+.*peak = 0.02"):
        loop.train(other)
    with pytest.raises(ModelDirError, match="another config"):
        loop.train(dataclasses.replace(run, seed=1))


def test_a_model_that_was_not_trained_is_refused_where_both_configs_name_it(finished, tmp_path):
    run, _ = finished
    shutil.copytree(run.model_dir, tmp_path / "run")
    norm = {"norm": "rms_plus_one"}
    other = dataclasses.replace(run.model, decoder=dataclasses.replace(run.model.decoder, **norm))
    edited = dataclasses.replace(run, model=other, model_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "config.gin").write_text(gin_file.to_text(edited))
    with pytest.raises(ModelDirError, match="Stack.norm = 'rms_plus_one', saved as 'rms'"):
        loop.train(edited)


def test_a_checkpoint_of_another_run_is_reported(finished, tmp_path):
    run, _ = finished
    shutil.copytree(run.model_dir, tmp_path / "run")
    other = dataclasses.replace(run, seed=7, model_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "config.gin").write_text(gin_file.to_text(other))
    output = []
    folder.check_config(other, output.append)
    assert "checkpoints/4 was saved by a run of another config" in output[0]
    assert "-config.Run.seed = 0" in output[0] and "+config.Run.seed = 7" in output[0]


def test_vocabularies_of_another_run_are_warned_about(finished, tmp_path, recwarn):
    run, _ = finished
    shutil.copytree(run.model_dir, tmp_path / "run")
    open_checkpoint(tmp_path / "run")
    assert not [each for each in recwarn if "are not those" in str(each.message)]
    other = vocabularies.ByteVocabulary(extra_ids=7)
    vocabularies.save_pair(tmp_path / "run" / "vocabulary", other, other)
    with pytest.warns(UserWarning, match="run/vocabulary are not those that step 4 was trained"):
        open_checkpoint(tmp_path / "run")


def test_permitted_changes_are_reported(finished):
    run, _ = finished
    output = []
    longer = with_train(run, steps=9, log_every=2, max_consecutive_skips=3)
    longer = dataclasses.replace(longer, mesh=config.Mesh(fsdp=2), model_dir=run.model_dir)
    folder.check_config(longer, output.append)
    assert "config.Train.steps = 9" in output[0]


def test_a_folder_without_checkpoint_takes_any_config(finished, tmp_path):
    run, _ = finished
    (tmp_path / "config.gin").write_text(gin_file.to_text(run))
    folder.check_config(dataclasses.replace(run, seed=7, model_dir=str(tmp_path)), print)


def test_two_runs_in_one_folder_are_refused(finished):
    run, _ = finished
    with folder.lock_folder(Path(run.model_dir)):
        with pytest.raises(ModelDirError, match=f"process {os.getpid()}"):
            loop.train(run)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"# caf\xe9\n", 3 * 10**6 * b"#"])
def test_a_config_that_is_no_text_is_named(content, finished, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run.model_dir, tmp_path / "copy")
    (copy / "config.gin").write_bytes(content)
    with pytest.raises(ModelDirError, match="copy/config.gin cannot be read"):
        folder.check_config(dataclasses.replace(run, model_dir=str(copy)), print)


@pytest.mark.parametrize("size, near", [(12, "8 or 16"), (7, "8")])
def test_a_batch_that_the_mesh_cannot_split_is_refused_before_compiling(size, near, tmp_path):
    run = with_train(make_run(tmp_path, tmp_path / "run", steps=4), batch_size=size)
    with pytest.raises(ValueError, match=rf"multiple of 8.*Near ones: {near}$"):
        loop.train(run)
    assert not (tmp_path / "run" / "config.gin").exists()


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    run = make_run(tmp_path, tmp_path / "run", steps=4)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=100))
    with pytest.raises(ValueError, match=r"259 ids, but Model.vocab is 100.*384 or more$"):
        loop.train(run)
    begun = dataclasses.replace(run, checkpoint=config.Checkpoint(initial="there"))
    with pytest.raises(ValueError, match=r"384 or more\. .*t5x_lite.adapt .*--names .*--sentinels"):
        setup.check_vocabulary_sizes(begun, (vocabularies.ByteVocabulary(),))


def test_a_metric_that_is_not_measured_cannot_name_the_best(finished, tmp_path):
    run, _ = finished
    run = dataclasses.replace(
        run,
        model_dir=str(tmp_path / "run"),
        checkpoint=config.Checkpoint(metric="exact_mach", initial=run.model_dir),
    )
    with pytest.raises(ValueError, match="did you mean exact_match"):
        loop.train(with_train(run, steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_goes_on_gives_the_losses_of_one_that_never_stopped(tmp_path, stream):
    nothing = config.Evaluate(examples=0, batches=0)
    run = make_run(tmp_path, tmp_path / "whole", steps=7, evaluate=nothing)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, stream=stream))
    loop.train(run)
    parts = dataclasses.replace(run, model_dir=str(tmp_path / "parts"))
    for steps in (3, 5, 7):
        loop.train(with_train(parts, steps=steps))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


BART = """
from __gin__ import dynamic_registration
from t5x_lite import config

include "models/bart.gin"

config.Stack.layers = 1
config.Stack.embed = 16
config.Stack.heads = 2
config.Stack.head_dim = 8
config.Stack.mlp = 32
config.Stack.max_length = 16
config.Model.vocab = 512
config.Model.dtype = "float32"
config.Run.model = @config.Model()
"""


# A BART is another model, not another run: test_training_step compares its steps.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_bart_learns_and_goes_on_bitwise(tmp_path):
    (tmp_path / "bart.gin").write_text(BART)
    cfg = gin_file.load_run(str(tmp_path / "bart.gin"), ["config.Run.model_dir = 'unused'"]).model
    assert cfg.logits_bias and cfg.decoder.norm_order == "post" and cfg.dropout == 0.1
    nothing = config.Evaluate(examples=0, batches=0)
    run = make_run(tmp_path, tmp_path / "whole", steps=12, evaluate=nothing)
    run = with_train(dataclasses.replace(run, model=cfg), cross_entropy="chunked")
    loop.train(run)
    parts = dataclasses.replace(run, model_dir=str(tmp_path / "parts"))
    for steps in (5, 12):
        loop.train(with_train(parts, steps=steps))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    ends = [manager.load_params(each.model_dir)[0] for each in (run, parts)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    values = list(losses(tmp_path / "whole").values())
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.1


@pytest.mark.slow
def test_only_a_checkpoint_that_was_evaluated_can_be_the_best(tmp_path):
    run = make_run(
        tmp_path,
        tmp_path / "run",
        steps=7,
        evaluate=config.Evaluate(every=3, examples=0, batches=1, batch_size=8),
        checkpoint=config.Checkpoint(every=1, keep=9, metric="loss"),
    )
    loop.train(run)
    notes = selection.readable_metadata(tmp_path / "run" / "checkpoints")
    assert sorted(notes) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step in sorted(notes) if notes[step].metrics] == [3, 6, 7]
    measured = metric_writers.read_metrics(tmp_path / "run")["validation/loss"]
    assert selection.best_step(notes) == min(measured, key=measured.get)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(finished, tmp_path):
    run, _ = finished
    cfg = config.Checkpoint(initial=run.model_dir)
    still = config.Schedule("constant", 1e-30)
    begun = dataclasses.replace(
        run, model_dir=str(tmp_path / "run"), checkpoint=cfg, schedule=still
    )
    loop.train(with_train(begun, steps=1))
    before, _ = manager.load_params(run.model_dir)
    after, _ = manager.load_params(begun.model_dir)
    np.testing.assert_array_equal(before["embedding"], after["embedding"])
    wider = dataclasses.replace(begun.model, vocab=640)
    begun = dataclasses.replace(begun, model=wider, model_dir=str(tmp_path / "wider"))
    with pytest.raises(CheckpointError, match=r"embedding: checkpoint \(512, 16\)"):
        loop.train(begun)


@pytest.mark.slow
def test_given_weights_are_measured_before_the_first_step(finished, tmp_path):
    run, report = finished
    begun = dataclasses.replace(
        run,
        model_dir=str(tmp_path / "run"),
        checkpoint=config.Checkpoint(initial=run.model_dir),
        evaluate=dataclasses.replace(run.evaluate, every=2),
    )
    loop.train(with_train(begun, steps=2))
    assert metric_writers.read_metrics(tmp_path / "run")["validation/loss"][0] == report["loss"]
    assert 0 not in metric_writers.read_metrics(Path(run.model_dir))["validation/loss"]


@contextlib.contextmanager
def started(run: config.Run, text: Path):
    """The training command on this run, in a process of its own with one device."""
    text.write_text(gin_file.to_text(run))
    process = subprocess.Popen(
        [sys.executable, "-m", "t5x_lite.train", f"--gin_file={text}"],
        env=os.environ | {"XLA_FLAGS": COMPILE_QUICKLY, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_step(process, model_dir: Path, step: int) -> None:
    """Returns when the process has reported a step in model_dir, or has ended."""
    path = model_dir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and max(losses(model_dir), default=0) >= step:
            return
        time.sleep(0.005)


def losses(model_dir: Path) -> dict[int, float]:
    return metric_writers.read_metrics(model_dir).get("train/loss", {})


# Killed once in each of four moments it is in test_faults.py, 200 times in benchmarks/soak.py.
@pytest.mark.exhaustive
def test_a_run_killed_again_and_again_ends_as_one_never_killed(tmp_path):
    whole = make_run(tmp_path, tmp_path / "whole", steps=200)
    whole = dataclasses.replace(whole, checkpoint=config.Checkpoint(every=7))
    with started(whole, tmp_path / "whole.gin") as process:
        output = process.communicate()[1]
        assert process.returncode == 0, output
    killed = dataclasses.replace(whole, model_dir=str(tmp_path / "killed"))
    for step in (3, 60, 130):
        with started(killed, tmp_path / "killed.gin") as process:
            wait_for_step(process, tmp_path / "killed", step)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    with started(killed, tmp_path / "killed.gin") as process:
        output = process.communicate()[1]
        assert process.returncode == 0, output
    assert "Going on from the checkpoint of step" in output
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    expected, _ = manager.load_params(tmp_path / "whole")
    params, step = manager.load_params(tmp_path / "killed")
    assert step == 200
    np.testing.assert_array_equal(params["embedding"], expected["embedding"])


@pytest.mark.slow
# SIGTERM is sent to runs of several processes, and of stores.
@pytest.mark.parametrize(
    "number", mark_exhaustive([signal.SIGTERM, signal.SIGINT], kept=[signal.SIGINT])
)
def test_a_signal_saves_first(tmp_path, number):
    run = make_run(tmp_path, tmp_path / "run", steps=100_000)
    run = dataclasses.replace(run, checkpoint=config.Checkpoint(every=100_000))
    with started(run, tmp_path / "run.gin") as process:
        wait_for_step(process, tmp_path / "run", 5)
        process.send_signal(number)
        output = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    (step,) = step_folders.list_steps(tmp_path / "run")
    assert step >= 5
    assert f"{number.name}: saved step {step}" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_a_reason(tmp_path):
    run = make_run(tmp_path, tmp_path / "run", steps=50, dropout=0.0)
    run = dataclasses.replace(
        with_train(run, max_consecutive_skips=3),
        optimizer=config.Optimizer("sgd"),
        schedule=config.Schedule("constant", 1e30),
    )
    with started(run, tmp_path / "run.gin") as process:
        output = process.communicate()[1]
    assert process.returncode == 1
    assert "3 steps in a row were skipped" in output
    assert "Traceback" not in output
