# SPDX-License-Identifier: Apache-2.0
"""Blocks that the mask empties are left out, and none that is needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import Kind, sight_of

from t5x_lite.kernels import visits
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.visits import Sizes

SIZES = Sizes(128, 256)
pairs = jax.jit(Sight.mask)


@functools.partial(jax.jit, static_argnums=1)
def runs(sight: Sight, sizes: Sizes):
    return visits.visits(sight, visits.codes(sight, sizes), sizes)


def pairs_needed(sight: Sight, sizes: Sizes) -> np.ndarray:
    """The blocks with any visible pair, from all pairs [b m l]."""
    mask = np.asarray(pairs(sight))
    fill = [(0, 0), *((0, -n % size) for n, size in zip(mask.shape[1:], sizes, strict=True))]
    b, t, s = (mask := np.pad(mask, fill)).shape
    return mask.reshape(b, t // sizes.query, sizes.query, s // sizes.key, -1).any(axis=(2, 4))


def pairs_visited(run: visits.Visits, rows: int, others: int) -> np.ndarray:
    first, count = (np.asarray(x).reshape(rows, -1, 1) for x in (run.first, run.count))
    block = np.arange(others)
    return (block >= first) & (block < first + count)


def needed_and_visited(sight: Sight, sizes: Sizes = SIZES):
    """Both ways: [b m l], and visited from the side of keys turned to the same."""
    needed = pairs_needed(sight, sizes)
    b, m, n = needed.shape
    by_query, by_key = runs(sight, sizes)
    visited = pairs_visited(by_query, b, n), np.swapaxes(pairs_visited(by_key, b, m), 1, 2)
    return needed, visited


def packed(rows: int, length: int, texts: int, seed: int = 0) -> np.ndarray:
    cuts = np.sort(np.random.default_rng(seed).integers(1, length, (rows, texts)), axis=1)
    number = 1 + np.sum(np.arange(length)[None, :, None] >= cuts[:, None], axis=-1)
    return np.where(number > texts, 0, number).astype(np.int32)


ONE = np.ones((1, 2000), np.int32)
EXACT = {
    "causal": Sight(ONE, ONE, causal=True),
    "causal, later": Sight(ONE[:, :300], ONE, causal=True, offset=jnp.int32(777)),
    "window": Sight(ONE, ONE, reach=jnp.array([100, 30], jnp.int32)),
    "causal window": Sight(ONE, ONE, causal=True, reach=jnp.array([300, 1 << 30], jnp.int32)),
    "packed": Sight(packed(4, 2000, 7), packed(4, 2000, 7)),
    "packed, causal": Sight(packed(4, 2000, 7), packed(4, 2000, 7), causal=True),
    "packed, crossed": Sight(packed(4, 700, 7), packed(4, 2000, 7, seed=1)),
}


@pytest.mark.parametrize("name", EXACT)
def test_only_blocks_with_a_visible_pair_are_visited(name):
    needed, visited = needed_and_visited(EXACT[name])
    assert 0 < needed.sum() < needed.size
    for way in visited:
        np.testing.assert_array_equal(way, needed)


DRAWN = [
    Kind(lengths=(900, 300)),
    Kind(lengths=(700, 700), causal=True, prefix=True),
    Kind(lengths=(200, 1500), reach=True, offset=True),
    Kind(lengths=(1100, 500), causal=True, prefix=True, reach=True, offset=True),
]


@pytest.mark.parametrize("kind", range(len(DRAWN)))
def test_no_block_that_is_needed_is_missed(kind):
    for seed in range(25):
        sight = sight_of(DRAWN[kind], np.random.default_rng(seed))
        needed, visited = needed_and_visited(sight)
        for way in visited:
            assert np.all(way | ~needed)


def test_a_block_said_to_be_of_one_segment_is():
    sight = EXACT["packed"]
    by_query, _ = runs(sight, SIZES)
    same = np.asarray(by_query.own).reshape(4, -1, 1) == np.asarray(by_query.other).reshape(
        4, 1, -1
    )
    mask = np.asarray(pairs(sight))
    for row, m, n in zip(*np.nonzero(same), strict=True):
        block = mask[row, m * 128 : (m + 1) * 128, n * 256 : (n + 1) * 256]
        assert block.shape == (128, 256) and block.all()
    assert same.any()
