# SPDX-License-Identifier: Apache-2.0
"""Laws of logits processors: the logits of transformers' processors of the same names, and a text
that no drafter, batch, beam or stream changes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import mark_exhaustive
from decoding_laws import EXAMPLES, KINDS
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding
from t5x_lite.config.checked import field_types
from t5x_lite.decoding import generation, sampling, streaming
from t5x_lite.decoding.drafters import lookup, recycling
from t5x_lite.decoding.protocol import Tree, chain
from t5x_lite.decoding.steering import processor, sequences
from t5x_lite.decoding.steering.build import make_processors

VOCAB, EOS, ROWS, SLOTS = 24, 1, 3, 20
# A chain, and a tree of three branches.
TREES = {"chain": chain(4), "tree": Tree((-1, 0, 0, 1, 1, 2))}
RULES = {
    "repetition": dict(repetition_penalty=1.7),
    "encouraged repetition": dict(repetition_penalty=0.6),
    "bigrams": dict(no_repeat_ngram_size=2),
    "words": dict(no_repeat_ngram_size=1),
    "trigrams": dict(no_repeat_ngram_size=3),
    "length": dict(min_new_tokens=4),
    "bad words": dict(bad_words_ids=((3,), (4, 5), (6, 7, 8), (4, 6))),
    "suppressed": dict(suppress_tokens=(2, 9)),
    "bias": dict(logit_bias={3: 2.5, 7: -1.5}),
    "first": dict(forced_bos_token_id=5),
    "all": dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
        bad_words_ids=((4, 5),),
        suppress_tokens=(2,),
        logit_bias={3: 1.0},
        forced_bos_token_id=5,
    ),
}


@pytest.fixture
def no_mesh():
    """Arrays of no mesh, whatever an earlier test has set."""
    with jax.set_mesh(None):
        yield


def references(options: dict, prompt: int) -> list[transformers.LogitsProcessor]:
    """Processors of transformers for the options of a Decode, in the order of its `generate`.

    Args:
      options: fields of config.Decode.
      prompt: number of tokens of the prompt.
    """
    makers = {
        "logit_bias": lambda bias: transformers.SequenceBiasLogitsProcessor(
            [[[token], added] for token, added in bias.items()]
        ),
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": transformers.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: transformers.NoBadWordsLogitsProcessor(
            [[*ids] for ids in words], torch.tensor([EOS])
        ),
        "min_new_tokens": lambda least: transformers.MinNewTokensLengthLogitsProcessor(
            prompt, least, torch.tensor([EOS])
        ),
        "forced_bos_token_id": lambda token: FirstToken(token, prompt),
        "suppress_tokens": transformers.SuppressTokensLogitsProcessor,
    }
    return [make(options[name]) for name, make in makers.items() if name in options]


class FirstToken(transformers.LogitsProcessor):
    """transformers' ForcedBOSTokenLogitsProcessor after a prompt of any length."""

    def __init__(self, token: int, prompt: int):
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.prompt:
            return scores
        forced = torch.full_like(scores, -float("inf"))
        forced[:, self.token] = 0
        return forced


def rules_of(decode):
    """Processors of a config, for ROWS rows."""
    request = decoding.make_request(KINDS["decoder_only"], [[3]] * ROWS, decode, eos=EOS)
    return make_processors(decode, request)


@pytest.mark.slow
@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("name", RULES)
def test_logits_are_those_of_transformers(name, shape):
    tree, options = TREES[shape], RULES[name]
    rules = rules_of(config.Decode(**options))
    rounded = "repetition_penalty" in options
    for seed in range(10):
        draw = np.random.default_rng(seed)
        # Few different ids, so that much repeats.
        tokens = draw.integers(2, 10, size=(ROWS, SLOTS)).astype(np.int32)
        prompt = draw.integers(1, 6, size=ROWS).astype(np.int32)
        added = draw.integers(0, 7, size=ROWS).astype(np.int32)
        block = draw.integers(2, 10, size=(ROWS, tree.width)).astype(np.int32)
        length = prompt + added
        block[:, 0] = tokens[np.arange(ROWS), length - 1]
        logits = draw.normal(size=(ROWS, tree.width, VOCAB)).astype(np.float32)
        ours = steered(rules, tree, tokens, prompt, added, block, logits)
        for row in range(ROWS):
            for node in range(tree.width):
                path = [*np.flatnonzero(tree.ancestors[node])[1:]]
                text = [*tokens[row, : length[row]], *block[row, path]]
                expected = torch.tensor(logits[row, node])[None]
                for reference in references(options, int(prompt[row])):
                    expected = reference(torch.tensor([text]).long(), expected)
                assert_same(ours[row, node], expected[0].numpy(), masks=not rounded)


