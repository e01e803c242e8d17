# SPDX-License-Identifier: Apache-2.0
"""Laws of the cache of checkpoints: which tokens a query reads depends on its position alone."""

import jax
import numpy as np
import pytest
from conftest import toy_model
from test_cache_stores import BLOCK, HEADS, ROWS, append, place, use_one_device, vectors

from t5x_lite import config, model
from t5x_lite.config.kv_cache import CacheFormat, parse_kv_cache
from t5x_lite.decoding import target
from t5x_lite.decoding.protocol import chain
from t5x_lite.model.checkpoint_cache import CheckpointCache

LENGTH, SEGMENT, RECENT = 48, 3, 6
FORM = CacheFormat(block=BLOCK, segment=SEGMENT, recent=RECENT)
CFG = toy_model("decoder_only", positions="rotary", kv_heads=HEADS, layers=1)


def empty_store(length=LENGTH, form=FORM):
    return model.empty_cache(CFG, ROWS, length, scan=False, form=form)[0]


def reads(store, index, width):
    """Keys, values and log counts that each query of a block attends to, by row.

    Args:
      store: the store, with the block in it.
      index: [b] position of the block.
      width: its tokens.
    """
    block = model.TokenBlock(np.zeros((ROWS, width), np.int32), place(index, "batch"))
    keys, values = map(np.asarray, store.read(block, "float32"))
    shown, counts = np.asarray(store.mask(block).visible), np.asarray(store.log_counts(width))
    return [
        [(keys[b][:, at], values[b][:, at], counts[at]) for at in shown[b]] for b in range(ROWS)
    ]


def expected(pair, row, position):
    """Means of whole segments that are RECENT tokens old or older, and the tokens after them.

    Args:
      pair: keys and values of all tokens.
      row: the row.
      position: of the query.
    """
    exact = max(position - RECENT + 1, 0) // SEGMENT * SEGMENT
    parts = []
    for x in pair[:, row]:
        means = x[:, :exact].reshape(HEADS, -1, SEGMENT, x.shape[-1]).mean(axis=2)
        parts.append(np.concatenate([means, x[:, exact : position + 1]], axis=1))
    counts = [SEGMENT] * (exact // SEGMENT) + [1] * (position + 1 - exact)
    return *parts, np.log(counts)


def check(store, pair, index, width):
    """Compares the reads of a block with the reference.

    Args:
      store: the store, with the block in it.
      pair: keys and values of all tokens.
      index: [b] position of the block.
      width: its tokens.
    """
    for row, queries in enumerate(reads(store, index, width)):
        for q, ours in enumerate(queries):
            for one, other in zip(ours, expected(pair, row, index[row] + q), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_query_reads_recent_tokens_and_means_of_older_segments():
    use_one_device()
    pair, store, start = vectors(LENGTH), empty_store(), 0
    assert isinstance(store, CheckpointCache)
    for width in (4, 1, 3, 4, 2, 4, 4, 1, 4, 4, 4, 4, 4):
        index = np.array([start, start])
        store = append(store, pair[:, :, :, start : start + width], index)
        check(store, pair, index, width)
        start += width


def test_drafts_that_are_rolled_back_leave_no_trace():
    use_one_device()
    pair, store, index = vectors(LENGTH), empty_store(), np.zeros(ROWS, int)
    for step in range(16):
        block = vectors(BLOCK, seed=step + 1)
        kept = 1 + (np.array([0, 1]) + step) % 3
        for row in range(ROWS):
            end = index[row] + kept[row]
            block[:, row, :, : kept[row]] = pair[:, row, :, index[row] : end]
        store = append(store, block, index)
        index = index + kept
    width = 2
    rows = [pair[:, b, :, index[b] : index[b] + width] for b in range(ROWS)]
    check(append(store, np.stack(rows, axis=1), index), pair, index, width)


def test_a_path_of_a_tree_and_whole_rows_are_read_as_a_chain():
    use_one_device()
    pair = vectors(LENGTH)
    whole = append(empty_store(LENGTH, CacheFormat()), pair, np.zeros(ROWS, int))
    length = np.array([41, 7])
    store = empty_store().load(whole, place(length, "batch"))
    store = empty_store().load(store, place(length, "batch"))
    path = np.array([[0, 2, 3], [0, 1, 3]])
    tree = vectors(BLOCK, seed=5)
    for row in range(ROWS):
        tree[:, row][:, :, path[row]] = pair[:, row, :, length[row] : length[row] + 3]
    placed = place(length, "batch"), place(path, "batch length")
    store = append(store, tree, length).compact(*placed)
    index = length + 3
    rows = [pair[:, b, :, index[b] : index[b] + 2] for b in range(ROWS)]
    check(append(store, np.stack(rows, axis=1), index), pair, index, 2)


def test_what_it_cannot_do_is_refused():
    decode = config.Decode(kv_cache="int8+checkpoints:16:64")
    assert parse_kv_cache(decode.kv_cache) == CacheFormat(8, 8, 0, 16, 64)
    with pytest.raises(ValueError, match=r"blocks of Decode\.drafter auto have 65: keep as many"):
        target.cache_format(decode, chain(65))
    for name in ("checkpoints:1:64", "checkpoints:16:8", "int8+clusters:4", "int8+"):
        with pytest.raises(ValueError, match="such as checkpoints:16:512"):
            config.Decode(kv_cache=name)
    use_one_device()
    merged = toy_model("encoder_decoder", positions="rotary", merged=True)
    form = target.cache_format(decode, chain(1))
    with pytest.raises(ValueError, match=r"Stack\.merged attends to text and inputs together"):
        jax.eval_shape(lambda: model.empty_cache(merged, 1, 512, scan=False, form=form))
