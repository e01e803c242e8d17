# SPDX-License-Identifier: Apache-2.0
"""Laws of the Evaluator: losses by hand, every layout, cut inputs counted, a user's own metrics."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from conftest import toy_stack

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.evaluation import losses
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.tokenizers import vocabularies

STACK = toy_stack(layers=1, heads=2)


@pytest.fixture(autouse=True)
def split_mesh():
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


def run_of(tmp_path, layout="encoder_decoder", evaluate=None, **data):
    fields = dict(
        task="cmudict_g2p",
        lengths={"inputs": 16, "targets": 16},
        cache_dir=str(tmp_path / "cache"),
    )
    return config.Run(
        model_dir=str(tmp_path),
        model=config.Model(
            vocab=384,
            encoder=None if layout == "decoder_only" else STACK,
            decoder=None if layout == "encoder_only" else STACK,
            dtype="float32",
        ),
        data=config.Data(**(fields | data)),
        train=config.Train(steps=1, batch_size=8),
        schedule=config.Schedule(kind="constant", peak=0.001),
        decode=config.Decode(max_new_tokens=4),
        evaluate=evaluate or config.Evaluate(batches=2, batch_size=6, examples=5),
    )


def random_params(run):
    draw = np.random.default_rng(0)

    def make(leaf):
        return jax.device_put(
            (0.3 * draw.normal(size=leaf.shape)).astype(np.float32), leaf.sharding
        )

    return jax.tree.map(make, model.shapes(run.model))


@pytest.mark.slow
def test_losses_are_sums_over_weighted_targets(tmp_path):
    run = run_of(tmp_path)
    params, evaluator = random_params(run), Evaluator(run)
    measured = evaluator.losses(params)
    nats, tokens, size = 0.0, 0, 0
    apply = jax.jit(lambda params, batch: model.Transformer(run.model).apply(params, batch))
    for batch, _ in zip(evaluator.batches.evaluation(), range(2), strict=False):
        logits = np.asarray(apply({"params": params}, sharding.place_batch(batch)), np.float64)
        log_z = np.log(np.exp(logits).sum(axis=-1))
        here = np.take_along_axis(logits, batch.targets[:, :, None], axis=2)[:, :, 0]
        nats += ((log_z - here) * batch.loss_weights).sum()
        tokens += batch.loss_weights.sum()
        size += losses.text_bytes(batch, evaluator.dataset.vocabularies[1])
    assert measured["target_tokens"] == tokens
    assert measured["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_model_of_equal_logits_predicts_nothing(tmp_path):
    run = run_of(tmp_path)
    zeros = jax.tree.map(lambda leaf: 0 * leaf, random_params(run))
    measured = Evaluator(run).losses(zeros)
    assert measured["accuracy"] == 0.0
    assert measured["loss"] == pytest.approx(math.log(run.model.vocab), rel=1e-5)


def test_every_task_of_a_mixture_is_measured_and_reported(tmp_path):
    files = [words(tmp_path, name, count) for name, count in (("one", 9), ("two", 40))]
    whole = config.Evaluate(batches=100, batch_size=6)
    mixture = config.Mixture(tasks=tuple(files), rates=(1.0, 1.0))
    mixed = run_of(tmp_path, evaluate=whole, task=mixture)
    params = random_params(mixed)
    measured = Evaluator(mixed).losses(params)
    alone = [Evaluator(run_of(tmp_path, evaluate=whole, task=each)) for each in files]
    alone = [each.losses(params) for each in alone]
    assert [measured["loss/one"], measured["loss/two"]] == [each["loss"] for each in alone]
    tokens = [each["target_tokens"] for each in alone]
    nats = sum(each["loss"] * count for each, count in zip(alone, tokens, strict=True))
    assert measured["target_tokens"] == sum(tokens)
    assert measured["loss"] == pytest.approx(nats / sum(tokens), rel=1e-6)


def words(tmp_path, name, count):
    """A task of count pairs, by name, in a file of tmp_path."""
    path = tmp_path / f"{name}.jsonl"
    rows = [{"source": f"{name} {i}", "target": f"{i} {name}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return config.Files(
        name=name,
        train=str(path),
        validation=str(path),
        inputs="source",
        targets="target",
        vocabulary=config.Vocabulary(kind="bytes"),
    )


def test_bytes_are_those_of_each_examples_text():
    ids = np.array([[67, 68, 1, 69, 1, 0], [0] * 6], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [0] * 6], np.int32)
    batch = Batch(ids, segments, segments, (segments > 0).astype(np.float32))
    assert losses.text_bytes(batch, vocabularies.ByteVocabulary()) == len("@A" + "B")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_both_families_are_measured_alike(tmp_path, layout):
    run = run_of(tmp_path, layout)
    numbers = Evaluator(run)(random_params(run), step=3)
    assert {"loss", "bits_per_byte", "accuracy", "per", "wer"} <= numbers.keys()
    assert numbers["examples"] == 5
    assert len((tmp_path / "predictions" / "validation-3.jsonl").read_text().splitlines()) == 5


def test_running_text_has_losses_and_no_predictions(tmp_path):
    running = dict(task="python_stdlib", lengths={"targets": 32}, objective=config.CausalLM())
    run = run_of(tmp_path, "decoder_only", **running)
    run = dataclasses.replace(run, evaluate=config.Evaluate(batches=1, batch_size=4))
    evaluator = Evaluator(run)
    numbers = evaluator(random_params(run), step=0)
    assert "bits_per_byte" in numbers and "examples" not in numbers
    assert not (tmp_path / "predictions").exists()


def test_inputs_too_long_are_cut_as_in_training_and_counted(tmp_path):
    run = run_of(tmp_path, lengths={"inputs": 4, "targets": 16})
    evaluator = Evaluator(run)
    rows, cut = evaluator.inputs(5)
    words = [evaluator.dataset.inputs_text(i) for i in range(5)]
    assert cut == sum(len(word) + 1 > 4 for word in words)
    assert all(len(row) <= 4 and row[-1] == 1 for row in rows)


def test_an_unknown_metric_is_reported_before_anything_is_decoded(tmp_path):
    run = run_of(tmp_path, evaluate=config.Evaluate(metrics=("blue",)))
    with pytest.raises(ValueError, match="did you mean bleu"):
        Evaluator(run)


@pytest.mark.slow
def test_metric_functions_of_a_users_seqio_task_are_used(tmp_path):
    import seqio
    import tensorflow as tf

    def lengths(targets, predictions):
        return {"words": float(np.mean([len(each) for each in predictions])), "of": len(targets)}

    pairs = [{"inputs": "abc", "targets": "cab"}, {"inputs": "de", "targets": "ed"}]
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {name: [pair[name] for pair in pairs] for name in ("inputs", "targets")}
        ),
        splits=("train", "validation"),
    )
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=0))
    seqio.TaskRegistry.add(
        "evaluated_by_its_own",
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[lengths],
    )
    run = run_of(tmp_path, task="evaluated_by_its_own")
    numbers = Evaluator(run)(random_params(run), step=0)
    assert numbers["of"] == numbers["examples"] == 2
    assert numbers["words"] >= 0
