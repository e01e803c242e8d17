# SPDX-License-Identifier: Apache-2.0
"""Rows whose length is split over the mesh (Mesh.context) train as whole ones do."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import FAMILIES, mark_exhaustive, toy_batch, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.planning import searching
from t5x_lite.training import optimizer, schedules, setup, step

WHOLE = config.Mesh(8)
# Weights split, heads split, and both beside the length.
SPLIT = {
    "context 2, fsdp 2, tensor 2": config.Mesh(1, 2, 2, 2),
    "context 4, data 2": config.Mesh(2, 1, 1, 4),
}


def run_of(cfg: config.Model, mesh: config.Mesh) -> config.Run:
    return config.Run(
        model_dir="unused",
        model=cfg,
        data=config.Data(task="unused", lengths={"inputs": 12, "targets": 12}),
        train=config.Train(steps=10, batch_size=8),
        schedule=config.Schedule("constant", 0.1),
        optimizer=config.Optimizer("sgd", options={}),
        mesh=mesh,
    )


def one_step(cfg: config.Model, mesh: config.Mesh, batch):
    """Weights of cfg on a mesh after one step of gradient descent on a batch, and its sums, on the
    host."""
    run = run_of(cfg, mesh)
    sharding.use_mesh(mesh)
    axes, schedule = model.axes(cfg), schedules.learning_rate(run.schedule, 10)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, ())
    begun = train_state.begin_state(model.initialize(cfg, jax.random.key(0)), update)
    after, metrics = step.make_step(run, update, schedule, axes)(begun, sharding.place_batch(batch))
    return jax.device_get((after.params, metrics.sums))


def assert_same(cfg: config.Model, mesh: config.Mesh, batch):
    """Checks the new weights and sums of a step of cfg on a batch, on this mesh and on one device.

    To 1e-5 of the largest of each, since gradients of these toys reach 1e4; the key biases of gpt2,
    which shift no softmax, have none at all."""
    split, expected = one_step(cfg, mesh, batch), one_step(cfg, WHOLE, batch)

    def allowed(b):
        return 1e-6 + 1e-5 * np.abs(b).max()

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=0, atol=allowed(b))

    jax.tree.map(close, split, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, split",
    mark_exhaustive(
        [(layout, split) for layout in ("encoder_decoder", "decoder_only") for split in SPLIT],
        kept=[
            ("encoder_decoder", "context 2, fsdp 2, tensor 2"),
            ("decoder_only", "context 4, data 2"),
        ],
    ),
)
def test_a_step_on_split_rows_is_the_step_on_whole_ones(layout, split):
    cfg = toy_model(layout, prefix_lm=layout == "decoder_only")
    assert_same(dataclasses.replace(cfg, dropout=0.1), SPLIT[split], toy_batch(layout))


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_exhaustive(["t5gemma2", "gpt2", "umt5"], kept=["t5gemma2"]))
def test_so_it_is_with_windows_turned_learned_and_own_positions(family):
    layout = "decoder_only" if family == "gpt2" else "encoder_decoder"
    cfg = toy_model(layout, **FAMILIES[family])
    assert_same(cfg, SPLIT["context 2, fsdp 2, tensor 2"], toy_batch(layout))


@pytest.mark.slow
@pytest.mark.exhaustive  # Interpreted kernels; test_kernels_context compares their attention.
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_so_it_is_where_keys_rotate(layout):
    cfg = toy_model(layout, attention="ring", prefix_lm=layout == "decoder_only")
    assert_same(cfg, SPLIT["context 4, data 2"], toy_batch(layout))


def test_what_needs_whole_rows_or_does_not_divide_is_refused_at_the_door():
    run = run_of(toy_model("encoder_decoder"), config.Mesh(1, 1, 1, 8))
    sharding.use_mesh(run.mesh)
    with pytest.raises(ValueError, match=r"Mesh.context=8 cannot split rows of 12 and 12 tokens"):
        setup.check_lengths(run, sharding.context_size())
    heads = dataclasses.replace(run.model, draft_heads=config.DraftHeads(2, "stern"))
    with pytest.raises(ValueError, match=r"Model.draft_heads needs whole ones"):
        setup.check_lengths(dataclasses.replace(run, model=heads), 2)


def test_a_search_splits_long_rows_and_no_short_ones():
    sizes = {"data": 8, "fsdp": 2, "tensor": 1}
    split = searching.with_split_rows(sizes, (4096, 4096))
    assert [(each["data"], each["context"]) for each in split] == [(8, 1), (4, 2), (2, 4)]
    assert searching.with_split_rows(sizes, (512, 114)) == [sizes | {"context": 1}]


def test_a_mesh_without_context_has_no_such_axis():
    assert sharding.mesh_sizes(config.Mesh(2, 2, 2), 8) == {"data": 2, "fsdp": 2, "tensor": 2}
    sizes = sharding.mesh_sizes(config.Mesh(-1, 2, 1, 2), 8)
    assert sizes == {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    with pytest.raises(ValueError, match="context=3 covers"):
        sharding.mesh_sizes(config.Mesh(1, 1, 1, 3), 8)
