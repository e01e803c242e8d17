# SPDX-License-Identifier: Apache-2.0
"""Laws of quantized weights: bounds of their errors, products against float64, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_batch, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite import config, decoding, model, sharding
from t5x_lite.model import quantization
from t5x_lite.model.quantization import QuantizationConfig
from t5x_lite.sharding import spec

KINDS = ["int8", "int4", "int8:8", "int4:8", "int8_activations", "int4_activations"]
KINDS += ["int8_activations:8", "int4_activations:8", "int4_int8_activations", "int4:3"]

QUANTIZE = jax.jit(quantization.quantize, static_argnums=(1, 2))


@pytest.fixture(autouse=True)
def alone():
    """Sets a mesh of one device."""
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def in_float64(weight: quantization.Quantized) -> np.ndarray:
    """The numbers that a weight stands for, by numpy."""
    values, scales = np.array(weight.values, np.float64), np.array(weight.scales, np.float64)
    grouped = values.reshape(len(scales), -1, scales.shape[1])
    return (grouped * scales[:, None]).reshape(values.shape)


@given(
    bits=st.sampled_from([4, 8]),
    shape=st.sampled_from([((6,), (3, 2)), ((2, 12), (5,))]),
    group=st.sampled_from([None, 3]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1e-20, 1.0, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_no_number_is_further_off_than_half_a_scale(bits, shape, group, seed, spread):
    inward, outward = shape
    draw = np.random.default_rng(seed)
    matrix = (draw.standard_t(2, (*inward, *outward)) * spread).astype(np.float32)
    matrix[(0,) * matrix.ndim] *= draw.choice([0, 1, 1000])
    quantized = QUANTIZE(jnp.asarray(matrix), len(inward), QuantizationConfig(bits, None, group))
    scales = np.array(quantized.scales, np.float64)
    off = np.abs(in_float64(quantized) - matrix.astype(np.float64)).reshape(
        len(scales), -1, scales.shape[1]
    )
    # A float32 quotient may round the wrong way within its last bits.
    assert (off <= scales[:, None] / 2 * (1 + 1e-4)).all()
    assert np.abs(np.array(quantized.values, np.int32)).max() <= quantization.max_level(bits)
    np.testing.assert_allclose(quantization.dequantize(quantized), in_float64(quantized), rtol=1e-6)


def test_zeros_stay_zeros_and_the_largest_is_hit():
    matrix = np.zeros((4, 3), np.float32)
    matrix[1, 2] = -5
    quantized = in_float64(quantization.quantize(jnp.asarray(matrix), 1, QuantizationConfig(4)))
    np.testing.assert_allclose(quantized, matrix, rtol=1e-6)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """x as integers of bits times their scale along the last axis, in float64."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(-1, keepdims=True) / top
    scale[scale == 0] = 1
    return np.round(x / scale) * scale


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("inward, outward", [((24,), (2, 8)), ((3, 8), (10,))])
def test_a_product_is_that_of_the_rounded_numbers(name, inward, outward):
    kind = quantization.parse_quantization(name)
    draw = np.random.default_rng(3)
    matrix = draw.normal(size=(*inward, *outward)).astype(np.float32)
    x = draw.normal(size=(2, 5, *inward)).astype(np.float32)
    weight = quantization.quantize(jnp.asarray(matrix), len(inward), kind)
    placed = spec(" ".join(["batch length", *(["whole"] * len(outward))]))
    got = jax.jit(lambda x: quantization.quantized_matmul(x, weight, placed))(jnp.asarray(x))
    size = int(np.prod(inward))
    flat = x.reshape(10, size).astype(np.float64)
    if kind.activations:
        flat = rounded(flat.reshape(10, -1, kind.group or size), kind.activations).reshape(10, size)
    wanted = flat @ in_float64(weight).reshape(size, -1)
    np.testing.assert_allclose(np.array(got).reshape(wanted.shape), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, name",
    [
        ("encoder_decoder", "int8"),
        ("decoder_only", "int4:8"),
        ("decoder_only", "int8_activations"),
        ("encoder_decoder", "int4"),
    ],
)
def test_a_model_in_few_bits_is_the_model_of_the_numbers_they_stand_for(layout, name):
    cfg = toy_model(layout)
    kind = quantization.parse_quantization(name)
    params = model.initialize(cfg, jax.random.key(0))
    few = quantization.quantize_params(params, kind)
    batch = sharding.place_batch(toy_batch(layout))

    def logits(weights):
        return model.Transformer(cfg).apply({"params": weights}, batch)

    meant = quantization.dequantize_params(few)
    got, wanted, exact = jax.jit(logits)(few), jax.jit(logits)(meant), jax.jit(logits)(params)

    def off(other):
        return float(jnp.abs(other - exact).mean() / jnp.abs(exact).mean())

    assert 0 < off(got) < (0.05 if "int8" in name else 0.6)
    if kind.activations is None:
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, name",
    mark_exhaustive(
        [((1, 4, 2), "int4:8"), ((2, 2, 2), "int4_activations:8")],
        kept=[((2, 2, 2), "int4_activations:8")],
    ),
)
def test_a_mesh_changes_nothing(sizes, name):
    cfg = toy_model("encoder_decoder")
    kind = quantization.parse_quantization(name)

    def logits(sizes, devices):
        sharding.use_mesh(config.Mesh(*sizes), devices)
        params = model.initialize(cfg, jax.random.key(0))
        few = quantization.quantize_params(params, kind)
        for whole, part in zip(
            jax.tree.leaves(params), quantization.weight_leaves(few), strict=True
        ):
            if isinstance(part, quantization.Quantized):
                assert part.values.sharding.spec == whole.sharding.spec
        batch = sharding.place_batch(toy_batch("encoder_decoder"))
        return np.array(
            jax.jit(lambda few: model.Transformer(cfg).apply({"params": few}, batch))(few)
        )

    one = logits((1, 1, 1), jax.devices()[:1])
    many = logits(sizes, jax.devices()[: int(np.prod(sizes))])
    # Where a sum in another order tips a rounding of an activation, that number is a level off.
    close = np.isclose(one, many, rtol=1e-4, atol=1e-4)
    assert close.mean() == 1 if kind.activations is None else np.abs(one - many).mean() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["decoder_only"])
)
def test_what_is_decoded_is_what_the_model_of_those_numbers_decodes(layout):
    cfg = toy_model(layout)
    params = model.initialize(cfg, jax.random.key(1))
    few = quantization.quantize_params(params, quantization.parse_quantization("int4:8"))
    meant = quantization.dequantize_params(few)
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    decode = config.Decode(max_new_tokens=8)

    def written(weights):
        request = decoding.make_request(cfg, ids, decode, rows=[0, 1], batch=2, eos=(1,))
        return decoding.generate(cfg, decoding.prepare_params(cfg, weights), request, decode).tokens

    np.testing.assert_array_equal(written(few), written(meant))


