# SPDX-License-Identifier: Apache-2.0
"""Law: what a run refuses before its first step, --dry_run refuses in the same words."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from t5x_lite import model, train
from t5x_lite.checkpoints import checkpoint_io, manager, train_state
from t5x_lite.config import gin_file
from t5x_lite.training import loop, preflight, schedules, setup
from t5x_lite.training.model_dir import adopt_changes
from t5x_lite.training.reporting import overview

BASE = """
from __gin__ import dynamic_registration
from t5x_lite import config
include "runs/common.gin"
include "models/t5_tiny.gin"
TRAIN_STEPS = 2
BATCH_SIZE = 8
MIXTURE_OR_TASK_NAME = @config.Files()
TASK_FEATURE_LENGTHS = {"inputs": 32, "targets": 32}
config.Files.name = "mine"
config.Files.inputs = "inputs"
config.Files.targets = "targets"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Model.vocab = 384
config.Model.dtype = "float32"
config.Stack.layers = 1
config.Stack.embed = 16
config.Stack.heads = 2
config.Stack.head_dim = 8
config.Stack.mlp = 16
config.Schedule.kind = "constant"
config.Schedule.peak = 0.001
config.Evaluate.batches = 1
config.Evaluate.examples = 2
config.Decode.max_new_tokens = 2
config.Decode.drafter = "plain"
config.Train.tensorboard = False
"""
SOURCE = "config.Run.adaptation = @config.Adaptation()\nconfig.Adaptation.source = "
TEACHER = "config.Run.distillation = @config.Distillation()\nconfig.Distillation.teacher = "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Examples, a .gin file, and a trained run."""
    folder = tmp_path_factory.mktemp("preflight")
    rows = [json.dumps({"inputs": f"question {n}", "targets": f"answer {n}"}) for n in range(20)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "other.jsonl").write_text('{"inputs": "one", "answer": "two"}\n')
    text = BASE + f'config.Data.cache_dir = "{folder}/cache"\n'
    text += "".join(
        f'config.Files.{name} = "{folder}/{name}.jsonl"\n' for name in ("train", "validation")
    )
    (folder / "run.gin").write_text(text)
    (folder / "dangling").symlink_to(folder / "nowhere")
    loop.train(load(folder, f"MODEL_DIR={folder}/trained"))
    return folder


def load(folder: Path, *bindings: str):
    return gin_file.load_run([str(folder / "run.gin")], bindings)


def preflight_shapes(run):
    return train_state.state_shapes(model.shapes(run.model), setup.make_update(run)[1])


