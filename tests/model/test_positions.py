# SPDX-License-Identifier: Apache-2.0
"""Laws of T5's position bias: its buckets, and its dense form for every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_stack

from t5x_lite import config, sharding
from t5x_lite.kernels import api as kernels
from t5x_lite.kernels import dense_mask
from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.model import positions


@pytest.mark.slow
@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        kernels.Mask(np.ones((1, 200), np.int32), np.ones((1, 170), np.int32)),
        kernels.CacheMask(np.array([0, 7, 199]), width=1, slots=200),
        kernels.CacheMask(np.array([0, 195, 31, 3]), width=5, slots=200),
        kernels.CacheMask(np.array([0, 0]), width=130, slots=130),
        kernels.CacheMask(np.array([4, 90]), 3, 200, np.array([0, 1, 1]), np.tri(3, dtype=bool)),
    ],
    ids=["rows", "tokens", "chains", "prompts", "tree"],
)
def test_the_bias_laid_out_is_the_bucket_of_every_pair(both_sides, mask):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    stack = toy_stack()
    table = jax.random.normal(jax.random.key(0), (stack.buckets, stack.heads))
    relative = positions.relative(table, stack, both_sides)
    over = dense_mask.materialize_mask(jax.tree.map(jnp.asarray, mask))
    distance = np.asarray(over.distance)
    bucket = relative.bucket(-distance.reshape(-1, *distance.shape[-2:]))
    wanted = np.moveaxis(np.asarray(table)[bucket], -1, 1)
    np.testing.assert_allclose(dense_mask.materialize_bias(relative, over), wanted, rtol=1e-6)


def test_buckets_begin_at_the_published_distances():
    table = np.zeros((32, 4))

    def firsts(buckets):
        return [int(np.argmax(buckets == b)) for b in range(buckets.max() + 1)]

    behind = -np.arange(300)
    both = np.asarray(RelativePositionBias(table, 128, True).bucket(behind))
    assert firsts(both)[8:] == [8, 12, 16, 23, 32, 46, 64, 91]
    causal = np.asarray(RelativePositionBias(table, 128, False).bucket(behind))
    assert firsts(causal)[16] == 16 and firsts(causal)[31] == 113
