# SPDX-License-Identifier: Apache-2.0
"""Laws of `Model.readout`: packed rows are read as rows of their own; padding changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch

STACK = config.Stack(layers=1, embed=16, heads=2, head_dim=8, mlp=16)
TEXTS = ([5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1])
SHAPES = {"encoder_decoder": (STACK, STACK), "encoder_only": (STACK, None)}
SHAPES["decoder_only"] = (None, STACK)


def make_model(shape: str, readout: config.Readout) -> config.Model:
    """A toy in float32."""
    encoder, decoder = SHAPES[shape]
    return config.Model(
        vocab=32, encoder=encoder, decoder=decoder, dtype="float32", readout=readout
    )


def lay_out(rows: list[list[list[int]]], width: int, tags: bool) -> Batch:
    """Batch of texts in rows, with a target for each text.

    Args:
      rows: ids of the texts of each row.
      width: ids of a row.
      tags: a target for each token instead.
    """
    inputs, segments, positions = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    wanted = np.zeros((len(rows), 3), np.int32)
    for row, texts in enumerate(rows):
        begin = 0
        for number, text in enumerate(texts, 1):
            here = slice(begin, begin + len(text))
            inputs[row, here], segments[row, here] = text, number
            positions[row, here] = np.arange(len(text))
            wanted[row, number - 1] = number
            begin += len(text)
    wanted = segments if tags else wanted
    zeros = np.zeros_like(wanted)
    weights = (wanted > 0).astype(np.float32)
    return Batch(zeros, wanted, zeros, weights, inputs, segments, positions)


# Pooling reads what a stack gives: each once, and each shape.
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, pooling",
    mark_exhaustive(
        [
            (shape, pooling)
            for pooling in ("first", "last", "mean", "attention")
            for shape in SHAPES
        ],
        kept=[
            ("decoder_only", "first"),
            ("decoder_only", "last"),
            ("encoder_only", "mean"),
            ("encoder_decoder", "attention"),
        ],
    ),
)
def test_packed_rows_are_read_as_rows_of_their_own_and_padding_changes_nothing(shape, pooling):
    readout = config.Readout("classes", pooling, labels=("a", "b", "c"), dense=True)
    cfg = make_model(shape, readout)
    with sharding.one_device_mesh():
        params = drawn(cfg)
        packed = outputs(cfg, params, lay_out([list(TEXTS)], 16, tags=False))[0]
        alone = outputs(cfg, params, lay_out([[text] for text in TEXTS], 8, tags=False))[:, 0]
    assert np.abs(packed[0] - packed[1]).max() > 1e-3
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_tags_of_packed_rows_are_those_of_rows_of_their_own(shape):
    cfg = make_model(shape, config.Readout("tags", labels=("O", "B-x", "I-x")))
    with sharding.one_device_mesh():
        params = drawn(cfg)
        packed = outputs(cfg, params, lay_out([list(TEXTS)], 16, tags=True))[0]
        alone = outputs(cfg, params, lay_out([[text] for text in TEXTS], 8, tags=True))
    whole = np.concatenate([alone[row, : len(text)] for row, text in enumerate(TEXTS)])
    np.testing.assert_allclose(packed[: len(whole)], whole, atol=1e-5)


def test_pooling_is_the_mean_of_the_chosen_states_by_its_definition():
    cfg = make_model("encoder_only", config.Readout("vector", "attention"))
    head = model.readout.ReadoutHead(cfg)
    states = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
    segments, wanted = np.array([[1, 1, 1, 2, 2, 0]]), np.array([[1, 2, 0]])
    query = np.random.default_rng(1).normal(size=16).astype(np.float32)
    with sharding.one_device_mesh():
        for pooling in ("first", "last", "mean", "attention"):
            kind = dataclasses.replace(cfg.readout, pooling=pooling)
            head = model.readout.ReadoutHead(dataclasses.replace(cfg, readout=kind))
            placed = sharding.place(states, "batch length width")
            rows = sharding.by_rows((segments, wanted))
            x = np.asarray(head.apply({"params": {"query": query}}, placed, *rows))[0]
            scores = states[0].astype(float) @ query / 4
            share = np.exp(scores)
            parts = {
                "first": (states[0, 0], states[0, 3]),
                "last": (states[0, 2], states[0, 4]),
                "mean": (states[0, :3].mean(0), states[0, 3:5].mean(0)),
                "attention": tuple(
                    share[here] @ states[0, here] / share[here].sum()
                    for here in (slice(0, 3), slice(3, 5))
                ),
            }[pooling]
            np.testing.assert_allclose(x[:2], np.stack(parts), atol=1e-5)
            np.testing.assert_array_equal(x[2], 0)


def drawn(cfg: config.Model) -> dict:
    """New weights, the query of attention and the biases not zero."""
    params = model.initialize(cfg, jax.random.key(0))
    noise = np.random.default_rng(0)
    head = {
        name: value + 0.5 * noise.normal(size=value.shape).astype(np.float32)
        for name, value in params["readout"].items()
    }
    return params | {"readout": head}


def outputs(cfg: config.Model, params: dict, batch: Batch) -> np.ndarray:
    """Outputs [b t r] of a batch.

    Args:
      cfg: config of the model.
      params: its weights.
      batch: rows on the host.
    """
    apply = jax.jit(lambda params, batch: model.Transformer(cfg).apply({"params": params}, batch))
    return np.asarray(apply(params, sharding.place_batch(batch)))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(kind="number", labels=("a",)), "a number has none"),
        (dict(kind="classes", labels=("a", "a")), "has a more than once"),
        (dict(kind="classes", labels=("a", "")), "has an empty name"),
    ],
)
def test_labels_that_cannot_be_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        config.Readout(**fields)


def test_a_readout_needs_labels_and_excludes_draft_heads():
    with pytest.raises(ValueError, match="Readout.labels is empty: bind names"):
        _ = config.Readout("classes").size
    with pytest.raises(ValueError, match="Model.readout writes no text for Model.draft_heads"):
        dataclasses.replace(
            make_model("decoder_only", config.Readout("number")), draft_heads=config.DraftHeads(2)
        )
