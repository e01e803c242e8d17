# SPDX-License-Identifier: Apache-2.0
"""Laws of span corruption, prefix LM and causal LM."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.data import objectives, randomness, spans
from t5x_lite.data.ragged import Ragged
from t5x_lite.tokenizers import vocabularies

BYTES = vocabularies.ByteVocabulary(extra_ids=100)

# (tokens, targets, spans) for inputs of 512, 1024 and 2048, as computed from t5's own helper.
TABLE = {
    (512, 0.15, 3): (568, 114, 28),
    (512, 0.15, 8): (588, 100, 11),
    (512, 0.5, 3): (766, 512, 128),
    (512, 0.5, 8): (908, 512, 57),
    (512, 0.15, 12): (593, 97, 7),
    (512, 0.5, 12): (944, 512, 39),
    (512, 0.15, 32): (598, 94, 3),
    (512, 0.5, 32): (990, 512, 16),
    (512, 0.15, 64): (600, 92, 1),
    (512, 0.5, 64): (1006, 512, 8),
    (1024, 0.15, 3): (1137, 229, 57),
    (1024, 0.15, 8): (1178, 200, 22),
    (1024, 0.5, 3): (1534, 1024, 256),
    (1024, 0.5, 8): (1818, 1024, 114),
    (1024, 0.15, 12): (1186, 194, 15),
    (1024, 0.5, 12): (1888, 1024, 79),
    (1024, 0.15, 32): (1197, 187, 6),
    (1024, 0.5, 32): (1984, 1024, 31),
    (1024, 0.15, 64): (1200, 184, 3),
    (1024, 0.5, 64): (2014, 1024, 16),
    (2048, 0.15, 3): (2274, 456, 114),
    (2048, 0.15, 8): (2357, 399, 44),
    (2048, 0.5, 3): (3070, 2048, 512),
    (2048, 0.5, 8): (3638, 2048, 228),
    (2048, 0.15, 12): (2373, 387, 30),
    (2048, 0.5, 12): (3778, 2048, 158),
    (2048, 0.15, 32): (2395, 371, 11),
    (2048, 0.5, 32): (3970, 2048, 62),
    (2048, 0.15, 64): (2401, 367, 6),
    (2048, 0.5, 64): (4030, 2048, 32),
}


def rows(ragged: Ragged) -> list[np.ndarray]:
    return np.split(ragged.tokens, np.cumsum(ragged.lengths)[:-1])


def restored(inputs: np.ndarray, targets: np.ndarray, lowest: int) -> list[int]:
    """Restores the text from both parts: each sentinel of one stands for a run of the other.

    Args:
      inputs: ids of the inputs.
      targets: ids of the targets.
      lowest: id of the lowest sentinel.
    """
    runs: dict[int, list[int]] = {}
    for token in targets:
        if token >= lowest:
            runs[int(token)] = run = []
        else:
            run.append(int(token))
    text = []
    for token in inputs:
        text += runs[int(token)] if token >= lowest else [int(token)]
    return text


@pytest.mark.parametrize("case", TABLE)
def test_the_longest_window_that_fits_is_that_of_t5(case):
    length, density, span = case
    tokens, targets, _ = TABLE[case]
    objective, fit = (
        config.SpanCorruption(density, span),
        windows.LengthLimits(length, targets, "encoder_decoder"),
    )
    assert windows.longest_window(objective, fit) == tokens


cases = st.integers(2, 200), st.floats(0.05, 0.9), st.floats(1, 10), st.integers(0, 2**63)


def corrupted(text, density, span, keys, top=10_000):
    """Corrupts windows of text.

    Args:
      text: token ids [b t].
      density: share of hidden tokens.
      span: mean length of a hidden span.
      keys: one uint64 per window [b].
      top: id of the first sentinel; the others follow downwards.
    """
    mask = spans.noise_mask(
        text.shape[1], *windows.noise_and_spans(text.shape[1], density, span), keys
    )
    return spans.corrupt(text, mask, top - np.arange(text.shape[1]))


@settings(max_examples=80, deadline=None)
@given(*cases)
def test_inputs_and_targets_give_the_text_back(tokens, density, span, seed):
    text = np.random.default_rng(0).integers(3, 259, (3, tokens))
    keys = randomness.keys(seed, np.arange(3))
    inputs, targets = corrupted(text, density, span, keys)
    for row, source, target in zip(text, rows(inputs), rows(targets), strict=True):
        np.testing.assert_array_equal(restored(source, target, 10_000 - tokens), row)


@settings(max_examples=80, deadline=None)
@given(*cases)
def test_noise_is_what_the_density_asks_in_spans_that_begin_after_text(tokens, density, span, seed):
    noise, count = windows.noise_and_spans(tokens, density, span)
    mask = spans.noise_mask(tokens, noise, count, randomness.keys(seed, np.arange(4)))
    assert mask.shape == (4, tokens)
    assert (mask.sum(axis=1) == noise).all()
    assert not mask[:, 0].any()
    starts = mask[:, 1:] & ~mask[:, :-1]
    assert (starts.sum(axis=1) == count).all()


def test_every_cut_into_parts_is_equally_likely():
    parts = spans.segmentation(5, 3, randomness.keys(1, np.arange(6000)))
    _, counts = np.unique(parts, axis=0, return_counts=True)
    assert len(counts) == 6  # 4 choose 2
    assert counts.max() < 1.25 * counts.min()


def test_sentinels_count_down_from_the_top_of_the_vocabulary():
    preprocessor = objectives.make_preprocessor(
        config.SpanCorruption(), windows.LengthLimits(64, 32, "encoder_decoder"), BYTES
    )
    inputs, targets = preprocessor.parts(
        np.full((1, preprocessor.window), 5), np.array([9], np.uint64)
    )
    count = int((inputs.tokens > 258).sum())
    expected = BYTES.size - 1 - np.arange(count)
    np.testing.assert_array_equal(inputs.tokens[inputs.tokens > 258], expected)
    np.testing.assert_array_equal(targets.tokens[targets.tokens > 258], expected)


@pytest.mark.parametrize("density, span", [(0.15, 3.0), (0.5, 3.0), (0.5, 8.0), (0.15, 32.0)])
def test_a_full_window_fills_the_inputs_exactly(density, span):
    objective = config.SpanCorruption(density, span)
    fit = windows.LengthLimits(128, 128, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(
        objective, fit, vocabularies.ByteVocabulary(extra_ids=300)
    )
    inputs, targets = preprocessor.parts(
        np.full((2, preprocessor.window), 5), np.arange(2, dtype=np.uint64)
    )
    assert (inputs.lengths <= 128).all() and (inputs.lengths >= 127).all()
    assert (targets.lengths <= 128).all()
    assert (inputs.tokens[np.cumsum(inputs.lengths) - 1] == BYTES.eos).all()
    assert (targets.tokens[np.cumsum(targets.lengths) - 1] == BYTES.eos).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(2, 60),
    st.sampled_from(["encoder_decoder", "decoder_only"]),
)
def test_prefix_lm_splits_the_text_and_keeps_to_the_lengths(most_in, most_out, piece, layout):
    fit = windows.LengthLimits(most_in, most_out, layout)
    preprocessor = objectives.make_preprocessor(config.PrefixLM(), fit, BYTES)
    tokens = min(piece, preprocessor.window)
    text = np.arange(5 * tokens).reshape(5, tokens)
    inputs, targets = preprocessor.parts(text, randomness.keys(3, np.arange(5)))
    assert (inputs.lengths >= 1).all() and (targets.lengths >= 1).all()
    if layout == "encoder_decoder":
        assert inputs.lengths.max() <= most_in and targets.lengths.max() <= most_out
    joined = [np.concatenate(both) for both in zip(rows(inputs), rows(targets), strict=True)]
    np.testing.assert_array_equal(joined, text)


def test_prefix_lm_draws_every_place():
    fit = windows.LengthLimits(8, 8, "decoder_only")
    preprocessor = objectives.make_preprocessor(config.PrefixLM(), fit, BYTES)
    inputs, _ = preprocessor.parts(np.zeros((4000, 16), int), randomness.keys(3, np.arange(4000)))
    counts = np.bincount(inputs.lengths, minlength=17)[1:16]
    assert counts.min() > 0.6 * 4000 / 15 and counts.max() < 1.5 * 4000 / 15


def test_masking_predicts_only_what_is_hidden():
    fit = windows.LengthLimits(0, 50, "encoder_only")
    preprocessor = objectives.make_preprocessor(config.SpanCorruption(), fit, BYTES)
    text = np.random.default_rng(0).integers(3, 259, (4, 50))
    inputs, targets, weights = preprocessor(text, randomness.keys(1, np.arange(4)))
    np.testing.assert_array_equal(targets.tokens, text.reshape(-1))
    hidden = inputs.tokens == BYTES.size - 1
    np.testing.assert_array_equal(hidden, weights == 1)
    np.testing.assert_array_equal(inputs.tokens[~hidden], targets.tokens[~hidden])


def test_a_named_token_masks_in_place_of_a_sentinel():
    """Masked next-token prediction needs no sentinel, and here never hides two tokens in a row."""
    fit, bare = windows.LengthLimits(0, 50, "encoder_only"), vocabularies.ByteVocabulary()
    masked = config.SpanCorruption(0.2, 1.0, mask="_")
    text = np.random.default_rng(0).integers(3, 90, (4, 50))
    preprocessor = objectives.make_preprocessor(masked, fit, bare)
    inputs, targets, weights = preprocessor(text, randomness.keys(1, np.arange(4)))
    hidden = weights.reshape(4, 50) == 1
    assert (hidden.sum(axis=1) == 10).all() and not (hidden[:, 1:] & hidden[:, :-1]).any()
    wanted = np.where(hidden, bare.encode("_")[0], text)
    np.testing.assert_array_equal(inputs.tokens.reshape(4, 50), wanted)
    np.testing.assert_array_equal(targets.tokens.reshape(4, 50), text)


@pytest.mark.parametrize(
    "objective, fit, vocabulary, message",
    [
        (
            config.SpanCorruption(mask="__"),
            (0, 9, "encoder_only"),
            BYTES,
            "'__' is 2 ids, not one",
        ),
        (
            config.SpanCorruption(mask="_"),
            (64, 64, "encoder_decoder"),
            BYTES,
            "SpanCorruption.mask is for an encoder alone",
        ),
        (
            config.SpanCorruption(),
            (3, 2, "encoder_decoder"),
            BYTES,
            r"inputs 3, targets 2.*too short",
        ),
        (
            config.SpanCorruption(0.5),
            (512, 512, "encoder_decoder"),
            BYTES,
            "128 spans.*100 sentinels",
        ),
        (
            config.SpanCorruption(),
            (0, 100, "encoder_decoder"),
            BYTES,
            r'needs Data.lengths\["inputs"\]',
        ),
        (
            config.SpanCorruption(),
            (0, 9, "encoder_only"),
            vocabularies.ByteVocabulary(),
            "needs a sentinel",
        ),
        (config.PrefixLM(), (0, 9, "encoder_only"), BYTES, "for a model with a decoder"),
    ],
)
def test_an_objective_that_cannot_fit_is_refused_with_the_remedy(
    objective, fit, vocabulary, message
):
    with pytest.raises(ValueError, match=message):
        objectives.make_preprocessor(objective, windows.LengthLimits(*fit), vocabulary)
