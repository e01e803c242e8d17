# SPDX-License-Identifier: Apache-2.0
"""Laws of training readouts: losses equal float64 ones, runs with all weights and with adapters are
whole folders that predict again."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model

from t5x_lite import config, interactive, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints.checkpoint_io import CheckpointError
from t5x_lite.data import derived
from t5x_lite.model.readout import target_losses
from t5x_lite.tokenizers import labels
from t5x_lite.training import loop, setup
from t5x_lite.training.losses.readout import readout_sums

CONFIG = """
from __gin__ import dynamic_registration
from t5x_lite import config
include "runs/common.gin"
include "models/t5_tiny.gin"
TRAIN_STEPS = 4
BATCH_SIZE = 8
MIXTURE_OR_TASK_NAME = @config.Files()
TASK_FEATURE_LENGTHS = {"inputs": 24, "targets": 24}
config.Files.name = "toy"
config.Files.inputs = "text"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Stack.layers = 1
config.Stack.embed = 16
config.Stack.heads = 2
config.Stack.head_dim = 8
config.Stack.mlp = 16
config.Model.readout = @config.Readout()
config.Schedule.kind = "constant"
config.Schedule.peak = 0.01
config.Optimizer.name = "adamw"
config.Evaluate.every = 4
config.Checkpoint.every = 4
"""
ROWS = [
    {"text": "red cat", "classes": "b", "labels": ["x"], "number": 1.5, "tags": [[0, 3, "color"]]},
    {"text": "a dog", "classes": "a", "labels": [], "number": -2, "tags": [[2, 5, "animal"]]},
    {"text": "no", "classes": "c", "labels": ["x", "y"], "number": 0, "tags": []},
] * 8


def describe_run(folder, kind: str, *bindings: str) -> config.Run:
    """A run of a few steps in `folder` on ROWS.

    Args:
      folder: of the data and of the run.
      kind: Readout.kind, and the field of the targets.
      *bindings: more bindings.
    """
    (folder / "run.gin").write_text(CONFIG)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    names = [f"MODEL_DIR={folder}/run", f"config.Readout.kind={kind}"]
    names += [f"config.Files.{split}={folder}/rows.jsonl" for split in ("train", "validation")]
    names += [f"config.Files.targets={kind}", f"config.Data.cache_dir={folder}/cache"]
    return derived.load_run(str(folder / "run.gin"), [*names, *bindings])


@pytest.mark.parametrize("kind", ["classes", "labels", "number"])
def test_losses_equal_those_in_float64(kind):
    draw = np.random.default_rng(0)
    names = ("a", "b", "c", "d") if kind != "number" else ()
    cfg = config.Readout(kind, labels=names)
    outputs = 3 * draw.normal(size=(2, 4, cfg.size)).astype(np.float32)
    places = np.tile(np.arange(4, dtype=np.int32), (2, 1))
    values = draw.normal(size=(2, 4))
    targets = {
        "classes": draw.integers(0, 4, (2, 4)),
        "labels": draw.integers(0, 2, (2, 4)),
        "number": np.vectorize(labels.encode_number)(values),
    }[kind].astype(np.int32)
    losses = np.asarray(target_losses(cfg, outputs, targets, places).nll)
    wide = outputs.astype(np.float64)
    if kind == "number":
        expected = (wide[..., 0] - values) ** 2
    elif kind == "labels":
        chosen = np.take_along_axis(wide, places[..., None], -1)[..., 0]
        expected = np.logaddexp(0, chosen) - targets * chosen
    else:
        log_z = np.log(np.exp(wide).sum(-1))
        expected = log_z - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=2e-6)


MESHES = {
    "one": (config.Mesh(), 1),
    "data": (config.Mesh(), 8),
    "fsdp and tensor": (config.Mesh(data=2, fsdp=2, tensor=2), 8),
}
# Three labels, which no axis of a mesh divides.
SPLIT = {
    "classes": config.Readout("classes", "attention", ("a", "b", "c"), dense=True),
    "tags": config.Readout("tags", labels=("O", "B-x", "I-x")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPLIT)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(kind):
    cfg = toy_model("encoder_decoder" if kind == "classes" else "encoder_only", layers=1)
    cfg = dataclasses.replace(cfg, readout=SPLIT[kind])
    run = types.SimpleNamespace(model=cfg, train=config.Train(4, 8, label_smoothing=0.1))
    packed = toy_batch("encoder_decoder", length=12)
    # A target for each text of a row, or for each of its tokens.
    wanted = packed.input_segments if kind == "tags" else np.tile(np.int32([1, 2, 0]), (8, 1))
    targets = np.arange(wanted.size, dtype=np.int32).reshape(wanted.shape) % 3
    weights = (wanted > 0).astype(np.float32)
    read = (packed.inputs, packed.input_segments, packed.input_positions)
    batch = Batch(targets, wanted, np.zeros_like(wanted), weights, *read)
    results, params = {}, None
    for name, (mesh, devices) in MESHES.items():
        sharding.use_mesh(mesh, jax.devices()[:devices])
        params = params or jax.device_get(model.initialize(cfg, jax.random.key(0)))
        placed = jax.tree.map(
            lambda x, shape: jax.device_put(x, shape.sharding), params, model.shapes(cfg)
        )

        def loss_of(params, batch):
            sums = readout_sums(model.Transformer(cfg), run, params, batch, None)
            return sums.objective / sums.weights, sums

        differentiated = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        results[name] = jax.device_get(differentiated(placed, sharding.place_batch(batch)))
    expected = jax.tree.leaves(results["one"])
    assert np.abs(results["one"][1]["readout"]["out"]).max() > 1e-3
    for name, result in results.items():
        for leaf, value in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_on_labels_is_a_whole_folder_and_begins_another_with_adapters(tmp_path):
    run = describe_run(tmp_path, "classes")
    assert run.model.readout.labels == ("a", "b", "c")
    loop.train(run)
    first = interactive.load(tmp_path / "run").predict("red cat")
    assert first.label in "abc" and sum(first.probabilities.values()) == pytest.approx(1)
    (tmp_path / "rows.jsonl").unlink()
    again = interactive.load(tmp_path / "run").predict(["red cat", "no"])
    assert again[0].probabilities == pytest.approx(first.probabilities, abs=1e-6)
    with pytest.raises(ValueError, match="writes no text"):
        interactive.load(tmp_path / "run").generate("red cat", beams=2)
    other = tmp_path / "other"
    other.mkdir()
    adapted = ["config.Run.lora=@config.Lora()", "config.Lora.rank=2", "config.Lora.alpha=4"]
    tuned = describe_run(other, "classes", f"INITIAL_CHECKPOINT_PATH={tmp_path}/run", *adapted)
    loop.train(tuned)
    head = interactive.load(other / "run").predictor.params["readout"]["out"]
    before = interactive.load(tmp_path / "run").predictor.params["readout"]["out"]
    assert float(np.abs(np.asarray(head) - np.asarray(before)).max()) > 1e-4


@pytest.mark.slow
def test_other_labels_than_those_of_the_checkpoint_are_an_error_with_a_remedy(tmp_path):
    run = describe_run(tmp_path, "classes", "config.Readout.labels=('a', 'b', 'c', 'd')")
    loop.train(run)
    other = tmp_path / "other"
    other.mkdir()
    tuned = describe_run(other, "classes", f"INITIAL_CHECKPOINT_PATH={tmp_path}/run")
    with pytest.raises(CheckpointError, match="with 4 labels .* Bind Readout.labels as"):
        setup.initial_weights(str(tmp_path / "run"), tuned.model, jax.eval_shape(dict))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["labels", "number", "tags"], kept=["labels", "tags"])
)
def test_a_run_predicts_what_its_kind_says(kind, tmp_path):
    encoder = ["config.Model.decoder=None"] if kind == "tags" else []
    loop.train(describe_run(tmp_path, kind, *encoder))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    prediction = interactive.load(tmp_path / "run").predict("red cat")
    if kind == "labels":
        assert set(prediction.probabilities) == {"x", "y"}
    elif kind == "number":
        assert np.isfinite(prediction.number)
    else:
        assert len(prediction.tags) == len("red cat") + 1
        for span in prediction.spans:
            assert span.text == "red cat"[span.begin : span.end]
    assert "loss" in json.dumps(report)
