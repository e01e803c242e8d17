# SPDX-License-Identifier: Apache-2.0
"""Weights that are read in fewer bits than they are kept in: the same numbers, less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.model import mixed_precision


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


def test_reading_rounds_as_a_cast_does():
    draw = np.random.default_rng(0)
    weights = draw.integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    ties = (draw.integers(0, 1 << 16, 1 << 12, np.uint32) << 16 | 0x8000).view(np.float32)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38], np.float32)
    weights = np.concatenate([weights[~np.isnan(weights)], ties[~np.isnan(ties)], odd])
    slot = mixed_precision.gradient_slots(jnp.array(weights), "bfloat16")
    result = jax.jit(mixed_precision.cast_with_slot)(weights, slot)
    np.testing.assert_array_equal(bits(result), bits(jnp.array(weights).astype(jnp.bfloat16)))
    assert np.isnan(jax.jit(mixed_precision.cast_with_slot)(jnp.array([jnp.nan]), slot[:1]))[0]


def test_a_slot_has_the_gradient_and_its_own_numbers_do_not_matter():
    sharding.use_mesh(config.Mesh())
    weight, x = jnp.arange(6.0).reshape(2, 3) / 7, jnp.ones(2, jnp.bfloat16)

    def loss(slot):
        return jnp.sum(
            jnp.sin(x @ mixed_precision.join_slots(weight, slot).read()).astype(jnp.float32)
        )

    for slot in (jnp.zeros((2, 3), jnp.bfloat16), jnp.full((2, 3), jnp.nan, jnp.bfloat16)):
        slope = jax.grad(loss)(slot)
        assert slope.dtype == jnp.bfloat16
        plain = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w).astype(jnp.float32)))
        np.testing.assert_array_equal(bits(slope), bits(plain(weight.astype(jnp.bfloat16))))


# As wide as the registers of a TPU, whose gradients are laid out on purpose.
WIDE = dict(embed=128, head_dim=32, mlp=128, layers=1)
WHOLE, SPLIT = config.Mesh(), config.Mesh(fsdp=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, changes, mesh",
    mark_exhaustive(
        [
            (layout, changes, mesh)
            for layout, changes in (
                ("encoder_decoder", {}),
                ("decoder_only", {}),
                ("encoder_decoder", WIDE),
            )
            for mesh in (WHOLE, SPLIT)
        ],
        kept=[("decoder_only", {}, WHOLE), ("encoder_decoder", WIDE, SPLIT)],
    ),
)
def test_the_gradient_is_that_of_narrow_weights(layout, changes, mesh):
    sharding.use_mesh(mesh)
    cfg = dataclasses.replace(toy_model(layout, **changes), dtype="bfloat16")
    params, batch = model.initialize(cfg, jax.random.key(0)), toy_batch(layout)
    transformer = model.Transformer(cfg)

    def loss(params):
        return jnp.sum(jnp.square(transformer.apply({"params": params}, batch)))

    copied = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)
    gradient_slots = mixed_precision.gradient_slots(params, "bfloat16")
    expected = jax.jit(jax.value_and_grad(loss))(copied)
    result = jax.jit(
        jax.value_and_grad(lambda slots: loss(mixed_precision.join_slots(params, slots)))
    )(gradient_slots)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_weights_of_the_right_dtype_are_asked_for_themselves():
    weights = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    gradient_slots = mixed_precision.gradient_slots(weights, "bfloat16")
    assert gradient_slots["b"] is weights["b"] and not np.any(
        np.asarray(gradient_slots["a"], np.float32)
    )
    joined = mixed_precision.join_slots(weights, gradient_slots)
    assert joined["b"] is weights["b"] and joined["a"].weight is weights["a"]
