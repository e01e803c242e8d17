# SPDX-License-Identifier: Apache-2.0
"""Laws of rows that fork, and of the searches over them: against plain decoding and enumeration."""

import dataclasses
import functools
import gc
import itertools

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model
from decoding_laws import EXAMPLES, KINDS, NEVER, prepared_params, request_rows
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding, sharding
from t5x_lite.decoding import generation, search
from t5x_lite.decoding.drafters import lookup, recycling
from t5x_lite.decoding.forks import ForkedDecoder
from t5x_lite.decoding.request import SEED_STEP
from t5x_lite.decoding.search import SearchSettings
from t5x_lite.decoding.steering.stop_strings import StopTable

LENGTH, ROWS = 12, 3
DRAWN = config.Decode(max_new_tokens=LENGTH, temperature=1.2, top_k=30, seed=5)
DRAFTINGS = {
    "plain": generation.PLAIN,
    "lookup": decoding.Drafting(lookup.Lookup()),
    "recycling": decoding.Drafting(recycling.Recycling()),
}
EXAMPLE = 3  # of EXAMPLES


@pytest.fixture(autouse=True)
def one_device():
    use_one_device()


def forked(kind, drafting=generation.PLAIN, decode=DRAWN, **options):
    """A decoder of one of EXAMPLES.

    Args:
      kind: the model.
      drafting: the drafter.
      decode: config of decoding.
      **options: delimiters of ForkedDecoder.
    """
    request = request_rows(kind, decode, order=(EXAMPLE,) * sharding.batch_shards())
    params = prepared_params(kind, jax.sharding.get_mesh())
    return ForkedDecoder(KINDS[kind], params, request, decode, drafting, **options)


def finish(decoder, forks, segment):
    """Texts of forks at the end, by a decoder, a segment at a time."""
    while True:
        forks, texts = decoder.advance(forks, segment)
        if all(texts.done):
            return texts


@functools.cache
def samples(kind, count=ROWS):
    """Samples of the same example by plain decoding."""
    use_one_device()
    decode = dataclasses.replace(DRAWN, n_best=count)
    params = prepared_params(kind, jax.sharding.get_mesh())
    request = request_rows(kind, decode, order=(EXAMPLE,))
    return decoding.generate(KINDS[kind], params, request, decode).tokens[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, drafter",
    mark_exhaustive(
        [(kind, name) for kind in ("encoder_decoder", "decoder_only") for name in DRAFTINGS],
        kept=[
            ("encoder_decoder", "plain"),
            ("encoder_decoder", "recycling"),
            ("decoder_only", "lookup"),
        ],
    ),
)
def test_rows_that_stop_and_fork_have_the_texts_of_plain_decoding(kind, drafter):
    decoder = forked(kind, DRAFTINGS[drafter])
    begun = decoder.begin(ROWS)
    assert finish(decoder, begun, 3).tokens == samples(kind)
    stopped, early = decoder.advance(begun, 4)
    assert [len(tokens) for tokens in early.tokens] == [4] * ROWS and not any(early.done)
    # The first row of each source goes on as it would have; the copy has the same beginning.
    mixed = finish(decoder, decoder.fork(stopped, [2, 0, 0]), 3).tokens
    assert mixed[:2] == [samples(kind)[2], samples(kind)[0]]
    assert mixed[2][:4] == mixed[1][:4] and mixed[2] != mixed[1]
    # A value: the rows that were taken from are as they were.
    assert finish(decoder, stopped, LENGTH).tokens == samples(kind)


@pytest.mark.slow
def test_a_copy_goes_on_as_its_text_with_its_seed_would_alone():
    kind, decoder = "decoder_only", forked("decoder_only")
    stopped, early = decoder.advance(decoder.begin(ROWS), 5)
    assert decoder.seeds == ROWS
    copies = finish(decoder, decoder.fork(stopped, [1, 1, 0], keep=False), LENGTH).tokens
    for number, source in enumerate([1, 1, 0]):
        seed = (DRAWN.seed + (ROWS + number) * SEED_STEP) % 2**32
        alone = dataclasses.replace(DRAWN, max_new_tokens=LENGTH - 5, seed=seed)
        prompt = [*EXAMPLES[EXAMPLE], *early.tokens[source]]
        request = decoding.make_request(KINDS[kind], [prompt], alone, rows=[EXAMPLE], eos=NEVER)
        params = prepared_params(kind, jax.sharding.get_mesh())
        result = decoding.generate(KINDS[kind], params, request, alone)
        assert copies[number] == [*early.tokens[source], *result.tokens[0, 0].tolist()]