def refusal_of(action) -> str:
    with pytest.raises(ValueError) as raised:
        action()
    return str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines, words",
    [
        ('config.Files.train = "nowhere-*.jsonl"', "Files.train of 'mine' matches no file"),
        ('config.Files.train = "{folder}/other.jsonl"', "targets"),
        ('config.Files.validation = "{folder}/other.jsonl"', "targets"),
        ('config.Files.validation = "nowhere.jsonl"', "Files.validation of 'mine' matches no file"),
        ('config.Data.eval_split = "test"', "has no split 'test'"),
        ('config.Data.task = "cmudict_g2q"', "did you mean cmudict_g2p"),
        ("config.Model.vocab = 128", "has 259 ids, but Model.vocab is 128"),
        ('config.Files.metrics = ("BLEU",)', "no metric 'BLEU': did you mean bleu?"),
        ('config.Evaluate.metrics = ("chrF",)', "no metric 'chrF': did you mean chrf?"),
        ('config.Checkpoint.metric = "bleu"', "Checkpoint.metric is 'bleu'"),
        ('config.Checkpoint.metric = "los"', "did you mean loss?"),
        ('INITIAL_CHECKPOINT_PATH = "nowhere"', "There is no nowhere"),
        (
            'INITIAL_CHECKPOINT_PATH = "{folder}/trained"\nconfig.Model.tied = True',
            "head: checkpoint",
        ),
        ('INITIAL_CHECKPOINT_PATH = "{folder}/trained"\nconfig.Stack.mlp = 24', "mlp"),
        (SOURCE + '"nowhere"', "Adaptation.source: there is no nowhere"),
        (
            TEACHER + '"{folder}/trained"\nconfig.Data.objective = @config.PrefixLM()',
            "decoder-only",
        ),
        ('config.Optimizer.name = "adamm"', "adamw"),
        ('config.Decode.drafter = "lokup"', "Unknown drafter 'lokup': did you mean lookup?"),
        ('config.Decode.drafter = "early:9"', "drafter=early is 9, but the decoder has 1 layers"),
        ('config.Decode.accept = "exakt"', "did you mean exact?"),
        ('MODEL_DIR = "{folder}/run.gin"', "run.gin is not a folder"),
        ('MODEL_DIR = "{folder}/run.gin/below/it"', "run.gin is not a folder"),
        ('MODEL_DIR = "{folder}/dangling"', "dangling is not a folder"),
        ('config.Data.cache_dir = "{folder}/run.gin"', "run.gin is not a folder. Name another"),
        ('config.Data.cache_dir = "{folder}/run.gin/c"', "run.gin is not a folder. Name another"),
        ('MODEL_DIR = "{folder}/trained"\nconfig.Schedule.peak = 0.5', "run of another config"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_and_in_its_words(folder, tmp_path, lines, words):
    path = tmp_path / "run.gin"
    model_dir = f'MODEL_DIR = "{tmp_path}/model_dir"\n'
    text = (folder / "run.gin").read_text() + model_dir + lines.replace("{folder}", str(folder))
    path.write_text(text)
    run = gin_file.load_run([str(path)])
    message = refusal_of(lambda: preflight.check_run(run, print))
    assert not (tmp_path / "model_dir").exists()
    assert words in message
    assert refusal_of(lambda: loop.train(run)) == message


def rename_step(folder: Path) -> None:
    (folder / "checkpoints/2").rename(folder / "checkpoints/3")


def copy_to_another_step(folder: Path) -> None:
    shutil.copytree(folder / "checkpoints/2", folder / "checkpoints/1")


def cut_metadata(folder: Path) -> None:
    (folder / "checkpoints/2/note/metadata").write_text('{"note": ')


def set_all_aside(folder: Path) -> None:
    (folder / "checkpoints/2").rename(folder / "checkpoints/2.damaged")


def leave_out_optimizer(folder: Path) -> None:
    metadata = checkpoint_io.read_metadata(folder / "checkpoints/2")
    arrays = metadata.arrays | {"rest": {}}
    changed = dataclasses.replace(metadata, arrays=arrays)
    checkpoint_io.write_metadata(folder / "checkpoints/2", changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, words",
    [
        (rename_step, "3 holds the checkpoint of step 2: rename the folder to 2"),
        (copy_to_another_step, "1 holds the checkpoint of step 2: rename the folder to 2"),
        (cut_metadata, "has only damaged checkpoints: 2 ("),
        (set_all_aside, "has only damaged checkpoints: 2.damaged. Put a copy back"),
        (leave_out_optimizer, "checkpoints/2 is of another optimizer"),
    ],
)
def test_a_dry_run_refuses_the_checkpoint_that_the_run_refuses(folder, tmp_path, damage, words):
    shutil.copytree(folder / "trained", tmp_path / "copy")
    damage(tmp_path / "copy")
    run = load(folder, f"MODEL_DIR={tmp_path}/copy", "TRAIN_STEPS=4")
    message = refusal_of(lambda: preflight.check_run(run, print))
    assert words in message and refusal_of(lambda: loop.train(run)) == message
    if "--ignore_damaged" in message:
        preflight.check_run(run, print, ignore_damaged=True)
    if damage is rename_step:  # a reader of the weights says the same
        assert refusal_of(lambda: manager.load_params(tmp_path / "copy")) == message


@pytest.mark.slow
def test_a_dry_run_prints_the_run_and_ends_with_the_refusal(folder, tmp_path, capsys):
    words = [f"--gin_file={folder}/run.gin", f"--gin.MODEL_DIR={tmp_path}/new", "--dry_run"]
    assert train.main(words) == 0
    assert "parameters " in capsys.readouterr().out and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as end:
        train.main([*words, "--gin.config.Files.train=nowhere.jsonl"])
    output = capsys.readouterr()
    assert end.value.code == 2 and "parameters " in output.out
    assert output.err.startswith("t5x_lite.train: error: Files.train of 'mine' matches no file")


@pytest.mark.slow
def test_memory_is_compared_before_anything_is_placed(folder, tmp_path, monkeypatch):
    run = load(folder, f"MODEL_DIR={tmp_path}")
    assert preflight.device_memory() > 2**20
    monkeypatch.setattr(preflight, "device_memory", lambda: 1000)
    message = refusal_of(lambda: preflight.check_run(run, print))
    assert "GB of each device" in message and message.count("\n") == 0
    assert "--try_memory" in message and "--try_memory" in train.parser().format_help()
    assert refusal_of(lambda: loop.train(run)) == message
    preflight.check_run(run, print, try_memory=True)
    assert loop.train(run, try_memory=True)["steps"] == 2


@pytest.mark.slow
def test_activations_are_compared_once_the_step_is_compiled(folder, tmp_path, monkeypatch):
    run = load(folder, f"MODEL_DIR={tmp_path}")
    state = sum(overview.state_bytes(run, preflight_shapes(run)).values())
    monkeypatch.setattr(preflight, "device_memory", lambda: state)
    preflight.check_run(run, print)
    message = refusal_of(lambda: loop.train(run))
    assert "activations and scratch" in message and "microbatches" in message
    assert loop.train(run, try_memory=True)["steps"] == 2


@pytest.mark.parametrize(
    "bindings, words",
    [
        (["config.Schedule.warmup=2"], "rises to the end and never falls"),
        (["config.Schedule.warmup=5"], "Schedule.warmup = 5 takes all of the 2 steps"),
        (
            ["TRAIN_STEPS=10", "config.Schedule.kind=wsd", "config.Schedule.warmup=8"]
            + ["config.Schedule.decay=0.5"],
            "Schedule.decay = 0.5 begins inside of Schedule.warmup = 8",
        ),
        (
            ["config.Train.param_groups=(@config.ParamGroup(),)"]
            + ["config.ParamGroup.weights=('encoder.*',)", "config.ParamGroup.begin=1"]
            + ["config.ParamGroup.warmup=3"],
            "ParamGroup.begin + warmup = 4 is beyond the 2 steps",
        ),
    ],
)
def test_a_rate_that_never_has_its_peak_is_warned_about(folder, tmp_path, bindings, words):
    run = load(folder, f"MODEL_DIR={tmp_path}/new", *bindings)
    warnings: list[str] = []
    preflight.check_run(run, warnings.append)
    assert len(warnings) == 1 and words in warnings[0]
    rate = schedules.learning_rate(run.schedule, run.train.steps)
    peaks = [float(rate(step)) for step in range(run.train.steps)]
    if run.schedule.kind == "wsd":
        assert max(peaks) < run.schedule.peak


def test_a_schedule_that_reaches_its_peak_has_no_warning(folder, tmp_path):
    for kind, warmup in (("linear", 9), ("cosine", 1), ("wsd", 5), ("rsqrt", 9)):
        bindings = [f"config.Schedule.kind={kind}", f"config.Schedule.warmup={warmup}"]
        more = ["TRAIN_STEPS=10", "config.Schedule.decay=0.5"]
        run = load(folder, f"MODEL_DIR={tmp_path}", *bindings, *more)
        assert schedules.list_warnings(run) == []
        rate = schedules.learning_rate(run.schedule, 10)
        peak = max(float(rate(step)) for step in range(10))
        assert peak == pytest.approx(run.schedule.peak, rel=0.21 if kind == "wsd" else 1e-6)


@pytest.mark.slow
def test_fewer_steps_than_a_run_has_leave_it_as_it_is(folder, tmp_path, capfd):
    model_dir = f"MODEL_DIR={tmp_path}/longer"
    loop.train(load(folder, model_dir, "TRAIN_STEPS=3"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "longer").glob("*.*")}
    report = loop.train(load(folder, model_dir))
    assert report["steps"] == 3 and "beyond TRAIN_STEPS = 2" in capfd.readouterr().err
    after = {path.name: path.read_bytes() for path in (tmp_path / "longer").glob("*.*")}
    assert {name for name in before if before[name] != after[name]} <= {".lock"}


def test_metrics_may_change_when_a_run_goes_on(folder, tmp_path):
    before = load(folder, f"MODEL_DIR={tmp_path}")
    after = load(folder, f"MODEL_DIR={tmp_path}", "config.Files.metrics=('bleu', 'chrf')")
    assert before != after and adopt_changes(before, after) == after
    other = load(folder, f"MODEL_DIR={tmp_path}", "config.Files.name=other")
    assert adopt_changes(before, other) != other


def test_a_converted_checkpoint_in_model_dir_is_named(folder, tmp_path):
    run = load(folder, f"MODEL_DIR={tmp_path}/converted")
    converted = dataclasses.replace(run, data=None, train=None, schedule=None)
    (tmp_path / "converted/checkpoints/0").mkdir(parents=True)
    (tmp_path / "converted/config.gin").write_text(gin_file.to_text(converted))
    assert adopt_changes(converted, run) == converted
