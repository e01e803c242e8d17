# SPDX-License-Identifier: Apache-2.0
"""The whole model with kernels, interpreted, has the loss and gradients that it has without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, mark_exhaustive, toy_batch, toy_model
from test_model import decode_in_blocks, unpacked

from t5x_lite import config, model, sharding
from t5x_lite.kernels import api as kernels
from t5x_lite.training.losses import cross_entropy

SMOOTHING, Z_LOSS = 0.1, 1e-3
CASES = {
    "t5": toy_model("encoder_decoder"),
    "gpt with a prefix": toy_model("decoder_only", prefix_lm=True, kv_heads=2, positions="rotary"),
    "encoder": toy_model("encoder_only"),
    **{
        name: toy_model(
            "decoder_only" if name in ("gpt2", "mistral") else "encoder_decoder", **changes
        )
        for name, changes in FAMILIES.items()
    },
}
# A kernel's interpretation compiles for seconds to a minute. T5 and T5Gemma 2 have every kind of
# mask and bias but a prefix's and an encoder's alone; the others' are parts of these.
NAMES = mark_exhaustive(CASES, kept=("t5", "t5gemma2", "gpt with a prefix", "encoder"))


def objective(cfg: config.Model, params, batch, in_pieces: bool):
    """The objective, summed over the targets of a batch.

    Args:
      cfg: the model.
      params: its weights.
      batch: rows to read.
      in_pieces: without an array of all logits.
    """
    apply = functools.partial(model.Transformer(cfg, remat="minimal").apply, {"params": params})
    hidden = apply(batch, method=model.Transformer.hidden)
    if in_pieces:
        losses = apply(hidden, batch.targets, SMOOTHING, Z_LOSS, method=model.Transformer.losses)
    else:
        logits = apply(hidden, method=model.Transformer.logits)
        losses = cross_entropy.cross_entropy(logits, batch.targets, SMOOTHING, Z_LOSS)
    return jnp.sum(losses.objective * batch.loss_weights) / jnp.sum(batch.loss_weights)


def compare(cfg: config.Model, in_pieces: bool) -> None:
    params = model.initialize(cfg, jax.random.key(0))
    batch = sharding.place_batch(toy_batch(cfg.layout))
    results = {}
    for attention, pieces in (("reference", False), ("pallas", in_pieces)):
        model_config = dataclasses.replace(cfg, attention=attention)
        step = jax.jit(jax.value_and_grad(objective, argnums=1), static_argnums=(0, 3))
        results[attention] = step(model_config, params, batch, pieces)
    (loss, gradient), (plain, expected) = results["pallas"], results["reference"]
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        # The gradient of a key's bias is 0: what is left of it is rounding of larger numbers.
        scale = max(np.abs(other).max(), 1e-2 * largest)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_plain_xla(name):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    compare(CASES[name], in_pieces=name != "encoder")


# The smallest shows what a mesh changes: every kernel on its part of rows and heads.
@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(["t5", "t5gemma", "encoder"], kept=["encoder"]))
def test_and_so_they_are_on_a_mesh_of_eight(name):
    sharding.use_mesh(config.Mesh(2, 2, 2))
    compare(CASES[name], in_pieces=name != "encoder")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", mark_exhaustive(["t5", "t5gemma2", "bart"], kept=["t5", "t5gemma2"])
)
def test_decoding_in_blocks_over_a_cache_gives_the_logits_of_plain_xla(name):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg = CASES[name]
    params = model.initialize(cfg, jax.random.key(0))
    batch = sharding.place_batch(unpacked(toy_batch(cfg.layout)))
    whole = jax.jit(lambda params: model.Transformer(cfg).apply({"params": params}, batch))(params)
    in_kernels = dataclasses.replace(cfg, attention="pallas")
    cached = decode_in_blocks(in_kernels, params, batch, (7, 1, 4), scan=True)
    np.testing.assert_allclose(cached, whole, atol=1e-5)


def test_the_environment_overrides_the_config(monkeypatch):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    assert kernels.select_backend("auto") is None  # plain XLA where there is no TPU
    assert kernels.select_backend("pallas").interpret
    monkeypatch.setenv("T5X_LITE_ATTENTION", "reference")
    assert kernels.select_backend("pallas") is None
    monkeypatch.setenv("T5X_LITE_ATTENTION", "quick")
    with pytest.raises(
        ValueError, match="'quick': it must be one of auto, pallas, ring, reference"
    ):
        kernels.select_backend("auto")
