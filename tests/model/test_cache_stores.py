# SPDX-License-Identifier: Apache-2.0
"""Laws of cache stores: appended tokens are read back, a rollback leaves no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.config.kv_cache import CacheFormat, parse_kv_cache
from t5x_lite.decoding import generation
from t5x_lite.decoding.drafters import lookup
from t5x_lite.model import cache_slots
from t5x_lite.sharding import spec

ROWS, HEADS, SIZE, WINDOW, BLOCK = 2, 2, 8, 5, 4
LENGTH = 24
SLIDING = {"layers": 2, "pattern": ("sliding", "full"), "window": WINDOW + 1}
WINDOWED = toy_model("decoder_only", positions="rotary", kv_heads=HEADS, **SLIDING)
FORMS = {
    "auto": CacheFormat(),
    "int8:int4": parse_kv_cache("int8:int4"),
    "ring": CacheFormat(block=BLOCK),
    "ring of int4": parse_kv_cache("int4")._replace(block=BLOCK),
}


def vectors(count, seed=0):
    """Keys, values [b k count h] of normal numbers, a few of them large."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(2, ROWS, HEADS, count, SIZE)) * random.choice([1, 30], (count, 1))
    return x.astype(np.float32)


def windowed_store(form):
    """The store of a layer with a window."""
    return model.empty_cache(WINDOWED, ROWS, LENGTH, scan=False, form=form)[0]


def append(store, pair, index):
    k, v = (place(x, cache_slots.AXES) for x in pair)
    return store.append(k, v, place(index, "batch"))


def place(x, axes):
    return jax.reshard(jnp.asarray(x), spec(axes))


def visible(store, index, width):
    """Keys and values that each query of a block attends to, in order, by row.

    Args:
      store: the store, with the block in it.
      index: [b] position of the block.
      width: its tokens.
    """
    block = model.TokenBlock(jnp.zeros((ROWS, width), jnp.int32), place(index, "batch"))
    mask = store.mask(block).with_window((WINDOW, WINDOW))
    keys, values = map(np.asarray, store.read(block, "float32"))
    shown = np.asarray(mask.materialize())
    return [
        [(keys[b][:, shown[b, q]], values[b][:, shown[b, q]]) for q in range(width)]
        for b in range(ROWS)
    ]


def assert_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits, levels", [(8, 127), (4, 7)])
def test_a_vector_is_rounded_to_its_own_scale(bits, levels):
    (x, _) = vectors(6)
    use_one_device()
    slots = cache_slots.quantize_slots(jnp.asarray(x), bits)
    back = np.asarray(cache_slots.read_slots(slots, "float32"))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(slots.scales, largest / levels, rtol=1e-6)
    integers = np.round(x.astype(np.float64) / (largest / levels))
    np.testing.assert_allclose(back, integers * (largest / levels), rtol=1e-5, atol=1e-6)
    assert slots.integers.dtype == np.int8 and slots.integers.shape[-1] == SIZE * bits // 8


def test_a_vector_of_zeros_stays_zero_and_an_odd_size_is_refused():
    use_one_device()
    slots = cache_slots.quantize_slots(jnp.zeros((1, 1, 1, SIZE)), 4)
    np.testing.assert_array_equal(cache_slots.read_slots(slots, "float32"), 0)
    with pytest.raises(ValueError, match=r"head_dim is 5: choose int8 for Decode\.kv_cache"):
        cache_slots.empty_slots((1, 1, 1, 5), "float32", 4)


@pytest.mark.parametrize("name", FORMS)
def test_a_block_reads_every_token_that_its_window_reaches(name):
    use_one_device()
    bits = FORMS[name].bits
    pair = vectors(LENGTH)
    store, start = windowed_store(FORMS[name]), 0
    for width in (1, 3, 4, 2, 4, 1, 4, 3):
        index = np.array([start, start])
        store = append(store, pair[:, :, :, start : start + width], index)
        stored = [
            x if bit is None else np.asarray(cache_slots.read_slots(quantize(x, bit), "float32"))
            for x, bit in zip(pair, bits, strict=True)
        ]
        for b, row in enumerate(visible(store, index, width)):
            for q, (keys, values) in enumerate(row):
                near = slice(max(start + q - WINDOW, 0), start + q + 1)
                np.testing.assert_array_equal(keys, stored[0][b][:, near])
                np.testing.assert_array_equal(values, stored[1][b][:, near])
        start += width


def quantize(x, bits):
    return cache_slots.quantize_slots(jnp.asarray(x), bits)


@pytest.mark.parametrize("name", FORMS)
def test_rolling_back_by_length_leaves_no_trace(name):
    """A block of drafts, of which rows keep 1 and 3 tokens: the next block reads what it would."""
    use_one_device()
    pair, drafts = vectors(16), vectors(BLOCK, seed=1)
    store, start = windowed_store(FORMS[name]), np.array([9, 9])
    for index in (0, 4, 8):
        width = min(BLOCK, 9 - index)
        store = append(store, pair[:, :, :, index : index + width], start * 0 + index)
    kept = np.array([1, 3])
    block = drafts.copy()
    rows = [block[:, b, :, : kept[b]] for b in range(ROWS)]
    drafted = append(store, drafts, start)
    following = pair[:, :, :, 12:16]
    ours = visible(append(drafted, following, start + kept), start + kept, BLOCK)
    for b in range(ROWS):
        plain = store
        for i in range(kept[b]):
            one = np.repeat(rows[b][:, None, :, i : i + 1], ROWS, axis=1)
            plain = append(plain, one, start + i)
        index = start * 0 + 9 + kept[b]
        theirs = visible(append(plain, following, index), index, BLOCK)
        assert_same(ours[b], theirs[b])


