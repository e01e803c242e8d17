# SPDX-License-Identifier: Apache-2.0
"""Laws of masked blocks in batches: counts, weights and fill, and the bound that they train."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch, toy_model

from t5x_lite import config, data, model, sharding
from t5x_lite.batch import Batch, MaskedBlocks
from t5x_lite.data.canvas import BlockMasker, count_prompts, make_masker
from t5x_lite.data.layout import fill_ends
from t5x_lite.data.ragged import Ragged
from t5x_lite.evaluation import losses

EOS, MASK, BLOCK = 1, 0, 4


def masker_of(canvas, key=3):
    return BlockMasker(canvas, MASK, EOS, key)


def masked_groups(batch, masked):
    """For each block with targets: its targets and masks, as flat indices."""
    weighted = batch.loss_weights > 0
    keys = [
        np.arange(len(weighted))[:, None] + 0 * masked.canvas.blocks,
        batch.target_segments,
        masked.canvas.blocks,
    ]
    groups = {}
    for place in np.flatnonzero(weighted):
        groups.setdefault(tuple(int(each.flat[place]) for each in keys), []).append(place)
    return [np.array(each) for each in groups.values()]


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_each_block_has_a_number_of_masks_and_weights_that_sum_to_its_targets(layout):
    batch = toy_batch(layout, rows=400)
    masked = masker_of(config.Canvas(BLOCK)).mask(batch, np.arange(400))
    is_mask = masked.canvas.tokens != batch.targets
    np.testing.assert_array_equal(is_mask, masked.loss_weights > 0)
    assert np.all(masked.canvas.tokens[is_mask] == MASK)
    place = batch.target_positions - count_prompts(batch)
    np.testing.assert_array_equal(masked.canvas.blocks, np.where(place >= 0, place // BLOCK, place))
    counts = {}
    for group in masked_groups(batch, masked):
        assert len(group) <= BLOCK
        number = int(is_mask.flat[group].sum())
        assert 1 <= number
        np.testing.assert_allclose(masked.loss_weights.flat[group].sum(), len(group), rtol=1e-6)
        counts.setdefault(len(group), []).append(number)
    whole = np.bincount(counts[BLOCK], minlength=BLOCK + 1)[1:]
    expected = len(counts[BLOCK]) / BLOCK
    # Uniform over 1..4: within five deviations of a binomial.
    assert np.all(np.abs(whole - expected) < 5 * np.sqrt(expected))
    assert np.all(masked.canvas.text == batch.loss_weights)


def test_masks_depend_on_the_row_and_the_key_alone():
    batch = toy_batch("encoder_decoder")
    masker = masker_of(config.Canvas(BLOCK))
    whole = masker.mask(batch, np.arange(16, 24))
    half = masker.mask(
        Batch(*(each if each is None else each[4:] for each in batch)), np.arange(20, 24)
    )
    np.testing.assert_array_equal(whole.canvas.tokens[4:], half.canvas.tokens)
    other = dataclasses.replace(masker, key=4).mask(batch, np.arange(16, 24))
    assert np.any(other.canvas.tokens != whole.canvas.tokens)


def test_rates_and_drawn_blocks():
    batch = toy_batch("encoder_decoder", rows=200)
    one_pass = masker_of(config.Canvas(BLOCK, rates=(1.0, 1.0))).mask(batch, np.arange(200))
    np.testing.assert_array_equal(one_pass.loss_weights, batch.loss_weights)
    assert np.all(one_pass.canvas.tokens == MASK * (batch.loss_weights > 0))
    half = masker_of(config.Canvas(BLOCK, rates=(0.5, 0.5))).mask(batch, np.arange(200))
    for group in masked_groups(batch, half):
        assert (half.loss_weights.flat[group] > 0).sum() == np.ceil(len(group) / 2)
    sizes = config.Canvas(BLOCK, drawn_blocks=(1, 2))
    drawn = masker_of(sizes).mask(batch, np.arange(200)).canvas.blocks
    by_two, first = [], batch.target_positions == 2
    for row, column in np.argwhere(first):
        by_two.append(drawn[row, column] == 1)
        ids = drawn[row, column - 2 : column + 1]
        np.testing.assert_array_equal(ids, [0, 0, 1] if by_two[-1] else [0, 1, 2])
    assert 0.35 < np.mean(by_two) < 0.65


def test_targets_are_filled_up_with_ends_which_are_no_text():
    ragged = Ragged(np.array([5, 6, EOS, 7, EOS], np.int32), np.array([3, 2]))
    filled = fill_ends(ragged, EOS, np.array([4, 4]))
    np.testing.assert_array_equal(filled.tokens, [5, 6, EOS, EOS, 7, EOS, EOS, EOS])
    source = config.Data("cmudict_g2p", {"inputs": 32, "targets": 32})
    cfg = toy_model("encoder_decoder", vocab=128, canvas=config.Canvas(BLOCK))
    batches = data.open_batches(source, "encoder_decoder", 8, 0, model=cfg)
    batch = batches.at(3)
    for row in range(8):
        for segment in range(1, batch.target_segments[row].max() + 1):
            here = batch.target_segments[row] == segment
            ids, text = batch.targets[row][here], batch.canvas.text[row][here]
            length = ids.tolist().index(EOS) + 1
            assert len(ids) == -(-length // BLOCK) * BLOCK and np.all(ids[length:] == EOS)
            np.testing.assert_array_equal(text, np.arange(len(ids)) < length)
    again = data.open_batches(source, "encoder_decoder", 8, 0, host=1, hosts=2, model=cfg).at(3)
    np.testing.assert_array_equal(again.canvas.tokens, batch.canvas.tokens[4:])


def test_a_mask_token_of_the_vocabulary_is_refused_and_blocks_of_one_have_no_masks():
    class Vocabulary:
        eos, size = 1, 64

    cfg = toy_model("encoder_decoder", canvas=config.Canvas(BLOCK))
    with pytest.raises(ValueError, match="The mask token of Model.canvas, id 63, is a token of"):
        make_masker(cfg, Vocabulary, 0)
    bound = dataclasses.replace(cfg, canvas=config.Canvas(BLOCK, mask_token_id=62))
    assert make_masker(bound, Vocabulary, 0).mask_token_id == 62
    Vocabulary.size = 63
    assert make_masker(cfg, Vocabulary, 0).mask_token_id == 63
    Vocabulary.eos = 63
    with pytest.raises(ValueError, match="id 63, is a token of the vocabulary"):
        make_masker(cfg, Vocabulary, 0)
    single = dataclasses.replace(cfg, canvas=config.Canvas(1))
    assert make_masker(single, Vocabulary, 0) is None


def all_masks(ids):
    """Every number of masks and every set of so many places, with its probability."""
    size = len(ids)
    for count in range(1, size + 1):
        sets = [*itertools.combinations(range(size), count)]
        for places in sets:
            yield np.isin(np.arange(size), places), size / count, 1 / (size * len(sets))


def test_the_expected_loss_is_the_bound_of_a_random_order_in_float64():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg = toy_model("decoder_only", layers=1, canvas=config.Canvas(BLOCK))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: (0.3 * draw.normal(size=shape.shape)).astype(np.float32), model.shapes(cfg)
    )
    ids = draw.integers(2, 64, BLOCK)
    masks, shares, chances = map(np.array, zip(*all_masks(ids), strict=True))
    rows, ones = len(masks), np.ones((len(masks), BLOCK), np.int32)
    targets = np.tile(ids, (rows, 1)).astype(np.int32)
    tokens = np.where(masks, MASK, targets)
    weights = masks * shares[:, None]
    where = ones * np.arange(BLOCK, dtype=np.int32)
    canvas = MaskedBlocks(tokens, 0 * ones, ones.astype(np.float32))
    batch = Batch(targets, ones, where, weights.astype(np.float32), canvas=canvas)
    batch = batch._replace(prefix=ones < 0)
    placed = jax.tree.map(jnp.asarray, batch)
    logits = jax.jit(model.Transformer(cfg).apply)({"params": params}, placed)
    scores = np.array(logits, np.float64)
    nats = (
        np.log(np.exp(scores).sum(axis=-1))
        - np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    )
    sums = losses.target_sums(cfg, params, placed)
    np.testing.assert_allclose(sums.nats, np.sum(weights * nats), rtol=1e-5)
    assert sums.tokens == rows * BLOCK
    expected_loss = np.sum(chances[:, None] * weights * nats)
    index = {tuple(mask): row for row, mask in enumerate(masks.tolist())}
    orders, wanted = [*itertools.permutations(range(BLOCK))], 0.0
    for order in orders:
        for done, place in enumerate(order):
            left = tuple(i not in order[:done] for i in range(BLOCK))
            wanted += nats[index[left], place] / len(orders)
    np.testing.assert_allclose(expected_loss, wanted, rtol=1e-12)