@pytest.mark.slow
def test_rows_on_a_split_mesh_are_those_of_one_device():
    one = forked("encoder_decoder")
    stopped, _ = one.advance(one.begin(ROWS), 4)
    expected = finish(one, one.fork(stopped, [1, 1, 2]), 5).tokens
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = forked("encoder_decoder")
    stopped, early = split.advance(split.begin(ROWS), 4)
    assert len(early.tokens) == ROWS
    assert finish(split, split.fork(stopped, [1, 1, 2]), 5).tokens == expected


@pytest.mark.slow
def test_a_segment_ends_with_its_delimiter_and_the_text_goes_on():
    tokens = samples("decoder_only")[0]
    delimiter = tokens[5]
    following = np.array([[0, 1], [1, 1]], np.int32)
    classes = (np.arange(64) == delimiter).astype(np.int32)
    table = StopTable(following, classes, np.array(0, np.int32), np.array(1, np.int32))
    decoder = forked("decoder_only", DRAFTINGS["lookup"], delimiters=table)
    forks, lengths = decoder.begin(1), []
    while True:
        forks, texts = decoder.advance(forks, LENGTH)
        lengths.append(len(texts.tokens[0]))
        if texts.done[0]:
            break
    ends = [place + 1 for place, token in enumerate(tokens) if token == delimiter]
    assert lengths == sorted({*ends, LENGTH}) and texts.tokens[0] == tokens


# A model whose texts can be listed: 4 tokens, of which 3 ends a text.
TINY = toy_model("decoder_only", layers=1, vocab=4, positions="rotary")
END = 3
WHOLE = 16


@functools.cache
def tiny_params():
    use_one_device()
    return decoding.prepare_params(TINY, lively(TINY, seed=3))


def tiny(length, seed=0):
    """A decoder of the prompt (0, 2), greedily never: temperature 1.

    Args:
      length: most new tokens.
      seed: of the samples.
    """
    decode = config.Decode(max_new_tokens=length, temperature=1.0, seed=seed)
    request = decoding.make_request(TINY, [[0, 2]], decode, eos=END)
    return ForkedDecoder(TINY, tiny_params(), request, decode)


@functools.cache
def tiny_law(length):
    """Probability of every text of the model."""
    texts = [
        text
        for size in range(1, length + 1)
        for text in itertools.product(range(4), repeat=size)
        if END not in text[:-1] and (text[-1] == END or size == length)
    ]
    rows = [[0, 2]] * len(texts)
    scores = decoding.score(TINY, tiny_params(), rows, list(map(list, texts)))
    law = dict(zip(texts, np.exp(scores.log_probability.astype(np.float64)), strict=True))
    assert abs(sum(law.values()) - 1) < 1e-5
    return law


def value_of(text):
    """A number for a text, complete or not, of no order: 0 to -3."""
    return -3 * (hash((7, *text)) % 101) / 100


def judge_texts(texts):
    return [value_of(tokens) for tokens in texts.tokens]


def tilted(length):
    """The model's law times exp(value), renormalized."""
    weights = {text: p * np.exp(value_of(text)) for text, p in tiny_law(length).items()}
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def distance(results, law):
    """Total variation of texts from a law."""
    counts = dict.fromkeys(law, 0)
    for each in results:
        counts[tuple(each.texts.tokens[each.row])] += 1
    return sum(abs(counts[text] / len(results) - law[text]) for text in law) / 2


def test_smc_with_a_constant_judge_samples_plainly():
    kind = "encoder_decoder"
    settings = SearchSettings(particles=ROWS, segment=3)
    results = search.sample_particles(
        forked(kind), lambda texts: [7.0] * len(texts.tokens), settings
    )
    tokens = sorted(each.texts.tokens[each.row] for each in results)
    assert tokens == sorted(samples(kind)) and {each.value for each in results} == {7.0}


@pytest.mark.slow
@pytest.mark.parametrize("segment", [1, 2])
def test_smc_samples_the_renormalized_law(segment):
    results = search.sample_particles(
        tiny(3, seed=2), judge_texts, SearchSettings(particles=16384, segment=segment, seed=2)
    )
    assert distance(results, tilted(3)) < 0.045
    assert distance(results, tiny_law(3)) > 0.15  # or there is nothing to see


