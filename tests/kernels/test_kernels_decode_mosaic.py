# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache for Mosaic GPU: as exact as float64 says, no races, lowered for GPUs."""

import functools

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_decode import Case, close, expected

from t5x_lite import compat
from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import Backend

if not compat.has_mosaic_gpu(interpreted=True):
    pytest.skip("jax 0.12 and later interpret Mosaic GPU", allow_module_level=True)

from t5x_lite.kernels.decode import mosaic, mosaic_operands

half = functools.partial(Case, size=64, dtype=jnp.bfloat16)
# A tree in a window, over near slots and far ones: two key heads with three queries each, a cache
# that ends inside of a block.
TREE = half(width=6, heads=(2, 3), slots=500, bias=True, tree=True, window=300, seed=2)
# The queries of a row are two chunks.
CHAIN = half(rows=2, width=40, heads=(1, 2), slots=470, bias=True, seed=22)


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs or three share the slots of a chunk: each visits several blocks."""
    monkeypatch.setattr(mosaic_operands, "PROGRAMS", 12)


@functools.partial(jax.jit, static_argnames=("softcap",))
def attend(q, sources, softcap=None):
    """Interpreted, which raises for a race and a read out of bounds; what is not written is NaN.

    Args:
      q: queries.
      sources: caches and inputs.
      softcap: cap of the scores, or None.
    """
    assert mosaic.has_mosaic_form(q, sources)
    return mosaic.mosaic_decode_attention(q, sources, softcap, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [TREE, CHAIN], ids=["tree", "chain"])
def test_a_block_sees_its_past_as_the_pairs_say(case, few_programs):
    q, source = case.draw()
    got = attend(q, (source,))
    assert got.dtype == jnp.bfloat16
    close(got, expected(q, [source], None), jnp.bfloat16)


@pytest.mark.slow
def test_past_and_inputs_share_one_softmax():
    q, past = half(width=2, softcap=3.0).draw()
    _, inputs = half(slots=140, seed=9).draw()
    inputs = inputs._replace(mask=jnp.asarray(np.arange(140) < np.array([[50], [140], [0]])))
    got = attend(q, (past, inputs), softcap=3.0)
    close(got, expected(q, [past, inputs], 3.0), jnp.bfloat16)


def kernels_of(case: Case, chip: str) -> list[int]:
    """Numbers of Mosaic and of Triton kernels of attention over a cache, lowered for a chip.

    Args:
      case: of attention.
      chip: jax's name of the GPU.
    """
    q, source = case.draw()
    call = jax.jit(lambda q, source: dispatch.dot_product_attention(q, (source,), None, GPU))
    with chips.described_gpu(chip):
        text = call.trace(q, source).lower(lowering_platforms=("cuda",)).as_text()
    return [text.count("@mosaic_gpu"), text.count("__gpu$xla.gpu.triton")]


GPU = Backend("gpu")


@pytest.mark.parametrize("chip", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"])
def test_it_is_lowered_for(chip):
    assert kernels_of(TREE, chip) == [1, 0]


@pytest.mark.parametrize(
    "case",
    [half(dtype=jnp.float32), half(prefix=True), half(size=96), half(slots=40)],
    ids=["float32", "prefix", "head", "short"],
)
def test_all_else_is_tritons(case):
    assert kernels_of(case, "NVIDIA H200") == [0, 1]
