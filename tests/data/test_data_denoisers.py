# SPDX-License-Identifier: Apache-2.0
"""Laws of every denoiser: the text comes back, lengths are kept and filled, rates are right."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reconstruction import restored, rows

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.data import objectives, randomness
from t5x_lite.tokenizers import extended, sentencepiece_training, vocabularies

MODES = ("[NLU]", "[NLG]", "[S2S]")
PIECES = sentencepiece_training.train_sentencepiece(
    ["The quick brown fox.", "def f(x):\n    return  x + 1\n"] * 30, 300
)
VOCABULARIES = {
    "bytes": vocabularies.ByteVocabulary(extra_ids=30),
    "grown": extended.extend_vocabulary(
        vocabularies.ByteVocabulary(), (*MODES, "<pre>", "<suf>", "<mid>"), 30
    ),
    "pieces": extended.extend_vocabulary(vocabularies.SentencePieceVocabulary(PIECES), MODES, 30),
    "few": extended.extend_vocabulary(vocabularies.ByteVocabulary(), MODES, 3),
}
UNICODE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), min_size=1, max_size=80
)
MODE = st.sampled_from([None, "[NLU]", "a mode that is not a name: é"])
SPANS = st.builds(
    config.SpanCorruption, st.floats(0.02, 0.95), st.floats(1, 20), MODE, st.just("cap")
)
SHARES = st.builds(config.PrefixLM, st.floats(0.02, 0.5), st.just("uniform"), MODE)
FIXED = st.builds(config.PrefixLM, st.floats(0.02, 0.98), st.just("fixed"), MODE)
PREFIX = st.builds(config.PrefixLM, mode=MODE)
MIDDLE = st.builds(config.FillInTheMiddle, st.sampled_from(["psm", "spm"]), st.none(), MODE)
ANY = st.one_of(SPANS, SHARES, FIXED, PREFIX, MIDDLE)


def fitted(objective, fit, vocabulary):
    """Preprocessor of an objective, or None where no window fits.

    Args:
      objective: its config.
      fit: limits of the rows.
      vocabulary: of the text.
    """
    try:
        return objectives.make_preprocessor(objective, fit, vocabulary)
    except ValueError as error:
        assert "too short" in str(error)
        return None


@settings(max_examples=300, deadline=None)
@given(
    ANY,
    st.sampled_from([*VOCABULARIES]),
    st.tuples(
        st.integers(2, 90), st.integers(2, 90), st.sampled_from(["encoder_decoder", "decoder_only"])
    ),
    UNICODE,
    st.integers(0, 2**63),
)
def test_text_is_reconstructed_exactly_by_every_denoiser(objective, name, fit, text, seed):
    vocabulary, fit = VOCABULARIES[name], windows.LengthLimits(*fit)
    preprocessor = fitted(objective, fit, vocabulary)
    assume(preprocessor is not None)
    whole = vocabulary.encode(text + "ab")
    ids = np.array(whole[: preprocessor.window])
    inputs, targets = preprocessor.parts(np.stack([ids] * 3), randomness.keys(seed, np.arange(3)))
    for source, target in zip(rows(inputs), rows(targets), strict=True):
        if fit.layout == "encoder_decoder" or isinstance(objective, config.SpanCorruption):
            assert len(source) <= fit.inputs and len(target) <= fit.targets
        assert len(source) + len(target) <= fit.inputs + fit.targets
        back = restored(preprocessor, source, target)
        assert back == ids.tolist()
        if len(ids) == len(whole):
            assert vocabulary.decode(back) == text + "ab"


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(SPANS, FIXED),
    st.integers(2, 48),
    st.integers(2, 48),
    st.sampled_from([*VOCABULARIES]),
)
def test_the_window_is_the_longest_that_fits_by_trying_all(objective, most_in, most_out, name):
    vocabulary, fit = VOCABULARIES[name], windows.LengthLimits(most_in, most_out, "encoder_decoder")
    preprocessor = fitted(objective, fit, vocabulary)
    any_fit = windows.LengthLimits(10_000, 10_000, "encoder_decoder")
    free = objectives.make_preprocessor(objective, any_fit, vocabulary)
    sizes = {}
    for tokens in range(2, most_in + most_out + 2):
        text = np.full((1, tokens), 7)
        inputs, targets = free.parts(text, np.zeros(1, np.uint64))
        sizes[tokens] = len(inputs.tokens), len(targets.tokens)
    fits = [n for n, (a, b) in sizes.items() if a <= most_in and b <= most_out]
    assert (preprocessor.window if preprocessor else 0) == max(fits, default=0)
    # Whatever is shorter fits too, and one token more would be one too many on a side.
    assert fits == list(range(2, max(fits, default=1) + 1))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(SHARES, PREFIX, MIDDLE),
    st.tuples(
        st.integers(2, 24), st.integers(2, 24), st.sampled_from(["encoder_decoder", "decoder_only"])
    ),
)
def test_drawn_splits_keep_to_the_lengths_and_fill_a_side_at_the_extreme(objective, fit):
    fit = windows.LengthLimits(*fit)
    preprocessor = fitted(objective, fit, VOCABULARIES["grown"])
    assume(preprocessor is not None)
    text = np.full((4000, preprocessor.window), 7)
    inputs, targets = preprocessor.parts(text, randomness.keys(1, np.arange(4000)))
    if fit.layout == "decoder_only":
        assert (inputs.lengths + targets.lengths == fit.row).all()
        return
    most = int(inputs.lengths.max()), int(targets.lengths.max())
    assert most[0] <= fit.inputs and most[1] <= fit.targets
    # The plain prefix LM's window is the longer side, one of which is always in the inputs or not.
    slack = 1 if isinstance(objective, config.PrefixLM) and objective.share is None else 0
    if isinstance(objective, config.PrefixLM) and objective.share is not None:
        longer = dataclasses.replace(preprocessor, window=preprocessor.window + 1)
        least, over = longer.targets(longer.window)
        mode = len(preprocessor.mode)
        assert longer.window - least + mode > fit.inputs or over > fit.targets
    else:
        assert most[0] >= fit.inputs - slack or most[1] >= fit.targets - slack


@pytest.mark.parametrize("density, span", [(0.15, 3), (0.5, 8), (0.15, 32), (0.5, 64)])
def test_noise_and_span_lengths_are_those_asked_for(density, span):
    fit = windows.LengthLimits(1024, 1024, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(
        config.SpanCorruption(density, span), fit, vocabularies.ByteVocabulary(extra_ids=300)
    )
    mask = preprocessor.mask(preprocessor.window, randomness.keys(5, np.arange(400)))
    assert mask.mean() == pytest.approx(density, abs=1 / preprocessor.window)
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int), axis=1)
    sizes = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    # The number of spans is a whole one: half a span is what rounding may add or take.
    spans = density * preprocessor.window / span
    assert sizes.mean() == pytest.approx(span, rel=0.6 / spans)
    # A part of a uniform composition of n into s has variance (n/s)^2 (s-1)/(s+1) (1 - s/n).
    n, s = int(mask[0].sum()), int((edges[0] == 1).sum())
    variance = (n / s) ** 2 * (s - 1) / (s + 1) * (1 - s / n)
    assert sizes.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_uniform_split_has_the_share_asked_for_on_average(share):
    fit = windows.LengthLimits(512, 512, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(config.PrefixLM(share), fit, VOCABULARIES["bytes"])
    count = 20_000
    text = np.full((count, preprocessor.window), 7, np.int32)
    _, targets = preprocessor.parts(text, randomness.keys(2, np.arange(count)))
    most = 2 * share * preprocessor.window
    sigma = most / np.sqrt(12 * count)
    assert abs(targets.lengths.mean() - share * preprocessor.window) < 4 * sigma + 0.5
    assert targets.lengths.min() == 1 and targets.lengths.max() == round(most) - 1


def test_every_middle_is_equally_likely():
    count = 60_000
    begin, length = objectives.draw_middles(6, 2, 4, randomness.keys(3, np.arange(count)))
    assert (begin >= 0).all() and (begin + length <= 6).all()
    _, counts = np.unique(np.stack([begin, length]), axis=1, return_counts=True)
    assert len(counts) == 5 + 4 + 3
    assert np.abs(counts - count / 12).max() < 4 * np.sqrt(count / 12)


def test_capped_spans_hide_as_much_in_fewer_and_longer_spans():
    fit = windows.LengthLimits(200, 200, "encoder_decoder")
    objective = config.SpanCorruption(0.5, 3.0, overflow="cap")
    capped = objectives.make_preprocessor(objective, fit, vocabularies.ByteVocabulary(extra_ids=7))
    mask = capped.mask(capped.window, randomness.keys(1, np.arange(20)))
    starts = mask[:, 1:] & ~mask[:, :-1]
    assert (starts.sum(axis=1) == 7).all()
    assert (mask.sum(axis=1) == round(0.5 * capped.window)).all()
    with pytest.raises(ValueError, match='hides .* spans.*7 sentinels.*overflow = "cap"'):
        plain = dataclasses.replace(objective, overflow="fail")
        objectives.make_preprocessor(plain, fit, vocabularies.ByteVocabulary(extra_ids=7))


def test_marks_by_name_and_a_mode_stand_where_they_should():
    objective = config.FillInTheMiddle("psm", ("<pre>", "<suf>", "<mid>"), "[S2S]")
    vocabulary = VOCABULARIES["grown"]
    preprocessor = objectives.make_preprocessor(
        objective, windows.LengthLimits(40, 40, "encoder_decoder"), vocabulary
    )
    (text,) = np.array([vocabulary.encode("some text to read")])
    inputs, targets = preprocessor.parts(text[None], randomness.keys(4, np.arange(1)))
    decoded = vocabulary.decode(inputs.tokens)
    prefix, suffix = decoded.removeprefix("[S2S]<pre>").removesuffix("<mid>").split("<suf>")
    assert prefix + vocabulary.decode(targets.tokens) + suffix == "some text to read"


def test_an_encoder_alone_reads_the_mode_and_is_not_asked_for_it():
    objective = config.SpanCorruption(mode="[NLU]")
    preprocessor = objectives.make_preprocessor(
        objective, windows.LengthLimits(0, 50, "encoder_only"), VOCABULARIES["grown"]
    )
    text = np.random.default_rng(0).integers(3, 259, (4, preprocessor.window))
    inputs, targets, weights = preprocessor(text, randomness.keys(1, np.arange(4)))
    inputs, targets, weights = (
        each.reshape(4, 50) for each in (inputs.tokens, targets.tokens, weights)
    )
    assert (inputs[:, 0] == 259).all() and (weights[:, 0] == 0).all()
    np.testing.assert_array_equal(targets[:, 1:], text)
    np.testing.assert_array_equal(inputs[:, 1:] != text, weights[:, 1:] == 1)


def test_windows_of_the_published_mixtures_fit_512_tokens_exactly():
    fit = windows.LengthLimits(512, 512, "encoder_decoder")
    for span, density in [(3, 0.15), (8, 0.15), (12, 0.5), (32, 0.15), (32, 0.5), (64, 0.5)]:
        tokens = windows.longest_window(config.SpanCorruption(density, span), fit)
        shape = windows.span_shape(config.SpanCorruption(density, span), tokens, 0, 999)
        assert max(shape.inputs, shape.targets) in (511, 512)
    fixed = config.PrefixLM(0.75, "fixed")
    tokens = windows.longest_window(fixed, fit)
    assert windows.target_range(fixed, tokens, fit, 0) == (512, 512)


@pytest.mark.parametrize("text", [2, 9, 30])
def test_infilling_fills_both_sides_where_they_have_room_for_as_much_text(text):
    objective = config.FillInTheMiddle(mode="[S2S]")
    # A mode and three marks before the inputs, an end after the targets.
    fit = windows.LengthLimits(text + 4, text + 1, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(objective, fit, VOCABULARIES["grown"])
    assert preprocessor.window == text + 1
    filler = np.full((3000, preprocessor.window), 7)
    inputs, targets = preprocessor.parts(filler, randomness.keys(1, np.arange(3000)))
    assert inputs.lengths.max() == fit.inputs and targets.lengths.max() == fit.targets
