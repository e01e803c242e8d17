# SPDX-License-Identifier: Apache-2.0
"""Laws of the config: text and tree are one, mistakes are named with their remedy."""

from pathlib import Path

import pytest

from t5x_lite import config
from t5x_lite.config import gin_file

G2P = ["configs/runs/g2p.gin"]
# Files that are read with more: a checkpoint decides the model of classify.gin and finetune.gin.
PARTS = ("classify.gin", "common.gin", "finetune.gin")
RUNS = sorted(str(path) for path in Path("configs/runs").glob("*.gin") if path.name not in PARTS)


@pytest.mark.parametrize("path", RUNS)
def test_a_run_written_as_text_is_the_same_run(path):
    run = gin_file.load_run(path)
    assert gin_file.load_run([path]) == run
    text = gin_file.to_text(run)
    assert gin_file.from_text(text) == run
    assert gin_file.to_text(gin_file.from_text(text)) == text


def test_the_command_line_wins_and_paths_need_no_quotes():
    bindings = ["MODEL_DIR=/tmp/a-b/c.d", "TRAIN_STEPS=7", "config.Schedule.peak=1"]
    run = gin_file.load_run(G2P, bindings)
    assert (run.model_dir, run.train.steps, run.schedule.peak) == ("/tmp/a-b/c.d", 7, 1.0)
    assert isinstance(run.schedule.peak, float)


def test_the_twins_have_the_same_number_of_parameters_within_a_percent():
    import jax

    from t5x_lite import model, sharding

    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    sizes = [
        sum(model.count(gin_file.load_run([path]).model).values())
        for path in ("configs/runs/g2p.gin", "configs/runs/g2p_decoder.gin")
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


@pytest.mark.parametrize(
    "binding, words",
    [
        ("TRAIN_STEP=5", ["--gin.TRAIN_STEP", "did you mean TRAIN_STEPS?"]),
        ("config.Trian.steps=5", ["did you mean config.Train?"]),
        ("config.Train.stepz=5", ["config.Train has no such field", "did you mean steps?"]),
        ("config.Train.steps=many", ["Train.steps must be an integer", "'many'"]),
        ("config.Train.steps=True", ["Train.steps must be an integer", "True"]),
        ("config.Train.steps=0", ["Train.steps must be at least 1"]),
        ("config.Train.microbatches=3", ["batch_size (4)", "microbatches (3)"]),
        ("config.Schedule.kind=cosin", ["Schedule.kind must be one of", "'cosin'"]),
        ("config.Stack.kv_heads=3", ["heads (8)", "kv_heads (3)"]),
        ("config.Data.lengths={'input': 3}", ["unknown features ['input']"]),
        ("config.Model.dropout=1", ["Model.dropout must be in [0, 1)"]),
        ("config.Mesh.data=0", ["Mesh.data must be -1, or at least 1"]),
        ("config.Decode.beams=0", ["Decode.beams"]),
        ("config.Stack.layers=@foo()", ["foo", "--gin.config.Stack.layers"]),
        ("MODEL_DIR", ["needs a value"]),
        ("config.Files.name=mine", ["changes nothing", "@config.Files()"]),
    ],
)
def test_a_wrong_binding_is_named_with_what_would_be_right(binding, words):
    with pytest.raises(gin_file.ConfigError) as caught:
        gin_file.load_run(G2P, [binding])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("import os\nconfig.Run.seed = 1", ["bad.gin:1", "import os"]),
        ("config.Run.seed = 1\nfrom os import path", ["bad.gin:2"]),
        ("config.Run.seed = [1,\n", ["bad.gin"]),
        ("include 'runs/g2q.gin'\n", ["runs/g2q.gin", "did you mean configs/runs/g2p.gin or "]),
        ("config.Model.vocab = 3\n", ["No config.Run"]),
        ("config.Run.seed = 1\n", ["config.Run is not complete", "model_dir"]),
        ("", ["No config.Run"]),
        ("\n\n", ["No config.Run"]),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "bad.gin"
    path.write_text(text)
    with pytest.raises(gin_file.ConfigError) as caught:
        gin_file.load_run([str(path)])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_failed_load_leaves_nothing_behind_for_the_next():
    before = gin_file.load_run(G2P)
    with pytest.raises(gin_file.ConfigError):
        gin_file.load_run(G2P, ["config.Data.pack=False", "config.Train.steps=0"])
    assert gin_file.load_run(G2P) == before


def test_python_built_configs_are_checked_alike():
    with pytest.raises(ValueError, match="Stack.layers must be an integer; got '3'"):
        config.Stack(layers="3", embed=8, heads=1, head_dim=8, mlp=8)
