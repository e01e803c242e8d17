# SPDX-License-Identifier: Apache-2.0
"""The GPU's form of flash attention: exact as float64 says, and lowered for CUDA."""

import functools

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from flash_toys import Kind, case, context_and_gradients, difference, exactly

from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import CUDNN, Backend
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.flash.api import AttentionSource
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.flash_triton import api as flash_triton
from t5x_lite.kernels.flash_triton.bias_backward import sum_diagonals
from t5x_lite.kernels.mask import Mask

GPU = Backend("gpu")
# Every part there is, at head sizes 16 to 256, over blocks of several shapes.
KINDS = [
    (Kind(), None),
    (Kind(heads=(1, 1, 128), lengths=(200, 200), causal=True), BlockSizes(64, 32)),
    (Kind(lengths=(150, 150), causal=True, prefix=True, heads=(1, 3, 64)), BlockSizes(32, 64)),
    (Kind(window=True, offset=True, softcap=2.0), BlockSizes(64, 64)),
    (Kind(causal=True, window=True, second=140, biased=False, softcap=3.0), BlockSizes(64, 64)),
    (Kind(heads=(3, 1, 96), lengths=(90, 260), offset=True), None),
    (Kind(heads=(1, 1, 256), causal=True, lengths=(160, 100)), None),
    (Kind(heads=(1, 8, 16), causal=True, softcap=5.0, lengths=(140, 140)), BlockSizes(16, 16)),
    (Kind(heads=(1, 1, 24), lengths=(9, 5)), None),
]
EVERYTHING = Kind(
    heads=(2, 2, 32), causal=True, prefix=True, window=True, offset=True, second=140, softcap=2.0
)


@functools.cache
def flash(largest: BlockSizes | None):
    return lambda *x: flash_triton.flash_attention(*x, chips.backend_for("gpu"), largest)[0]


def agrees(kind: Kind, largest: BlockSizes | None, seed: int) -> None:
    q, sources, gradient = case(kind, seed)
    actual = context_and_gradients(flash(largest), q, sources, gradient, kind.softcap)
    wanted = exactly(q, sources, gradient, kind.softcap)
    assert difference(actual[0], wanted[0]) < 2e-6
    assert difference(actual[1], wanted[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_values_and_gradients_are_exact(number):
    for seed in range(2):
        agrees(*KINDS[number], seed)


def test_all_parts_together_are_exact():
    for seed in range(4):
        agrees(EVERYTHING, BlockSizes(32, 16), seed)


@pytest.mark.slow
@pytest.mark.parametrize("number", mark_exhaustive(range(len(KINDS) + 1), kept=[*range(5), 7, 8]))
def test_drawn_cases_are_exact(number):
    for seed in range(100, 120):
        agrees(*(*KINDS, (EVERYTHING, BlockSizes(16, 32)))[number], seed)


def test_bfloat16_is_as_near_as_its_operands():
    q, sources, gradient = case(KINDS[0][0], 3, jnp.bfloat16)
    value, gradients = context_and_gradients(flash(None), q, sources, gradient, None)
    exact_value, exact_gradients = exactly(q, sources, gradient, None)
    assert value.dtype == gradients[0].dtype == jnp.bfloat16
    assert difference(value, exact_value) < 1e-2
    assert difference(gradients, exact_gradients) < 2e-2


def test_fully_masked_queries_give_zero_and_no_gradient():
    q, (source,), gradient = case(Kind(causal=True, lengths=(40, 40), heads=(1, 1, 16)), 0)
    padding = np.zeros((2, 40), np.int32)
    sources = (source._replace(mask=Mask(padding, source.mask.key_segments, causal=True)),)
    actual = context_and_gradients(flash(None), q, sources, gradient, None)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(actual))


def test_parts_join_by_their_log_z_gradients_too():
    q, (source,), gradient = case(Kind(lengths=(40, 64), heads=(1, 1, 16), biased=False), 1)
    segments = source.mask.query_segments, source.mask.key_segments

    def joined(q, k, v):
        parts = []
        for part in (slice(0, 32), slice(32, 64)):
            mask = Mask(segments[0], segments[1][:, part])
            sources = (AttentionSource(k[:, :, part], v[:, :, part], mask),)
            parts.append(flash_triton.flash_attention(q, sources, None, chips.backend_for("gpu")))
        contexts, log_z = zip(*parts, strict=True)
        probs = jnp.swapaxes(jax.nn.softmax(jnp.stack(log_z), axis=0), 2, 3)
        probs = probs[:, :, :, :, None, None]
        return sum(context * weight for context, weight in zip(contexts, probs, strict=True))

    value, pull = jax.vjp(jax.jit(joined), q, source.keys, source.values)
    exact_value, (of_q, of_parts) = exactly(q, (source,), gradient, None)
    assert difference(value, exact_value) < 2e-6
    assert difference(pull(gradient), (of_q, *of_parts[0][:2])) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (4, 12), (16, 8)])
def test_diagonals_are_added_up(shape):
    rows, columns = shape
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    wanted = [np.trace(x, at, 1, 2) for at in range(1 - rows, columns)]
    np.testing.assert_allclose(sum_diagonals(x), np.stack(wanted, axis=1), atol=1e-5)


def triton_calls(function, *arguments) -> int:
    """Number of Triton kernels in the program that a jitted function is lowered to for CUDA."""
    with chips.described_gpu():
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("__gpu$xla.gpu.triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", mark_exhaustive([64, 96, 128, 256], kept=[64, 96]))
def test_it_is_lowered_for_cuda(size, dtype):
    q, sources, gradient = case(EVERYTHING._replace(heads=(2, 2, size)), 0, dtype)

    def attention(*x):
        return flash_triton.flash_attention(*x, GPU)[0]

    # Forward, queries' gradient, the bias's, and keys' of both sources.
    assert triton_calls(context_and_gradients, attention, q, sources, gradient, 2.0) == 5


def test_gpus_have_kernels_for_those_who_ask(monkeypatch):
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    with chips.described_gpu():
        assert dispatch.select_backend("auto") == CUDNN
        assert dispatch.select_backend("pallas") == GPU
    q, (source,), _ = case(Kind(causal=True, heads=(1, 2, 64)), 0)
    block = CacheMask(jnp.int32([90, 30]), width=4, slots=200)
    for mask, queries in ((source.mask, q), (block, q[:, :4])):
        sources = (dispatch.AttentionSource(source.keys, source.values, mask, source.bias),)
        attention = jax.jit(
            lambda q, sources: dispatch.dot_product_attention(q, sources, backend=GPU)
        )
        assert triton_calls(attention, queries, sources) == 1