def assert_same(ours, theirs, masks: bool):
    """Checks ours against theirs: bitwise for masks and sums; PyTorch divides by multiplying, so to
    two units."""
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    if masks:
        np.testing.assert_array_equal(ours, theirs)
    else:
        finite = np.isfinite(ours)
        np.testing.assert_array_max_ulp(ours[finite], theirs[finite], maxulp=2)


def steered(rules, tree, tokens, prompt, added, block, logits):
    """Logits after the processors, whose states saw the prompt and then the added tokens.

    Args:
      rules: the processors.
      tree: shape of the block.
      tokens: [b T] texts.
      prompt: [b] lengths of the prompts.
      added: [b] tokens after the prompts.
      block: [b w] the root and drafts.
      logits: [b w v] of the model.
    """
    begin = processor.Text(jnp.array(tokens), jnp.array(prompt), jnp.array(prompt))
    states = rules.begin(begin, VOCAB)
    most = int(added.max())
    following = np.stack(
        [np.resize(row[at : at + most], most) for row, at in zip(tokens, prompt, strict=True)]
    )
    if most:
        states = rules.observe(states, jnp.array(following), jnp.array(added))
    text = processor.Text(jnp.array(tokens), jnp.array(prompt + added), jnp.array(prompt))
    paths = processor.draft_paths(tree.paths, tree.depth, jnp.array(block))
    return np.asarray(rules.process(states, text, paths, jnp.array(logits)))