@pytest.mark.parametrize("name", FORMS)
def test_a_path_of_a_tree_is_left_as_a_chain_would_leave_it(name):
    use_one_device()
    pair, tree = vectors(10), vectors(BLOCK, seed=1)
    store = windowed_store(FORMS[name])
    for index in (0, 4, 8):
        width = min(BLOCK, 10 - index)
        store = append(store, pair[:, :, :, index : index + width], np.array([index] * 2))
    start, path = np.array([10, 10]), np.array([[0, 2, 3], [0, 1, 3]])
    moved = append(store, tree, start).compact(place(start, "batch"), place(path, "batch length"))
    chain = np.stack([tree[:, b][:, :, path[b]] for b in range(ROWS)], axis=1)
    assert_same(
        visible(append(moved, tree[:, :, :, :1], start + 3), start + 3, 1),
        visible(append(append(store, chain, start), tree[:, :, :, :1], start + 3), start + 3, 1),
    )


@pytest.mark.parametrize("name", FORMS)
def test_whole_rows_are_taken_over_at_any_length(name):
    use_one_device()
    pair, form = vectors(20), FORMS[name]
    whole = append(
        model.empty_cache(WINDOWED, ROWS, 20, scan=False, form=form._replace(block=0))[0],
        pair,
        np.zeros(ROWS, int),
    )
    length = place([17, 2], "batch")
    taken = windowed_store(form).load(whole, length)
    again = windowed_store(form).load(taken, length)
    for b, count in enumerate([17, 2]):
        store = windowed_store(form)
        for i in range(count):
            store = append(store, pair[:, :, :, i : i + 1], np.array([i, i]))
        for each in (taken, again):
            index = np.array([count, count])
            ours = visible(append(each, pair[:, :, :, :2], index), index, 2)[b]
            theirs = visible(append(store, pair[:, :, :, :2], index), index, 2)[b]
            assert_same(ours, theirs)


@pytest.mark.parametrize("name, share", [("int8", 0.25 + 1 / 64), ("int8:int4", 0.1875 + 1 / 64)])
def test_bytes_are_those_of_the_integers_and_a_scale_for_each_token_and_head(name, share):
    use_one_device()
    cfg = toy_model("decoder_only", head_dim=64)

    def size(form):
        cache = jax.eval_shape(
            functools.partial(model.empty_cache, cfg, 2, 64, scan=False, form=form)
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    assert size(parse_kv_cache(name)) == share * size(CacheFormat())


def test_a_ring_equals_the_mask_bitwise():
    """The same text, log-probabilities and all, in 3 times the room of the window and more."""
    use_one_device()
    params = decoding.prepare_params(WINDOWED, lively(WINDOWED))
    decode = config.Decode(max_new_tokens=128, logprobs=2)
    request = decoding.make_request(WINDOWED, [[5, 9, 33], [7] * 40], decode, eos=-1)
    program = generation.make_program(WINDOWED, decode)
    ring, whole = (
        generation.compiled_generate(
            program._replace(kv_cache=form),
            params,
            generation.place_request(request),
            generation.make_rules(request, decode),
            generation.make_length_penalty(decode),
            None,
        )
        for form in (program.kv_cache, CacheFormat())
    )
    assert program.kv_cache.block + WINDOW < 128
    assert_same(ring, whole)


LAYOUTS = {
    "encoder_decoder": (toy_model("encoder_decoder", positions="relative", layers=1), 24),
    # Long enough for a ring.
    "decoder_only": (WINDOWED, 96),
}
COMPRESSED = toy_model("decoder_only", positions="relative", kv_heads=HEADS, layers=1)
CASES = {
    **{layout: (*case, "int8:int4") for layout, case in LAYOUTS.items()},
    "checkpoints": (COMPRESSED, 192, "int8+checkpoints:4:64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_same_with_drafts_and_in_any_company(name):
    """Self- and cross-attention in int8 and int4."""
    use_one_device()
    cfg, length, kv_cache = CASES[name]
    params = decoding.prepare_params(cfg, lively(cfg))
    decode = config.Decode(max_new_tokens=length, kv_cache=kv_cache)
    examples = [[5, 9, 33], [7] * 20, [40, 41, 40, 41], [3]]

    def generate(decode, rows=(0, 1, 2, 3), drafting=generation.PLAIN):
        request = decoding.make_request(
            cfg, [examples[row] for row in rows], decode, rows=list(rows), eos=-1
        )
        return decoding.generate(cfg, params, request, decode, drafting)

    plain = generate(decode)
    drafted = generate(decode, drafting=decoding.Drafting(lookup.Lookup()))
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert drafted.steps < plain.steps
    np.testing.assert_array_equal(generate(decode, (1,)).tokens[0], plain.tokens[1])
    computed = generate(dataclasses.replace(decode, kv_cache="auto"))
    assert not np.array_equal(computed.log_probability, plain.log_probability)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    params = decoding.prepare_params(cfg, lively(cfg))
    np.testing.assert_array_equal(generate(decode).tokens, plain.tokens)


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"Decode\.kv_cache 'int2' is not one of auto, int8, int4"):
        config.Decode(kv_cache="int2")
    with pytest.raises(ValueError, match="such as int8:int4"):
        config.Decode(kv_cache="int8:")