@pytest.mark.slow
def test_rejection_samples_the_renormalized_law_and_by_a_constant_judge_plainly():
    settings = SearchSettings(particles=1, segment=WHOLE, rounds=64)
    results = []
    for seed in range(1000):
        results += search.reject_segments(tiny(2, seed), judge_texts, settings._replace(seed=seed))
    assert distance(results, tilted(2)) < 0.06
    assert distance(results, tiny_law(2)) > 0.15
    (same,) = search.reject_segments(
        forked("encoder_decoder"), lambda texts: [0.0] * len(texts.tokens), settings
    )
    assert same.texts.tokens[same.row] == samples("encoder_decoder", 4)[0]


def test_the_best_of_n_is_the_best_sample_and_by_segments_the_best_beginning_is_kept():
    def judge(texts):
        return [-float(sum(tokens)) for tokens in texts.tokens]

    every = samples("decoder_only")
    settings = SearchSettings(particles=ROWS, segment=LENGTH)
    results = search.choose_best(forked("decoder_only"), judge, settings)
    assert [each.texts.tokens[each.row] for each in results] == sorted(every, key=sum)
    results = search.choose_best(forked("decoder_only"), judge, settings._replace(segment=4))
    assert results[0].texts.tokens[results[0].row][:4] == min((row[:4] for row in every), key=sum)


def test_puct_finds_the_best_leaf_of_a_tree():
    law = tiny_law(3)
    goal = min((text for text in law if len(text) == 3), key=law.get)

    def judge(texts):
        return [
            sum(1.0 for one, other in zip(tokens, goal, strict=False) if one == other)
            if tuple(tokens[:1]) == goal[:1]
            else 0.0
            for tokens in texts.tokens
        ]

    settings = SearchSettings(particles=4, segment=1, rounds=24)
    results = search.search_tree(tiny(3), judge, settings)
    assert tuple(results[0].texts.tokens[results[0].row]) == goal and results[0].value == 3
    assert [each.value for each in results] == sorted(
        (each.value for each in results), reverse=True
    )


def test_puct_sees_every_leaf_and_then_ends():
    texts_found = set()

    def judge(texts):
        texts_found.update(map(tuple, texts.tokens))
        return [float("-inf")] * len(texts.tokens)

    decoder = tiny(2)
    search.search_tree(decoder, judge, SearchSettings(particles=8, segment=1, rounds=2000))
    assert texts_found == set(tiny_law(2)) and decoder.row_passes < 16000


def test_systematic_resampling_copies_by_weight():
    draw = np.random.default_rng(0)
    log_weights = np.array([np.log(0.1), -np.inf, np.log(0.55), np.log(0.35)])
    counts = np.zeros(4)
    for _ in range(4000):
        rows = search.resample(log_weights, draw)
        copies = np.bincount(rows, minlength=4)
        assert copies.sum() == 4 and 2 <= copies[2] <= 3 and copies[1] == 0
        counts += copies
    np.testing.assert_allclose(counts / 16000, [0.1, 0, 0.55, 0.35], atol=0.01)
    assert search.resample(np.full(3, -np.inf), draw).tolist() == [0, 1, 2]
    assert search.effective_size(np.log([0.5, 0.25, 0.25])) == pytest.approx(8 / 3)
    assert search.effective_size(np.array([0.0, -np.inf])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    # All policies write their segments by one decoder, which is what a stop must leave clean.
    [
        pytest.param(name, marks=() if name == "smc" else pytest.mark.exhaustive)
        for name in search.POLICIES
    ],
)
def test_a_search_that_is_stopped_leaves_nothing(policy):
    calls = []

    def judge(texts):
        calls.append(len(texts.tokens))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [0.0] * len(texts.tokens)

    decoder = tiny(3)
    judge_settings = SearchSettings(particles=3, segment=1)
    decoder.advance(decoder.begin(1), 1)  # constants of programs stay
    gc.collect()
    before = len(jax.live_arrays())
    with pytest.raises(KeyboardInterrupt):
        search.POLICIES[policy](decoder, judge, judge_settings)
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.mark.slow
def test_rows_that_the_judge_drops_are_not_continued():
    def judge(texts):
        return [0.0 if tokens[0] == 2 else -np.inf for tokens in texts.tokens]

    settings = SearchSettings(particles=16, segment=1, rounds=50)
    for policy in (search.sample_particles, search.reject_segments, search.choose_best):
        results = policy(tiny(3), judge, settings)
        assert {each.texts.tokens[each.row][0] for each in results} == {2}, policy.__name__
