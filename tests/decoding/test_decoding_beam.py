# SPDX-License-Identifier: Apache-2.0
"""Laws of beam search: exhaustive where it can be, greedy with one beam, ranked by its penalty."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import beam, generation, protocol, target
from t5x_lite.decoding.beam_ranking import LengthPenalty
from t5x_lite.decoding.result import beam_result

VOCABULARY, LENGTH, EOS = 4, 4, 1
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def table(seed):
    draw = np.random.default_rng(seed)
    logits = 1.5 * draw.normal(size=(LENGTH + 1, VOCABULARY, VOCABULARY))
    return np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))


def of_table(logits):
    logits = jnp.array(logits)

    def forward(tokens, index, cache, tree=None):
        position = index[:, None] + jnp.arange(tokens.shape[1])
        place = sharding.spec("batch length whole")
        rows = logits.at[jnp.minimum(position, LENGTH), tokens].get(out_sharding=place)
        return rows, cache

    return protocol.Target(forward, lambda hidden: hidden)


def run_search(logits, beams, alpha, length=LENGTH):
    """Returns (text, score) of the finished texts of a search with beams and alpha, best first;
    logits are a table, and texts have at most length tokens."""
    tokens = generation.shard_rows(np.zeros((1, 1), np.int32))
    prompts = target.Prompts(tokens, tokens[:, 0] + 1)
    stopping = protocol.StoppingCriteria(EOS, prompts.length + length)
    search = beam.BeamSearch(beams, beams, LengthPenalty(alpha))

    def run(prompts):
        context = protocol.DecodeContext(of_table(logits), stopping, prompts)
        state = beam.initial_beams(context, search, (), LENGTH + 4)
        return beam.run_beam_search(context, search, state).finished

    result = jax.device_get(jax.jit(run)(prompts))
    texts = [
        tuple(row[1 : 1 + size].tolist())
        for row, size in zip(result.tokens[0], result.lengths[0], strict=True)
    ]
    return [pair for pair in zip(texts, result.score[0], strict=True) if np.isfinite(pair[1])]


def penalized(logits, text, alpha):
    path = zip((0, *text), text, strict=False)
    total = sum(float(logits[i, a, b]) for i, (a, b) in enumerate(path))
    return total / ((5 + len(text)) / 6) ** alpha


def every_text(length):
    """Yields all texts: those that end, and those that the limit cuts off."""
    for size in range(1, length + 1):
        for text in itertools.product(range(VOCABULARY), repeat=size):
            ended = text[-1] == EOS
            if EOS not in text[:-1] and (ended or size == length):
                yield text


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_beams_for_all_the_best_texts_of_all_are_found(seed, alpha):
    logits = table(seed)
    every = {text: penalized(logits, text, alpha) for text in every_text(LENGTH)}
    best = sorted(every, key=every.get, reverse=True)[:10]
    result = run_search(logits, len(every), alpha)
    assert [text for text, _ in result[:10]] == best
    np.testing.assert_allclose([score for _, score in result[:10]], [every[t] for t in best], 1e-5)


def plain_search(logits, beams, alpha, length):
    """The same search of logits with beams, alpha and length, in plain Python by lists."""
    live, finished = [((), 0.0)], []
    for _ in range(length):
        grown = [
            ((*text, token), total + float(logits[len(text), (text or (0,))[-1], token]))
            for text, total in live
            for token in range(VOCABULARY)
        ]
        grown = sorted(grown, key=lambda pair: pair[1], reverse=True)[: 2 * beams]
        finished += [pair for pair in grown[:beams] if pair[0][-1] == EOS]
        live = [pair for pair in grown if pair[0][-1] != EOS][:beams]
        if len(finished) >= beams:
            break
    else:
        finished += live
    scored = [(text, penalized(logits, text, alpha)) for text, _ in finished]
    return sorted(scored, key=lambda pair: pair[1], reverse=True)[:beams]


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_few_beams_find_what_a_plain_search_finds(seed, beams):
    logits = table(seed + 10)
    result, expected = run_search(logits, beams, 0.6), plain_search(logits, beams, 0.6, LENGTH)
    assert [text for text, _ in result] == [text for text, _ in expected]
    np.testing.assert_allclose([s for _, s in result], [s for _, s in expected], atol=1e-5)


class Recurrent(NamedTuple):
    """A toy whose logits depend on the whole text, through a state in the cache.

    Attributes:
      vocabulary: number of tokens.
      beams: beams of its search.
      length: most new tokens.
      rows: number of prompts.
      alpha: exponent of the length penalty.
      seed: seed of its weights and prompts.
    """

    vocabulary: int
    beams: int
    length: int
    rows: int
    alpha: float
    seed: int

    def search(self):
        """Hypotheses of a search, and the length of each prompt."""
        draw, width = np.random.default_rng(self.seed), 8
        across = 0.6 * draw.normal(size=(width, width)).astype(np.float32)
        embedding = draw.normal(size=(self.vocabulary, width)).astype(np.float32)
        head = 2 * draw.normal(size=(width, self.vocabulary)).astype(np.float32)
        tokens = draw.integers(2, self.vocabulary, (self.rows, 3)).astype(np.int32)
        lengths = draw.integers(1, 4, self.rows).astype(np.int32)
        limit = (lengths + draw.integers(2, self.length + 1, self.rows)).astype(np.int32)

        def forward(block, index, cache, tree=None):
            place = sharding.spec("batch whole")
            embedded = jnp.array(embedding).at[block[:, 0]].get(out_sharding=place)
            hidden = jnp.tanh(cache[0] @ jnp.array(across) + embedded)
            return (hidden @ jnp.array(head))[:, None], (hidden,)

        def run(tokens, lengths, limit):
            context = protocol.DecodeContext(
                target=protocol.Target(forward, lambda logits: logits),
                stopping=protocol.StoppingCriteria(EOS, limit),
                prompts=target.Prompts(tokens, lengths),
            )
            search = beam.BeamSearch(self.beams, self.beams, LengthPenalty(self.alpha))
            empty = jnp.zeros((self.rows, width)) * lengths[:, None]
            cache = (beam.repeat_rows(empty, self.beams),)
            state = beam.initial_beams(context, search, cache, self.length + 7)
            return beam.run_beam_search(context, search, state).finished

        placed = generation.shard_rows((tokens, lengths, limit))
        return jax.device_get(jax.jit(run)(*placed)), lengths


RECURRENT = {
    "small": Recurrent(5, beams=3, length=7, rows=4, alpha=0.6, seed=0),
    "wide": Recurrent(37, beams=8, length=9, rows=3, alpha=1.2, seed=1),
    "zero": Recurrent(12, beams=4, length=6, rows=5, alpha=0.0, seed=2),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_texts_are_those_of_the_first_version(name):
    """The golden file holds what the first commit with beam search wrote, before it knew groups,
    constraints or lattices; on one machine the scores were the same to the bit."""
    expected = json.loads((GOLDEN / "beam_search.json").read_text())[name]
    texts, begins = RECURRENT[name].search()
    for row, (each, begin) in enumerate(zip(expected, begins, strict=True)):
        ends = begin + texts.lengths[row]
        tokens = [texts.tokens[row, k, begin:end].tolist() for k, end in enumerate(ends)]
        assert tokens == each["tokens"]
        np.testing.assert_allclose(texts.score[row], each["scores"], rtol=1e-5)


EXAMPLES = [[5, 9, 33], [7], [60, 2, 2, 8, 14, 31, 9], [12, 13]]
KINDS = {
    "encoder_decoder": toy_model("encoder_decoder"),
    "decoder_only": toy_model("decoder_only", positions="rotary"),
}


def lively(cfg):
    random = np.random.default_rng(7)

    def draw(shape):
        return (0.4 * random.normal(size=shape.shape)).astype(np.float32)

    return decoding.prepare_params(cfg, jax.tree.map(draw, model.shapes(cfg)))


def one_beam(cfg, params, request, length):
    """Beam search of width one, which `generate` itself leaves to the loop.

    Args:
      cfg: the model.
      params: its weights.
      request: rows to continue.
      length: most new tokens.
    """
    placed = generation.shard_rows(request._replace(eos=None))

    def run(params, placed):
        prompts = target.Prompts(placed.prompts, placed.prompts_length)
        encoded = model.EncoderMemory()
        if placed.inputs is not None:
            encoded = target.encode_inputs(cfg, params, placed.inputs, placed.inputs_length)
        cache = target.prefill(cfg, params, encoded, prompts, prompts.tokens.shape[1] + length + 1)
        search = beam.BeamSearch(1, 1, LengthPenalty(0.6))
        stopping = protocol.StoppingCriteria(request.eos, prompts.length + length)
        decoded = target.make_target(cfg, params, encoded)
        context = protocol.DecodeContext(decoded, stopping, prompts)
        state = beam.initial_beams(context, search, cache, cache[0].slots)
        state = beam.run_beam_search(context, search, state)
        return beam_result(state, search, length)

    return jax.jit(run)(params, placed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy(kind):
    cfg, decode = KINDS[kind], config.Decode(max_new_tokens=8)
    params = lively(cfg)
    free = decoding.generate(
        cfg, params, decoding.make_request(cfg, EXAMPLES, decode, eos=-1), decode
    )
    eos = int(free.tokens[2, 0, 3])
    request = decoding.make_request(cfg, EXAMPLES, decode, eos=eos)
    greedy = decoding.generate(cfg, params, request, decode)
    result = one_beam(cfg, params, request, 8)
    np.testing.assert_array_equal(result.tokens, greedy.tokens)
    np.testing.assert_array_equal(result.lengths, greedy.lengths)
    np.testing.assert_allclose(result.scores, greedy.scores, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_ranked_by_the_probability_the_model_gives_them(kind):
    cfg, decode = KINDS[kind], config.Decode(max_new_tokens=6, beams=4, n_best=3, alpha=0.8)
    params = lively(cfg)
    request = decoding.make_request(cfg, EXAMPLES, decode)
    result = decoding.generate(cfg, params, request, decode)
    assert np.all(np.diff(result.scores, axis=1) <= 0)
    penalty = ((5 + result.lengths) / 6) ** decode.alpha
    np.testing.assert_allclose(result.scores, result.log_probability / penalty, rtol=1e-5)
    for n in range(decode.n_best):
        texts = [result.tokens[row, n, : result.lengths[row, n]] for row in range(len(EXAMPLES))]
        again = decoding.score(cfg, params, EXAMPLES, [text.tolist() for text in texts])
        np.testing.assert_allclose(result.log_probability[:, n], again.log_probability, rtol=1e-4)


@pytest.mark.slow
def test_a_row_is_searched_the_same_in_any_batch_and_on_any_mesh():
    cfg, decode = KINDS["encoder_decoder"], config.Decode(max_new_tokens=6, beams=3, n_best=2)
    host = jax.tree.map(
        lambda shape: 0.4 * np.random.default_rng(len(shape.shape)).normal(size=shape.shape),
        model.shapes(cfg),
    )
    host = jax.tree.map(lambda x: x.astype(np.float32), host)
    request = decoding.make_request(cfg, EXAMPLES, decode)
    together = decoding.generate(cfg, decoding.prepare_params(cfg, host), request, decode)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    order = [3, 1, 0, 2]
    request = decoding.make_request(cfg, [EXAMPLES[i] for i in order], decode, batch=8)
    split = decoding.generate(cfg, decoding.prepare_params(cfg, host), request, decode)
    np.testing.assert_array_equal(split.tokens[:4], together.tokens[order])
    np.testing.assert_allclose(split.scores[:4], together.scores[order], rtol=1e-4)
    assert split.lengths[4:].tolist() == [[0, 0]] * 4


def test_the_length_penalty_is_that_of_wu_et_al():
    assert math.isclose(LengthPenalty(0.6).divisor(7), 2**0.6)
    assert LengthPenalty(3.0).divisor(1) == 1.0


@pytest.mark.slow
def test_several_ends_leave_enough_beams_to_live_on():
    cfg, decode = KINDS["encoder_decoder"], config.Decode(max_new_tokens=6, beams=3, n_best=3)
    params = lively(cfg)
    many = decoding.make_request(cfg, EXAMPLES, decode, eos=[1, 1, 1])
    one = decoding.make_request(cfg, EXAMPLES, decode, eos=1)
    several, single = (decoding.generate(cfg, params, each, decode) for each in (many, one))
    np.testing.assert_array_equal(several.tokens, single.tokens)
    ends = list(range(0, 64, 2))
    request = decoding.make_request(cfg, EXAMPLES, decode, eos=ends)
    result = decoding.generate(cfg, params, request, decode)
    assert np.isfinite(result.scores).all()
    for text, length in zip(result.tokens.reshape(-1, 6), result.lengths.ravel(), strict=True):
        assert text[length - 1] in ends or length == 6
        assert not np.isin(text[: length - 1], ends).any()
