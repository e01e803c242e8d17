# SPDX-License-Identifier: Apache-2.0
"""The GPU's form of attention over a cache: exact as float64 says, and lowered for CUDA."""

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_decode import Case, close, expected

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.decode import triton

CASES = [
    Case(seed=20),
    Case(width=6, tree=True, bias=True, window=40, prefix=True, heads=(2, 3), seed=21),
    Case(rows=2, width=40, bias=True, heads=(1, 2), slots=90, size=24, seed=22),
    Case(dtype=jnp.bfloat16, bias=True, seed=23),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.seed))
def test_a_block_sees_its_past_as_the_pairs_say(case):
    q, source = case.draw()
    attend = jax.jit(lambda *x: triton.triton_decode_attention(*x, None, chips.backend_for("gpu")))
    got = attend(q, (source,))
    close(got, expected(q, [source], None), case.dtype)


def test_past_and_inputs_share_one_softmax():
    q, past = Case(softcap=3.0).draw()
    _, inputs = Case(slots=140, seed=9).draw()
    inputs = inputs._replace(mask=jnp.asarray(np.arange(140) < np.array([[50], [140], [0]])))
    got = triton.triton_decode_attention(q, (past, inputs), 3.0, chips.backend_for("gpu"))
    close(got, expected(q, [past, inputs], 3.0), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_it_is_lowered_for_cuda(size, dtype):
    features = dict(tree=True, bias=True, window=40, prefix=True, heads=(2, 3))
    q, past = Case(width=6, size=size, dtype=dtype, **features).draw()
    inputs = past._replace(mask=jnp.ones((3, 200), bool), bias=None)
    call = jax.jit(lambda *x: triton.triton_decode_attention(*x, 30.0, Backend("gpu")))
    with chips.described_gpu():
        lowered = call.trace(q, (past, inputs)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 2
