# SPDX-License-Identifier: Apache-2.0
"""Laws of distillation from text with hidden spans: the teacher's logits on its tokens, one-hot
targets on sentinels and ends (T5Gemma 2)."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_distillation as laws
from conftest import toy_model
from test_training_step import DATA, initial

from t5x_lite import config, model, sharding
from t5x_lite.adaptation.distilled_batches import TeacherBatchBuilder
from t5x_lite.batch import Batch
from t5x_lite.data import objectives
from t5x_lite.training.losses import cross_entropy, distillation

END, SENTINELS = 1, np.array([63, 62, 61, 60])
VOCABULARY = types.SimpleNamespace(sentinel_ids=SENTINELS, eos=END)
LENGTH = 40


def hide(text: np.ndarray, mask: np.ndarray):
    """Inputs and targets of a text whose masked spans are hidden, and the place in the text of each
    target, -1 for sentinels and the end."""
    read, written = (
        np.append(part.tokens, END)
        for part in objectives.corrupt(text[None], mask[None], SENTINELS)
    )
    places = np.full(len(written), -1)
    places[(written != END) & ~np.isin(written, SENTINELS)] = np.flatnonzero(mask)
    return read, written, places


def make_texts(draw, rows: int):
    """For each row a text with hidden spans, one that is continued, and another with spans."""
    for _ in range(rows):
        row = []
        for spans in (True, False, True):
            text = draw.integers(2, 50, 8).astype(np.int32)
            if spans:
                mask = np.zeros(8, bool)
                mask[[2, 3, 6]] = True
                mask = np.roll(mask, draw.integers(-1, 2))
                row.append((text, *hide(text, mask)))
            else:
                cut = draw.integers(2, 6)
                row.append((text, text[:cut], text[cut:], np.arange(cut, 8)))
        yield row


def make_batch(layout: str, rows: int = 8):
    """A batch of `make_texts`, and for each target its text and the place there (-1 for none)."""
    fields = {name: np.zeros((rows, LENGTH), np.int32) for name in Batch._fields[:7]}
    prefix, origin = np.zeros((rows, LENGTH), bool), {}
    for number, row in enumerate(make_texts(np.random.default_rng(0), rows)):
        at = {"inputs": 0, "targets": 0}
        for segment, (text, read, written, places) in enumerate(row, 1):
            joined = layout == "decoder_only"
            parts = [("targets" if joined else "inputs", read, True), ("targets", written, False)]
            position = 0
            for name, tokens, of_inputs in parts:
                begin, at[name] = at[name], at[name] + len(tokens)
                where = slice(begin, at[name])
                kind = "input" if name == "inputs" else "target"
                fields[name][number, where] = tokens
                fields[f"{kind}_segments"][number, where] = segment
                begin_at = position if joined else 0
                fields[f"{kind}_positions"][number, where] = begin_at + np.arange(len(tokens))
                position += len(tokens)
                if of_inputs and joined:
                    prefix[number, where] = True
                if not of_inputs:
                    fields["loss_weights"][number, where] = 1
                    for offset, place in enumerate(places):
                        origin[number, begin + offset] = text, place
    fields["loss_weights"] = fields["loss_weights"].astype(np.float32)
    if layout == "decoder_only":
        left_out = dict.fromkeys(("inputs", "input_segments", "input_positions"))
        return Batch(**(fields | left_out), prefix=prefix), origin
    return Batch(**fields), origin


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("starts", [True, False])
def test_a_teacher_reads_the_text_before_its_spans_were_hidden(layout, starts):
    cfg = toy_model("decoder_only", add_bos=starts, decoder_start_token_id=0)
    batch, origin = make_batch(layout)
    # Sentinels are no ids of the teacher.
    read = TeacherBatchBuilder(cfg, 50, VOCABULARY).teacher_data(batch)
    assert origin
    for (row, target), (text, place) in origin.items():
        context = [*([0] if starts else []), *text[: max(place, 0)]]
        assert read.known[row, target] == (place >= 0 and bool(context)), (row, target)
        if not read.known[row, target]:
            continue
        at = read.places[row, target]
        begin = at - read.positions[row, at]
        assert read.tokens[row, begin : at + 1].tolist() == context
        assert len(set(read.segments[row, begin : at + 1].tolist())) == 1
    assert not read.known[batch.target_segments == 0].any()


def test_without_sentinels_the_rows_are_those_of_inputs_and_targets():
    batch = laws.toy_batch("encoder_decoder")
    bare = types.SimpleNamespace(sentinel_ids=np.array([], np.int32), eos=END)
    plain = TeacherBatchBuilder(laws.TEACHER, 64).teacher_data(batch)
    for vocabulary in (bare, types.SimpleNamespace(sentinel_ids=np.array([99]), eos=END)):
        other = TeacherBatchBuilder(laws.TEACHER, 64, vocabulary).teacher_data(batch)
        jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_the_gradient_is_that_of_the_teacher_or_of_one_hot_targets():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    draw = np.random.default_rng(1)
    logits, teacher = draw.normal(size=(2, 2, 3, 11)) * 3
    targets, known = draw.integers(0, 11, (2, 3)), np.array([[True, False, True], [False] * 3])
    cfg = config.Distillation("unused", weight=1.0)

    def objective(x):
        losses = cross_entropy.cross_entropy(x, jnp.asarray(targets), 0.0, 0.0)
        divergence = distillation.full_divergence(x, jnp.float32(teacher), 1.0)
        terms = distillation.DistillationTerms(divergence, jnp.asarray(known))
        return distillation.mixed_objective(losses, terms, cfg)

    q, p = (np.exp(laws.log_softmax(each)) for each in (logits, teacher))
    wanted = q - np.where(known[..., None], p, np.eye(11)[targets])
    gradient = jax.grad(lambda x: jnp.sum(objective(x)))(jnp.float32(logits))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    one_hot = -np.take_along_axis(laws.log_softmax(logits), targets[..., None], -1)[..., 0]
    values = np.where(known, laws.reference(logits, teacher, 1.0), one_hot)
    np.testing.assert_allclose(objective(jnp.float32(logits)), values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_the_objective_of_a_step_is_that_of_float64(layout, monkeypatch):
    run = laws.taught_run(layout, weight=1.0, z_loss=0.0)
    batch, origin = make_batch(layout, rows=16)
    aware = functools.partial(TeacherBatchBuilder, vocabulary=VOCABULARY)
    monkeypatch.setattr(laws, "TeacherBatchBuilder", aware)
    _, (metrics,) = laws.take(run, [batch])
    sharding.use_mesh(DATA)
    params = model.initialize(laws.TEACHER, jax.random.key(3))
    weights = jax.tree.map(jnp.asarray, initial(layout))
    student = np.asarray(laws.forward(run.model, weights, sharding.place_batch(batch)), np.float64)
    texts = np.stack([text for text, _ in origin.values()])
    ids = np.pad(texts, ((0, -len(texts) % 8), (0, LENGTH - texts.shape[1])))
    alone = Batch(
        ids,
        np.ones_like(ids),
        np.arange(LENGTH)[None].repeat(len(ids), 0),
        np.ones_like(ids, np.float32),
    )
    teacher = np.asarray(laws.forward(laws.TEACHER, params, sharding.place_batch(alone)))
    total, tokens = 0.0, 0
    for number, ((row, target), (_, place)) in enumerate(origin.items()):
        log_q = laws.log_softmax(student[row, target])
        if place < 0:
            total -= log_q[batch.targets[row, target]]
        else:
            total += laws.reference(student[row, target], teacher[number, place], 1.0)
            tokens += 1
    np.testing.assert_allclose(metrics.sums.objective, total, rtol=1e-4)
    assert metrics.sums.teacher_tokens == tokens < metrics.sums.weights


def test_fill_in_the_middle_has_no_teacher():
    run = laws.taught_run()
    spans = dataclasses.replace(run.data, objective=config.SpanCorruption())
    assert dataclasses.replace(run, data=spans).distillation is not None
    middle = dataclasses.replace(run.data, objective=config.FillInTheMiddle())
    with pytest.raises(ValueError, match="needs targets in the order of their text"):
        dataclasses.replace(run, data=middle)
