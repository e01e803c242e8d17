# SPDX-License-Identifier: Apache-2.0
"""Attention with T5's bias for Hopper: as exact as float64 says, no races, lowered for an H100."""

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import Kind, case, context_and_gradients, difference, exactly

from t5x_lite import compat
from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.flash_mosaic import api
from t5x_lite.kernels.mask import Mask

if not compat.has_mosaic_gpu():
    pytest.skip("Mosaic GPU of jax 0.10 is another", allow_module_level=True)
interpreted = pytest.mark.skipif(
    not compat.has_mosaic_gpu(interpreted=True), reason="jax 0.12 and later interpret Mosaic GPU"
)
# Lengths that are no blocks, several texts in a row, bias that ends before the row does.
KINDS = [
    Kind(lengths=(150, 100)),
    Kind(lengths=(260, 260), causal=True, heads=(1, 2, 64)),
    Kind(lengths=(70, 330), heads=(1, 1, 128)),
]


def attend(q, sources, softcap):
    """Interpreted, which raises for a race and a read out of bounds; what is not written is NaN.

    Args:
      q: queries.
      sources: one, of keys, values, mask and bias.
      softcap: None.
    """
    assert softcap is None
    return api.flash_attention(q, sources[0], interpret=True)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    # Interpreted it compiles for 10 s; a head of 128 is two of 64 in every tile.
    [0, 1, pytest.param(2, marks=pytest.mark.exhaustive)],
)
def test_values_and_gradients_are_exact(number):
    """The table's gradient too; what differs is bfloat16's rounding of probabilities."""
    q, sources, gradient = case(KINDS[number], number, jnp.bfloat16)
    value, gradients = context_and_gradients(attend, q, sources, gradient, None)
    exact_value, exact_gradients = exactly(q, sources, gradient, None)
    assert value.dtype == gradients[0].dtype == jnp.bfloat16
    assert difference(value, exact_value) < 5e-3
    for actual, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True
    ):
        assert np.max(np.abs(np.asarray(actual, np.float64) - wanted)) < 8e-3 * np.max(
            np.abs(wanted)
        )


@interpreted
def test_fully_masked_queries_give_zero():
    q, (source,), _ = case(Kind(causal=True, lengths=(40, 40), heads=(1, 1, 64)), 0, jnp.bfloat16)
    padding = np.zeros((2, 40), np.int32)
    masked = source._replace(mask=Mask(padding, source.mask.key_segments, causal=True))
    assert np.all(np.asarray(attend(q, (masked,), None), np.float32) == 0)


def kernels_of(kind: Kind, dtype="bfloat16", chip: str = "NVIDIA H100 80GB HBM3") -> list[int]:
    """Numbers of Mosaic and of Triton kernels in forward and backward pass, lowered for a chip.

    Args:
      kind: of attention.
      dtype: of queries, keys and values.
      chip: jax's name of the GPU.
    """
    q, sources, gradient = case(kind, 0, jnp.dtype(dtype))

    def attention(q, sources, softcap):
        return dispatch.dot_product_attention(q, sources, softcap, Backend("gpu"))

    with chips.described_gpu(chip):
        traced = context_and_gradients.trace(attention, q, sources, gradient, kind.softcap)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return [text.count("@mosaic_gpu"), text.count("__gpu$xla.gpu.triton")]


@pytest.mark.parametrize("kind", KINDS, ids=["bidirectional", "causal", "head of 128"])
def test_it_is_lowered_for_an_h100(kind):
    # Forward, and the gradients of queries, of keys and values, and of the near bias.
    assert kernels_of(kind) == [4, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, dtype, chip",
    [
        (Kind(biased=False), "bfloat16", "NVIDIA H200"),
        (Kind(softcap=2.0), "bfloat16", "NVIDIA H200"),
        (Kind(window=True, causal=True), "bfloat16", "NVIDIA H200"),
        (Kind(prefix=True, causal=True), "bfloat16", "NVIDIA H200"),
        (Kind(second=40), "bfloat16", "NVIDIA H200"),
        (Kind(heads=(1, 1, 96)), "bfloat16", "NVIDIA H200"),
        (Kind(), "float32", "NVIDIA H200"),
        (Kind(), "bfloat16", "NVIDIA A100-SXM4-80GB"),
        (Kind(), "bfloat16", "NVIDIA B200"),
    ],
    ids=["bias", "softcap", "window", "prefix", "two", "head", "float32", "Ampere", "Blackwell"],
)
def test_all_else_is_tritons(kind, dtype, chip):
    mosaic, triton = kernels_of(kind, dtype, chip)
    assert mosaic == 0 and triton >= 3