def test_bytes_are_those_of_the_bits():
    cfg = toy_model("encoder_decoder")
    params = model.initialize(cfg, jax.random.key(0))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {}
    for name in ("int8", "int4"):
        few = quantization.quantize_params(params, quantization.parse_quantization(name))
        matrices = [
            leaf
            for leaf in quantization.weight_leaves(few)
            if isinstance(leaf, quantization.Quantized)
        ]
        rest = whole - sum(leaf.values.size for leaf in matrices)
        numbers = sum(leaf.values.size for leaf in matrices)
        scales = sum(leaf.scales.size for leaf in matrices)
        sizes[name] = quantization.weight_bytes(few)
        bits = {"int8": 8, "int4": 4}[name]
        assert sizes[name] == numbers * bits // 8 + 4 * (rest + scales)
        assert len(matrices) == 7 * 2 + 4
    assert sizes["int4"] < sizes["int8"] < 4 * whole


@pytest.mark.parametrize("name", ["int2", "int8_", "int4:0", "int4:x", "", "int8_int4_activations"])
def test_a_kind_that_is_none_is_told_with_those_there_are(name):
    with pytest.raises(ValueError, match="int8_activations"):
        quantization.parse_quantization(name)


def test_groups_that_do_not_divide_are_told_with_one_that_does():
    params = model.initialize(toy_model("encoder_decoder"), jax.random.key(0))
    with pytest.raises(ValueError, match="groups of 7 do not divide a fan-in of 16; .* such as 4"):
        quantization.quantize_params(params, quantization.parse_quantization("int4:7"))
