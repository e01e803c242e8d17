# SPDX-License-Identifier: Apache-2.0
"""Blocks that the mask empties are left out, and none that is needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import Kind, random_mask

from t5x_lite.kernels.flash import block_mask
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.mask import Mask

SIZES = BlockSizes(128, 256)
materialize = jax.jit(Mask.materialize)


@functools.partial(jax.jit, static_argnums=1)
def block_masks(mask: Mask, sizes: BlockSizes):
    return block_mask.make_block_masks(mask, block_mask.make_segment_ids(mask, sizes), sizes)


def pairs_needed(mask: Mask, sizes: BlockSizes) -> np.ndarray:
    """The blocks with any visible pair, from all pairs [b m l]."""
    mask = np.asarray(materialize(mask))
    fill = [(0, 0), *((0, -n % size) for n, size in zip(mask.shape[1:], sizes, strict=True))]
    b, t, s = (mask := np.pad(mask, fill)).shape
    return mask.reshape(b, t // sizes.query, sizes.query, s // sizes.key, -1).any(axis=(2, 4))


def pairs_visited(run: block_mask.BlockMask, rows: int, others: int) -> np.ndarray:
    first, count = (np.asarray(x).reshape(rows, -1, 1) for x in (run.first, run.count))
    block = np.arange(others)
    return (block >= first) & (block < first + count)


def needed_and_visited(mask: Mask, sizes: BlockSizes = SIZES):
    """Both ways: [b m l], and visited from the side of keys, transposed to the same."""
    needed = pairs_needed(mask, sizes)
    b, m, n = needed.shape
    by_query, by_key = block_masks(mask, sizes)
    visited = pairs_visited(by_query, b, n), np.swapaxes(pairs_visited(by_key, b, m), 1, 2)
    return needed, visited


def packed(rows: int, length: int, texts: int, seed: int = 0) -> np.ndarray:
    cuts = np.sort(np.random.default_rng(seed).integers(1, length, (rows, texts)), axis=1)
    number = 1 + np.sum(np.arange(length)[None, :, None] >= cuts[:, None], axis=-1)
    return np.where(number > texts, 0, number).astype(np.int32)


ONE = np.ones((1, 2000), np.int32)
EXACT = {
    "causal": Mask(ONE, ONE, causal=True),
    "causal, later": Mask(ONE[:, :300], ONE, causal=True, offset=jnp.int32(777)),
    "window": Mask(ONE, ONE, window_size=jnp.array([100, 30], jnp.int32)),
    "causal window": Mask(ONE, ONE, causal=True, window_size=jnp.array([300, 1 << 30], jnp.int32)),
    "packed": Mask(packed(4, 2000, 7), packed(4, 2000, 7)),
    "packed, causal": Mask(packed(4, 2000, 7), packed(4, 2000, 7), causal=True),
    "packed, crossed": Mask(packed(4, 700, 7), packed(4, 2000, 7, seed=1)),
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
    Kind(lengths=(200, 1500), window=True, offset=True),
    Kind(lengths=(1100, 500), causal=True, prefix=True, window=True, offset=True),
]


@pytest.mark.parametrize("kind", range(len(DRAWN)))
def test_no_block_that_is_needed_is_missed(kind):
    for seed in range(25):
        mask = random_mask(DRAWN[kind], np.random.default_rng(seed))
        needed, visited = needed_and_visited(mask)
        for way in visited:
            assert np.all(way | ~needed)


def test_a_block_marked_as_one_segment_holds_no_other():
    mask = EXACT["packed"]
    by_query, _ = block_masks(mask, SIZES)
    same = np.asarray(by_query.segment).reshape(4, -1, 1) == np.asarray(
        by_query.other_segment
    ).reshape(4, 1, -1)
    mask = np.asarray(materialize(mask))
    for row, m, n in zip(*np.nonzero(same), strict=True):
        block = mask[row, m * 128 : (m + 1) * 128, n * 256 : (n + 1) * 256]
        assert block.shape == (128, 256) and block.all()
    assert same.any()
