# SPDX-License-Identifier: Apache-2.0
"""Groups of beams that differ, and beams divided by a constraint's progress: by lists in Python."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding_beam import (
    EOS,
    KINDS,
    LENGTH,
    VOCABULARY,
    every_text,
    lively,
    of_table,
    penalized,
    table,
)
from test_decoding_loop import use_one_device

from t5x_lite import config, decoding, interactive, sharding
from t5x_lite.decoding import beam, generation, protocol, target
from t5x_lite.decoding.beam_ranking import LengthPenalty
from t5x_lite.decoding.beam_selection import BeamContinuations, choose_survivors
from t5x_lite.decoding.result import join_groups
from t5x_lite.decoding.steering.automaton import NEVER, TokenAutomaton
from t5x_lite.decoding.steering.constraints import count_tokens_left
from t5x_lite.decoding.steering.processor import Processors


@pytest.fixture(autouse=True)
def one_device():
    use_one_device()


@functools.cache
def search_program(beams, groups, banks):
    """A compiled search: (log-probabilities, prompts, alpha and diversity, rules) -> texts.

    Args:
      beams: k.
      groups: number of groups.
      banks: divides the beams by progress.
    """

    @jax.jit
    def run(logits, prompts, numbers, rules):
        search = beam.BeamSearch(
            beams, groups * beams, LengthPenalty(numbers[0]), groups, numbers[1], banks
        )
        stopping = protocol.StoppingCriteria(EOS, prompts.length + LENGTH)
        model = of_table(logits)._replace(vocab=VOCABULARY)
        context = protocol.DecodeContext(model, stopping, prompts, processors=Processors(rules))
        state = beam.initial_beams(context, search, (), LENGTH + 4)
        return join_groups(search, beam.run_beam_search(context, search, state))[0]

    return run


def run_search(logits, search, rules=()):
    """Returns (text, score) of the finished texts of one row, best first.

    Args:
      logits: log-probabilities of the toy.
      search: settings.
      rules: logits processors.
    """
    tokens = generation.shard_rows(np.zeros((1, 1), np.int32))
    prompts = target.Prompts(tokens, tokens[:, 0] + 1)
    numbers = jnp.float32(search.penalty.exponent), jnp.float32(search.diversity)
    program = search_program(search.beams, search.groups, search.banks)
    result = jax.device_get(program(logits, prompts, numbers, rules))
    texts = [
        tuple(row[1 : 1 + size].tolist())
        for row, size in zip(result.tokens[0], result.lengths[0], strict=True)
    ]
    return [pair for pair in zip(texts, result.score[0], strict=True) if np.isfinite(pair[1])]


def grow(logits, live, apart=lambda token: 0.0):
    """Texts that continue live ones by a token of logits, less what keeps it apart; best first."""
    grown = [
        ((*text, token), total + float(logits[len(text), (text or (0,))[-1], token]) - apart(token))
        for text, total in live
        for token in range(VOCABULARY)
    ]
    return sorted(grown, key=lambda pair: pair[1], reverse=True)


def group_search(logits, groups, size, penalty):
    """Group beam search of transformers 4.49 by lists: Hamming diversity, early stopping.

    Args:
      logits: table of the model.
      groups: number of groups.
      size: beams of a group.
      penalty: of a token for each group that has it.
    """
    live = [[((), 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    done = [False] * groups
    for _ in range(LENGTH):
        taken = collections.Counter()
        for group in range(groups):
            if done[group]:
                continue
            before = collections.Counter(taken)
            grown = grow(logits, live[group], lambda token, before=before: penalty * before[token])[
                : 2 * size
            ]
            finished[group] += [pair for pair in grown[:size] if pair[0][-1] == EOS]
            live[group] = [pair for pair in grown if pair[0][-1] != EOS][:size]
            taken.update(text[-1] for text, _ in live[group])
            done[group] = len(finished[group]) >= size
    texts = []
    for group in range(groups):
        left = [] if done[group] else live[group]
        scored = finished[group] + left
        texts += sorted(scored, key=lambda pair: pair[1], reverse=True)[:size]
    return sorted(texts, key=lambda pair: pair[1], reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("groups, size", [(2, 1), (3, 1), (2, 2)])
def test_groups_of_beams_are_those_of_a_group_search_by_lists(groups, size, penalty):
    for seed in range(4):
        logits = table(seed + 20)
        search = beam.BeamSearch(size, groups * size, LengthPenalty(0.0), groups, penalty)
        result, expected = run_search(logits, search), group_search(logits, groups, size, penalty)
        assert sorted(text for text, _ in result) == sorted(text for text, _ in expected)
        scores = [score for _, score in expected]
        np.testing.assert_allclose([score for _, score in result], scores, atol=1e-5)


def test_groups_differ_the_more_the_larger_the_penalty():
    def different(penalty):
        search = beam.BeamSearch(1, 4, LengthPenalty(0.0), 4, penalty)
        return np.mean([len({t for t, _ in run_search(table(s), search)}) for s in range(6)])

    assert different(0.0) == 1 < different(5.0)


def words_automaton(limit=LENGTH):
    """Texts that have the tokens 2 and 3, in any order: a state for each set of them."""
    following = np.full((4, VOCABULARY), -1, np.int32)
    for state in range(4):
        for token, bit in ((0, 0), (2, 1), (3, 2)):
            following[state, token] = state | bit
    left = count_tokens_left(following, np.where(np.arange(4) == 3, 1, NEVER))
    tokens_left = np.where(following >= 0, left[np.maximum(following, 0)] + 1, NEVER)
    following[3, EOS], tokens_left[3, EOS] = 3, 1
    return TokenAutomaton(
        following,
        tokens_left.astype(np.int32),
        np.arange(VOCABULARY, dtype=np.int32),
        generation.shard_rows(np.zeros(1, np.int32)),
        generation.shard_rows(np.array([limit], np.int32)),
    )


def state_of(text):
    return (2 in text) | (3 in text) << 1


def bank_search(logits, beams, automaton):
    """Beam search of logits whose beams are taken in turns from banks of an automaton, by lists."""
    left, shortest = automaton.tokens_left, automaton.tokens_left[0].min()
    live, finished = [((), 0.0)], []
    for step in range(LENGTH):
        banks = [[] for _ in range(beams)]
        for text, total in grow(logits, live):
            needs = left[state_of(text[:-1]), text[-1]]
            if needs <= LENGTH - step:
                bank = max(shortest + 1 - needs, 0) * beams // shortest
                banks[min(bank, beams - 1)].append((text, total))
        turns = [
            bank[turn] for turn in range(2 * beams) for bank in banks[::-1] if turn < len(bank)
        ][: 2 * beams]
        finished += [pair for pair in turns[:beams] if pair[0][-1] == EOS]
        live = [pair for pair in turns if pair[0][-1] != EOS][:beams]
        if len(finished) >= beams:
            break
    else:
        finished += live
    scored = [(text, penalized(logits, text, 0.6)) for text, _ in finished]
    return sorted(scored, key=lambda pair: pair[1], reverse=True)[:beams]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_banks_are_those_of_a_search_by_lists_and_every_text_has_the_words(beams):
    automaton = words_automaton()
    for seed in range(4):
        logits = table(seed + 30)
        search = beam.BeamSearch(beams, beams, LengthPenalty(jnp.float32(0.6)), banks=True)
        result = run_search(logits, search, (automaton,))
        expected = bank_search(logits, beams, automaton)
        assert [text for text, _ in result] == [text for text, _ in expected]
        np.testing.assert_allclose([s for _, s in result], [s for _, s in expected], atol=1e-5)
        assert all({2, 3} <= {*text} for text, _ in result)


@pytest.mark.slow
def test_with_banks_for_all_the_best_texts_that_have_the_words_are_found():
    logits = table(5)
    every = {text: penalized(logits, text, 0.6) for text in every_text(LENGTH)}
    # Of those that the limit cuts off, an automaton allows none.
    every = {text: every[text] for text in every if text[-1] == EOS and {2, 3} <= {*text}}
    search = beam.BeamSearch(60, 60, LengthPenalty(0.6), banks=True)
    result = run_search(logits, search, (words_automaton(),))
    assert [text for text, _ in result] == sorted(every, key=every.get, reverse=True)


def test_survivors_by_order_are_those_by_probability_where_the_order_is_by_probability():
    draw = np.random.default_rng(0)
    best = -np.sort(-draw.normal(size=(5, 8)).astype(np.float32), axis=1)
    best[:, 6:] = -np.inf
    stops = draw.random((5, 8)) < 0.3
    place = np.arange(40, dtype=np.int32).reshape(5, 8)
    rows = generation.shard_rows(BeamContinuations(place, place, best))
    chosen = [choose_survivors(rows, stops, 4, in_order) for in_order in (False, True)]
    np.testing.assert_array_equal(chosen[0].log_probability, chosen[1].log_probability)
    alive = np.isfinite(chosen[0].log_probability)
    np.testing.assert_array_equal(
        np.where(alive, chosen[0].token, 0), np.where(alive, chosen[1].token, 0)
    )


EXAMPLES = [[5, 9, 33], [7], [60, 2, 2, 8, 14, 31, 9], [12, 13]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_model_are_searched_the_same_in_any_batch_and_on_any_mesh(kind):
    cfg, params = KINDS[kind], lively(KINDS[kind])
    decode = config.Decode(
        max_new_tokens=6, beams=4, beam_groups=2, diversity_penalty=1.0, n_best=4
    )

    def search(examples, params):
        request = decoding.make_request(cfg, examples, decode)
        return decoding.generate(cfg, params, request, decode)

    alone = [search([example], params) for example in EXAMPLES]
    together = search(EXAMPLES, params)
    for row, each in enumerate(alone):
        np.testing.assert_array_equal(together.tokens[row], each.tokens[0])
        assert (np.diff(each.scores[0]) <= 0).all()
    if kind == "encoder_decoder":
        sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
        split = search(EXAMPLES, lively(cfg))
        np.testing.assert_array_equal(split.tokens, together.tokens)


@pytest.mark.slow
def test_one_group_without_a_penalty_is_beam_search():
    cfg, params = KINDS["encoder_decoder"], lively(KINDS["encoder_decoder"])
    plain = config.Decode(max_new_tokens=6, beams=4, n_best=4)
    request = decoding.make_request(cfg, EXAMPLES, plain)
    programs = [generation.make_program(cfg, each) for each in (plain, config.Decode(beams=4))]
    assert {(program.groups, program.banks) for program in programs} == {(1, False)}
    every = decoding.generate(cfg, params, request, plain)
    # Groups without a penalty are as many equal searches of fewer beams.
    grouped = config.Decode(max_new_tokens=6, beams=8, beam_groups=2, n_best=8)
    twice = decoding.generate(cfg, params, request, grouped)
    np.testing.assert_array_equal(twice.tokens[:, ::2], every.tokens)
    np.testing.assert_array_equal(twice.scores[:, 1::2], every.scores)


@pytest.mark.slow
def test_improbable_texts_that_have_the_words_do_not_end_a_search():
    session = interactive.load("g2p")
    assert session.generate("cat", beams=4, force_words=("T",)) == "K AE T"
