# SPDX-License-Identifier: Apache-2.0
"""Laws of digests: the same on host, device and layer by layer; any change of bits shows."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from t5x_lite.checkpoints import digests

DTYPES = [np.float32, np.int32, np.float16, ml_dtypes.bfloat16, np.uint8]


def drawn(dtype, *shape) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (3, 4, 5), (2, 0)])
def test_host_device_rows_and_layers_agree(dtype, shape, mixed, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 8)
    array = drawn(dtype, *shape)
    whole = digests.numpy_digest(array, mixed)
    assert int(digests.array_digest(jnp.asarray(array), mixed)) == whole
    if array.ndim > 1:
        layers = {i: digests.numpy_digest(layer, mixed) for i, layer in enumerate(array)}
        assert digests.combine_digests(layers, mixed) == whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_changed_bit_or_order_changes_the_digest(dtype):
    array = drawn(dtype, 3, 4, 5)
    before = digests.numpy_digest(array)
    bits = array.copy().view(np.uint8).reshape(-1)
    for place in range(len(bits)):
        for bit in range(8):
            bits[place] ^= 1 << bit
            changed = bits.view(array.dtype).reshape(array.shape)
            assert digests.numpy_digest(changed) != before
            bits[place] ^= 1 << bit
    for other in (array[::-1], array[:, ::-1], array[:, :, ::-1], np.roll(array, 1, axis=2)):
        assert digests.numpy_digest(other) != before


def test_two_changed_signs_change_the_digest():
    array = drawn(np.float32, 6, 7)
    before, linear = digests.numpy_digest(array), digests.numpy_digest(array, mixed=False)
    flat = array.reshape(-1)
    for one in range(flat.size):
        for other in range(one):
            flat[[one, other]] *= -1
            assert digests.numpy_digest(array) != before
            assert digests.numpy_digest(array, mixed=False) == linear
            flat[[one, other]] *= -1