@pytest.mark.usefixtures("no_mesh")
def test_penalties_count_the_new_text_alone():
    """vLLM's formula, in float64."""
    decode = config.Decode(presence_penalty=0.75, frequency_penalty=0.5)
    rules = rules_of(decode)
    draw = np.random.default_rng(3)
    tokens = draw.integers(2, 6, size=(ROWS, SLOTS)).astype(np.int32)
    prompt, added = np.array([1, 3, 5], np.int32), np.array([0, 4, 7], np.int32)
    tree = TREES["tree"]
    block = draw.integers(2, 6, size=(ROWS, tree.width)).astype(np.int32)
    logits = draw.normal(size=(ROWS, tree.width, VOCAB)).astype(np.float32)
    ours = steered(rules, tree, tokens, prompt, added, block, logits)
    for row in range(ROWS):
        new = tokens[row, prompt[row] : prompt[row] + added[row]]
        for node in range(tree.width):
            path = np.flatnonzero(tree.ancestors[node])[1:]
            counts = np.bincount([*new, *block[row, path]], minlength=VOCAB)
            expected = logits[row, node].astype(np.float64) - 0.5 * counts - 0.75 * (counts > 0)
            np.testing.assert_allclose(ours[row, node], expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_mesh")
def test_an_ngram_that_no_text_has_room_for_costs_nothing():
    """100,000 tokens took 33 s to compile: a comparison for each of them."""
    limits = field_types(config.Decode)["no_repeat_ngram_size"].__metadata__[0]
    assert limits.most <= 4096
    tree, logits = TREES["tree"], np.ones((1, TREES["tree"].width, VOCAB), np.float32)
    paths = processor.draft_paths(tree.paths, tree.depth, jnp.ones((1, tree.width), jnp.int32))
    counts = {}
    for size in (SLOTS, SLOTS + 1, int(limits.most)):
        rule = sequences.NoRepeatNgram(size)
        text = processor.Text(jnp.ones((1, SLOTS), jnp.int32), jnp.array([4]), jnp.array([2]))
        traced = jax.make_jaxpr(lambda x, rule=rule, text=text: rule.process((), text, paths, x))
        counts[size] = len(traced(logits).eqns)
    assert counts[SLOTS] > 0 and counts[SLOTS + 1] == counts[limits.most] == 0


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize(
    "name, value, theirs",
    [
        ("min_p", 0.1, transformers.MinPLogitsWarper),
        ("typical_p", 0.6, transformers.TypicalLogitsWarper),
        ("epsilon_cutoff", 0.03, transformers.EpsilonLogitsWarper),
        ("eta_cutoff", 0.05, transformers.EtaLogitsWarper),
    ],
)
def test_what_is_cut_off_is_what_transformers_cuts_off(name, value, theirs):
    draw = np.random.default_rng(5)
    logits = (3 * draw.normal(size=(100, VOCAB))).astype(np.float32)
    logits[::3, 5:15] = -np.inf
    request = decoding.make_request(KINDS["decoder_only"], [[3]] * 100, config.Decode())
    params = sampling.make_sampling_params(request, config.Decode(temperature=1.0, **{name: value}))
    kept = np.isfinite(sampling.filter_logits(jnp.array(logits)[:, None], params))[:, 0]
    expected = np.isfinite(theirs(value)(torch.zeros(100, 1).long(), torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize("spread, exponent", [(0.4, 1.0), (0.4, 2.5), (1.5, 0.5)])
def test_the_temperature_of_a_token_rises_with_its_entropy(spread, exponent):
    """llama.cpp's formula, in float64."""
    draw = np.random.default_rng(4)
    logits = (draw.uniform(0, 8, size=(100, 1)) * draw.normal(size=(100, VOCAB))).astype(np.float32)
    decode = config.Decode(
        temperature=0.9, dynatemp_range=spread, dynatemp_exponent=exponent, seed=1
    )
    request = decoding.make_request(KINDS["decoder_only"], [[3]] * 100, config.Decode())
    params = sampling.make_sampling_params(request, decode)
    ours = np.asarray(sampling.warp_logits(jnp.array(logits)[:, None], params))[:, 0]
    wide = logits.astype(np.float64)
    chance = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    share = -(chance * np.log(chance)).sum(axis=1, keepdims=True) / np.log(VOCAB)
    least, most = max(0.9 - spread, 0), 0.9 + spread
    expected = wide / np.maximum(least + (most - least) * share**exponent, 1e-6)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


STEERED = dict(
    repetition_penalty=1.4,
    frequency_penalty=0.2,
    no_repeat_ngram_size=3,
    min_new_tokens=6,
    bad_words_ids=((7,), (9, 11)),
    logit_bias={12: 1.0},
    forced_bos_token_id=13,
)
DECODES = {
    "greedy": config.Decode(max_new_tokens=16, **STEERED),
    "sampled": config.Decode(
        max_new_tokens=16, temperature=1.0, min_p=0.01, typical_p=0.95, seed=2, **STEERED
    ),
}
DRAFTERS = {"lookup": lookup.Lookup(chain(4)), "recycling": recycling.Recycling()}


@functools.cache
def plain_tokens(kind: str, mode: str) -> np.ndarray:
    """Tokens of plain decoding with all rules."""
    return tokens_of(kind, DECODES[mode])


@functools.cache
def target_of(kind):
    cfg = KINDS[kind]
    return cfg, decoding.prepare_params(cfg, lively(cfg))


def tokens_of(kind, decode, drafting=generation.PLAIN, examples=EXAMPLES):
    use_one_device()
    cfg, params = target_of(kind)
    request = decoding.make_request(cfg, examples, decode, eos=EOS)
    return decoding.generate(cfg, params, request, decode, drafting).tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter, kind, mode",
    mark_exhaustive(
        [
            (drafter, kind, mode)
            for drafter in DRAFTERS
            for kind in ("encoder_decoder", "decoder_only")
            for mode in DECODES
        ],
        kept=[
            ("lookup", "encoder_decoder", "sampled"),
            ("recycling", "decoder_only", "sampled"),
            ("recycling", "encoder_decoder", "greedy"),
        ],
    ),
)
def test_drafts_change_no_token(kind, mode, drafter):
    drafted = tokens_of(kind, DECODES[mode], decoding.Drafting(DRAFTERS[drafter]))
    np.testing.assert_array_equal(drafted, plain_tokens(kind, mode))
    free = dataclasses.replace(DECODES[mode], **{name: off(name) for name in STEERED})
    assert (tokens_of(kind, free) != drafted).any()


def off(name: str):
    """Default of a field of Decode."""
    return getattr(config.Decode(), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"])
)
def test_a_row_alone_and_a_stream_have_the_same_tokens(kind):
    expected = plain_tokens(kind, "sampled")
    cfg, params = target_of(kind)
    for row in (0, 4):
        request = decoding.make_request(
            cfg, [EXAMPLES[row]], DECODES["sampled"], rows=[row], eos=EOS
        )
        alone = decoding.generate(cfg, params, request, DECODES["sampled"]).tokens
        np.testing.assert_array_equal(alone[0], expected[row])
    request = decoding.make_request(cfg, EXAMPLES, DECODES["sampled"], eos=EOS)
    *_, last = streaming.stream(
        cfg, params, request, DECODES["sampled"], decoding.Drafting(DRAFTERS["lookup"]), every=3
    )
    np.testing.assert_array_equal(last.tokens, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_beams_obey(kind):
    decode = config.Decode(max_new_tokens=12, beams=3, n_best=3, **STEERED)
    for text in tokens_of(kind, decode).reshape(-1, 12):
        text = text[: np.argmax([*(text == EOS), True]) + 1]
        assert text[0] == 13 and 7 not in text
        assert EOS not in text[:6]
        pairs = [*itertools.pairwise(text)]
        assert (9, 11) not in pairs
        triples = [*zip(text, text[1:], text[2:], strict=False)]
        assert len(set(triples)) == len(triples)
