# SPDX-License-Identifier: Apache-2.0
"""Laws of lattices: paths are texts of the search, and of a model that forgets all texts merge."""

import functools
import itertools

import jax
import numpy as np
import pytest
from test_decoding_beam import EOS, KINDS, LENGTH, lively, of_table, penalized, run_search, table
from test_decoding_loop import use_one_device

from t5x_lite import config, decoding
from t5x_lite.decoding import beam, generation, protocol, target
from t5x_lite.decoding.beam_ranking import LengthPenalty
from t5x_lite.decoding.lattice import build_lattice, search_lattices

ALL = 60  # beams for every text of the toy


@pytest.fixture(autouse=True)
def one_device():
    use_one_device()


@functools.cache
def history_program(beams):
    """A compiled search: (log-probabilities of the toy, prompts) -> its history."""
    search = beam.BeamSearch(beams, beams, LengthPenalty(0.0), recorded=LENGTH)

    @jax.jit
    def run(logits, prompts):
        stopping = protocol.StoppingCriteria(EOS, prompts.length + LENGTH)
        context = protocol.DecodeContext(of_table(logits), stopping, prompts)
        state = beam.initial_beams(context, search, (), LENGTH + 4)
        return beam.run_beam_search(context, search, state).history

    return run


def lattice_of(logits, beams, merged):
    """The lattice of a search in the toy of test_decoding_beam.

    Args:
      logits: its log-probabilities.
      beams: k.
      merged: n.
    """
    tokens = generation.shard_rows(np.zeros((1, 1), np.int32))
    prompts = target.Prompts(tokens, tokens[:, 0] + 1)
    history = jax.device_get(history_program(beams)(logits, prompts))
    history = jax.tree.map(lambda x: x[0], history)
    return build_lattice(history, beams, [EOS], (LENGTH, merged))


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 3, ALL])
def test_paths_are_texts_with_their_probability_and_the_beams_are_among_them(beams):
    for seed, merged in itertools.product(range(2), [1, 2, 99]):
        logits = table(seed + 50)
        lattice = lattice_of(logits, beams, merged)
        paths = list(lattice.list_paths())
        assert len(paths) == lattice.count_paths() == len({tuple(ids) for ids, _ in paths})
        # The toy knows the last token alone, so merged texts go on with the same probabilities.
        for ids, total in paths:
            assert total == pytest.approx(penalized(logits, tuple(ids), 0.0), abs=1e-4)
        ended = {text for text, _ in run_search(logits, beams, 0.0) if text[-1] == EOS}
        assert ended <= {tuple(ids) for ids, _ in paths}
        assert [edge.target for edge in lattice.edges] == sorted(e.target for e in lattice.edges)
        assert all(edge.source < edge.target for edge in lattice.edges)


def test_merging_adds_texts_that_the_search_has_dropped():
    def count(merged):
        return sum(lattice_of(table(seed), 3, merged).count_paths() for seed in range(3))

    assert count(1) > count(2) >= count(99)
    every = [
        text
        for size in range(1, LENGTH + 1)
        for text in itertools.product(range(4), repeat=size)
        if EOS not in text[:-1] and (text[-1] == EOS or size == LENGTH)
    ]
    results = {tuple(ids) for ids, _ in lattice_of(table(1), len(every), 99).list_paths()}
    assert results == set(every)


def count_texts(history, beams):
    """Texts of a search where those with the same last token merge, counted step by step.

    Args:
      history: continuations of every step.
      beams: k.
    """
    ways, last, total = {None: 1}, [None], 0
    for parents, tokens, probabilities in zip(*history, strict=True):
        rows = [
            (last[parent], token, place)
            for place, (parent, token, p) in enumerate(
                zip(parents, tokens.tolist(), probabilities, strict=True)
            )
            if np.isfinite(p)
        ]
        if not rows:
            return total
        last = [token for _, token, _ in rows if token != EOS][:beams]
        ends = any(token == EOS and place < beams for _, token, place in rows)
        kept = {pair[:2] for pair in rows if pair[1] in last or (ends and pair[1] == EOS)}
        after = dict.fromkeys([*last, EOS], 0)
        for source, token in kept:
            after[token] += ways.get(source, 0)
        total += after.pop(EOS)
        ways = after
    return total + sum(ways.values())


def test_dropped_texts_go_on_as_those_that_they_merge_with():
    for seed in range(6):
        logits = table(seed)
        tokens = generation.shard_rows(np.zeros((1, 1), np.int32))
        prompts = target.Prompts(tokens, tokens[:, 0] + 1)
        history = jax.device_get(history_program(3)(logits, prompts))
        history = jax.tree.map(lambda x: x[0], history)
        assert lattice_of(logits, 3, 1).count_paths() == count_texts(history, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_lattice_of_a_model_has_its_beams(kind):
    cfg, params = KINDS[kind], lively(KINDS[kind])
    decode = config.Decode(max_new_tokens=6, beams=4, n_best=4, alpha=0.0)
    request = decoding.make_request(cfg, [[5, 9, 33], [7]], decode)
    alone = search_lattices(cfg, params, request, decode, merged=99)
    merged = search_lattices(cfg, params, request, decode, merged=1)
    texts = decoding.generate(cfg, params, request, decode)
    for row in range(2):
        paths = {tuple(ids): total for ids, total in alone[row].list_paths()}
        more = {tuple(ids) for ids, _ in merged[row].list_paths()}
        assert paths.keys() <= more and len(paths) < len(more)
        for ids, size, total in zip(
            texts.tokens[row], texts.lengths[row], texts.log_probability[row], strict=True
        ):
            assert paths[tuple(ids[:size].tolist())] == pytest.approx(total, abs=1e-3)


def test_a_lattice_needs_beams_and_something_to_merge():
    cfg = KINDS["decoder_only"]
    decode = config.Decode(max_new_tokens=6, beams=4)
    request = decoding.make_request(cfg, [[5]], decode)
    for changed, merged, words in (
        (config.Decode(), 2, "set Decode.beams to 2 or more"),
        (config.Decode(beams=4, beam_groups=2), 2, "leave out groups"),
        (decode, 0, "agree in 1 or more tokens; got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            search_lattices(cfg, None, request, changed, merged)
