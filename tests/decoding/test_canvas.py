# SPDX-License-Identifier: Apache-2.0
"""Laws of texts that are filled in masked blocks: against decoding token by token, a sampler in
plain Python without a cache, and an enumeration of all texts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model
from decoding_laws import EXAMPLES, KINDS, SAMPLED, plain, trained
from test_decoding_loop import NEVER, lively, use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.batch import Batch, MaskedBlocks
from t5x_lite.config.canvas import CommitPolicy, parse_commit
from t5x_lite.decoding import sampling
from t5x_lite.decoding.canvas.policies import select_places
from t5x_lite.decoding.canvas.writing import fill_canvas
from t5x_lite.evaluation.lengths import measure_lengths

LENGTH, BLOCK = 11, 4
EVERY = tuple(range(len(EXAMPLES)))
GREEDY = config.Decode(max_new_tokens=LENGTH)


@pytest.fixture(autouse=True)
def one_device():
    use_one_device()


def canvas_model(kind, block=BLOCK):
    """The model of a kind, with a canvas."""
    return dataclasses.replace(KINDS[kind], canvas=config.Canvas(block))


@functools.cache
def weights(kind):
    """Weights of a kind, as numpy: so small that no two choices are as good as certain."""
    return jax.tree.map(lambda x: 0.5 * x, lively(canvas_model(kind)))


def fill(kind, decode, order=EVERY, eos=NEVER, block=BLOCK, params=None):
    """Fills the canvases of rows of EXAMPLES.

    Args:
      kind: the target.
      decode: limit, sampling and policy.
      order: the rows.
      eos: the id that ends a text.
      block: tokens of a block.
      params: weights; None for those of `weights`.
    """
    cfg = canvas_model(kind, block)
    examples = [EXAMPLES[row] for row in order]
    request = decoding.make_request(cfg, examples, decode, rows=list(order), eos=eos)
    params = decoding.prepare_params(cfg, weights(kind) if params is None else params)
    return fill_canvas(cfg, params, request, decode)


# The others state the same of a greedy encoder-decoder, and of a sampled decoder alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, sampled, policy",
    mark_exhaustive(
        [
            ("encoder_decoder", True, "order:1"),
            ("decoder_only", False, "threshold:0.5"),
            ("encoder_decoder", False, "top:1"),
            ("decoder_only", True, "random:1"),
        ],
        kept=[("encoder_decoder", True, "order:1"), ("decoder_only", False, "threshold:0.5")],
    ),
)
def test_blocks_of_one_token_are_autoregressive_decoding_to_the_bit(kind, sampled, policy):
    decode = SAMPLED if sampled else config.Decode(max_new_tokens=SAMPLED.max_new_tokens)
    eos = int(np.bincount(plain(kind, decode).tokens[:, 0].ravel()).argmax())
    wanted = plain(kind, decode, eos)
    policied = dataclasses.replace(decode, commit=policy)
    filled = fill(kind, policied, eos=eos, block=1, params=trained(kind))
    for name in ("tokens", "lengths", "log_probability", "token_step", "steps"):
        np.testing.assert_array_equal(getattr(filled, name), getattr(wanted, name), name)


class Filling:
    """One row in plain Python: every pass reads the whole text anew, as in training."""

    def __init__(self, kind, eos):
        self.cfg, self.eos = canvas_model(kind), eos
        self.params = weights(kind)
        self.width = 32
        self.apply = jax.jit(self.read_logits)

    def read_logits(self, params, batch):
        transformer = model.Transformer(self.cfg)
        return transformer.apply({"params": params}, batch)[0]

    def logits(self, example, tokens, written, prompt):
        """Logits [t v] of the targets, from a row of masked blocks and its clean copy.

        Args:
          example: ids of the input.
          tokens: ids of prompt and text, any number where none is written.
          written: True for places that hold a token.
          prompt: number of tokens of the prompt.
        """

        def row(values, size=self.width):
            return jnp.asarray(np.pad(np.asarray(values), (0, size - len(values)))[None], jnp.int32)

        # The last block is whole, as of targets that are filled up; the limit cuts the text.
        beyond = -(len(tokens) - prompt) % BLOCK
        tokens, written = (np.pad(each, (0, beyond)) for each in (tokens, written))
        place = np.arange(len(tokens)) - prompt
        blocks = np.where(place >= 0, place // BLOCK, place)
        ids = np.where(written, tokens, self.cfg.mask_token_id)
        ones, where = row(np.ones(len(ids))), row(np.arange(len(ids)))
        batch = Batch(row(ids), ones, where, ones.astype(float))
        batch = batch._replace(canvas=MaskedBlocks(row(ids), row(blocks), ones))
        if self.cfg.encoder is not None:
            read = row(np.ones(len(example)), 16), row(np.arange(len(example)), 16)
            batch = batch._replace(inputs=row(example, 16))
            batch = batch._replace(input_segments=read[0], input_positions=read[1])
        logits = np.array(self.apply(self.params, batch), np.float64)
        logits[:, self.cfg.mask_token_id] = -np.inf
        return logits

    def text(self, example, policy):
        """Greedy text, and the number of passes that chose something; no text where rounding
        decides."""
        prompt = 0 if self.cfg.encoder is not None else len(example)
        size = prompt + LENGTH
        tokens = np.array([*example[:prompt], *[0] * LENGTH])
        written, passes = np.arange(size) < prompt, 0
        for first in range(prompt, size, BLOCK):
            places = range(first, min(first + BLOCK, size))
            while True:
                ends = [i for i in range(prompt, size) if written[i] and tokens[i] == self.eos]
                end = min([*ends, size])
                if written[:end].all():
                    return tokens[prompt : end + 1].tolist(), passes
                left = [i for i in places if not written[i] and i < end]
                if not left:
                    break
                logits = self.logits(example, tokens, written, prompt)
                scores = jax.nn.log_softmax(logits, axis=-1)
                best = {i: int(np.argmax(scores[i])) for i in left}
                chance = {i: float(scores[i, best[i]]) for i in left}
                if is_close(scores, left, chance):
                    return None, passes
                for i in select_in_python(policy, left, chance):
                    tokens[i], written[i] = best[i], True
                passes += 1
        return tokens[prompt:].tolist(), passes


def is_close(scores, left, chance):
    """True if two choices are so near that rounding decides between them.

    Args:
      scores: log-probabilities [t v].
      left: places without a token.
      chance: log-probability of the choice of each place.
    """
    ranked = np.sort([chance[i] for i in left])
    pairs = np.sort(scores[np.array(left)], axis=1)
    return bool(np.any(np.diff(ranked) < 1e-4) or np.any(pairs[:, -1] - pairs[:, -2] < 1e-4))


def select_in_python(policy, left, chance):
    """Places that a policy keeps.

    Args:
      policy: the policy.
      left: places without a token.
      chance: log-probability of the choice of each place.
    """
    by_chance = sorted(left, key=lambda i: (-chance[i], i))
    if policy.kind == "order":
        return sorted(left)[: policy.count]
    if policy.kind == "top":
        return by_chance[: policy.count]
    sure = [i for i in left if chance[i] >= np.log(policy.least)]
    near = [
        i
        for i in left
        if chance[i] >= np.log(policy.near) and any(abs(i - j) <= policy.reach for j in sure)
    ]
    return sorted({*sure, *near}) or by_chance[:1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_greedy_texts_are_those_of_a_sampler_without_a_cache(kind):
    free = fill(kind, dataclasses.replace(GREEDY, commit="top:1")).tokens[:, 0]
    eos = int(np.bincount(free.ravel()).argmax())
    filling = Filling(kind, eos)
    compared = 0
    for name in ("top:1", "threshold:0.35", "order:3"):
        result = fill(kind, dataclasses.replace(GREEDY, commit=name), eos=eos)
        for row in EVERY:
            wanted, passes = filling.text(EXAMPLES[row], parse_commit(name))
            if wanted is None:
                continue
            compared += 1
            text = result.tokens[row, 0, : result.lengths[row, 0]].tolist()
            assert text == wanted, (name, row)
            assert passes <= result.steps
    assert compared > 16


# A decoder alone has longer prompts, and the same loop.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"])
)
def test_a_text_is_the_same_in_any_batch(kind):
    decode = dataclasses.replace(SAMPLED, max_new_tokens=LENGTH, commit="threshold:0.5")
    eos = int(np.bincount(fill(kind, decode).tokens[:, 0].ravel()).argmax())
    every = fill(kind, decode, eos=eos)
    assert len(set(every.lengths[:, 0].tolist())) > 1
    order = (6, 2, 2, 0)
    for name in ("tokens", "lengths", "log_probability"):
        some = getattr(fill(kind, decode, order, eos=eos), name)
        np.testing.assert_allclose(some, getattr(every, name)[list(order)], atol=1e-5)


@pytest.mark.slow
def test_a_text_is_the_same_on_any_mesh():
    decode = dataclasses.replace(SAMPLED, max_new_tokens=LENGTH, commit="threshold:0.5")
    alone = fill("encoder_decoder", decode)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = fill("encoder_decoder", decode)
    np.testing.assert_array_equal(split.tokens, alone.tokens)
    np.testing.assert_allclose(split.log_probability, alone.log_probability, atol=1e-3)


@pytest.mark.slow
def test_random_order_one_token_a_pass_has_the_law_of_the_trained_marginals():
    size, rows = 6, 1 << 14
    cfg = toy_model("decoder_only", layers=1, vocab=5, canvas=config.Canvas(size))
    params = lively(cfg, seed=3)
    example = [1, 2]
    law = text_law(cfg, params, example, size)
    decode = config.Decode(max_new_tokens=size, temperature=1.0, commit="random:1", seed=5)
    request = decoding.make_request(cfg, [example] * rows, decode, eos=NEVER)
    result = fill_canvas(cfg, decoding.prepare_params(cfg, params), request, decode)
    assert result.steps == size
    codes = np.ravel_multi_index((result.tokens[:, 0].T + 1) % 5, (5,) * size)
    counts = np.bincount(codes, minlength=5**size)
    assert counts[law == 0].sum() == 0
    expected = rows * law[law > 0]
    # The statistic of a chi-square test has mean 4095 and a deviation of about 90.
    statistic = np.sum((counts[law > 0] - expected) ** 2 / expected)
    variance = 2 * (len(expected) - 1) + np.sum(1 / expected)
    assert abs(statistic - (len(expected) - 1)) < 5 * np.sqrt(variance)
    # One order in place of a random one is another law.
    other = text_law(cfg, params, example, size, in_order=True)
    assert np.abs(other - law).sum() > 0.05


def text_law(cfg, params, example, size, in_order=False):
    """Probability of each text [5 ** size]: tokens drawn one at a time from the marginals of all
    partly written texts, in a random order or from left to right.

    A text is a number with a digit for each place: 0 is the mask, id 4, and d > 0 is id d - 1.

    Args:
      cfg: architecture.
      params: weights.
      example: ids of the prompt.
      size: tokens of a text.
      in_order: True for the order from left to right.
    """
    texts = np.array([*itertools.product(range(5), repeat=size)])
    rows = len(texts)
    prompt = np.tile([*example], (rows, 1))
    ids = np.concatenate([prompt, (texts - 1) % 5], axis=1)
    place = np.arange(ids.shape[1]) - len(example)
    blocks = np.tile(np.where(place >= 0, 0, place), (rows, 1))
    ones, where = np.ones_like(ids), np.tile(np.arange(ids.shape[1]), (rows, 1))
    batch = Batch(ids, ones, where, ones, canvas=MaskedBlocks(ids, blocks, ones))
    batch = jax.tree.map(jnp.asarray, batch)
    logits = jax.jit(model.Transformer(cfg).apply)({"params": params}, batch)
    logits = np.array(logits, np.float64)[:, len(example) :, [4, 0, 1, 2, 3]]
    logits[:, :, 0] = -np.inf
    chance = np.asarray(jax.nn.softmax(logits, axis=-1))
    reached = np.zeros(rows)
    reached[0] = 1.0
    # Fewer masks come later: sorted by number of written tokens.
    for state in np.argsort((texts > 0).sum(axis=1), kind="stable"):
        left = np.flatnonzero(texts[state] == 0)
        if in_order:
            left = left[:1]
        for place, token in itertools.product(left, range(1, 5)):
            after = state + token * 5 ** (size - 1 - place)
            reached[after] += reached[state] * chance[state, place, token] / len(left)
    return np.where((texts > 0).all(axis=1), reached, 0)


def test_policies_keep_what_python_keeps():
    draw = np.random.default_rng(0)
    for name in (
        *("top:1", "top:3", "threshold:0.3", "order:2", "random:2"),
        *("neighbors:0.8:0.3:1", "neighbors:0.9:0.5:2"),
    ):
        policy = parse_commit(name)
        chance = np.round(np.log(draw.random((20, 6))), 1)  # with ties
        noise, is_open = draw.random((20, 6)), draw.random((20, 6)) < 0.6
        kept = np.asarray(select_places(policy, *map(jnp.asarray, (chance, noise, is_open))))
        for row in range(20):
            left = np.flatnonzero(is_open[row]).tolist()
            of_noise = CommitPolicy("top", policy.count)
            rule, scores = (of_noise, noise) if policy.kind == "random" else (policy, chance)
            wanted = select_in_python(rule, left, scores[row]) if left else []
            assert np.flatnonzero(kept[row]).tolist() == sorted(wanted), (name, row)


def test_forbidden_and_biased_tokens():
    free = fill("encoder_decoder", GREEDY).tokens[:, 0]
    common = np.bincount(free.ravel()).argsort()[-2:].tolist()
    decode = dataclasses.replace(
        GREEDY, suppress_tokens=(common[0],), logit_bias={common[1]: -50.0, 9: 50.0}
    )
    assert np.all(fill("encoder_decoder", decode).tokens[:, 0] == 9)
    decode = dataclasses.replace(decode, suppress_tokens=(common[0], 9))
    assert not set(fill("encoder_decoder", decode).tokens[:, 0].ravel()) & {*common, 9}


def test_a_cache_of_few_bits_is_near_the_whole_one():
    decode = dataclasses.replace(GREEDY, commit="top:2")
    whole = fill("encoder_decoder", decode)
    quantized = fill("encoder_decoder", dataclasses.replace(decode, kv_cache="int8"))
    same = whole.tokens == quantized.tokens
    assert np.mean(same) > 0.5
    gap = np.abs(whole.log_probability - quantized.log_probability)
    assert 0 < np.min(gap) and np.min(gap) < 0.5


def test_no_place_behind_an_end_is_filled():
    eos, seed = 9, 4
    decode = dataclasses.replace(GREEDY, logit_bias={eos: 90.0}, commit="random:1", seed=seed)
    result = fill("encoder_decoder", decode, eos=eos, block=LENGTH)
    np.testing.assert_array_equal(result.lengths, 1)
    rows = len(EVERY)
    params = sampling.make_sampling_params(
        decoding.make_request(canvas_model("encoder_decoder"), EXAMPLES, decode), decode
    )
    slots = np.tile(np.arange(1, LENGTH + 1), (rows, 1))
    order = sampling.NoiseKind.ORDER
    noise = np.asarray(sampling.uniform_noise(params, order, np.ones(rows, np.int32), slots))
    for row in EVERY:
        # Each pass ends the text earlier, until its first place is an end.
        place, passes = LENGTH, 0
        while place:
            place, passes = int(np.argmax(noise[row, :place])), passes + 1
        assert result.token_step[row, 0, 0] == passes - 1


def test_several_samples_differ_and_the_mask_is_never_written():
    decode = dataclasses.replace(SAMPLED, max_new_tokens=LENGTH, n_best=3, commit="top:2")
    result = fill("decoder_only", decode)
    assert result.tokens.shape == (len(EXAMPLES), 3, LENGTH)
    assert len(np.unique(result.tokens[0], axis=0)) == 3
    assert np.all(result.tokens != canvas_model("decoder_only").mask_token_id)


def test_noise_of_the_order_is_that_of_no_other_purpose():
    assert len({kind.value for kind in sampling.NoiseKind}) == len(sampling.NoiseKind)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"beams": 2}, "Decode.beams needs text that is written from left to right"),
        ({"regex": "a+"}, "Decode.regex needs text"),
        ({"drafter": "lookup"}, "Decode.drafter needs text"),
        ({"repetition_penalty": 1.2}, "Decode.repetition_penalty needs text"),
        ({"kv_cache": "checkpoints:16:512"}, "Decode.kv_cache checkpoints:16:512 keeps tokens"),
    ],
)
def test_rules_that_no_canvas_can_follow_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        fill("encoder_decoder", dataclasses.replace(GREEDY, **fields))


def test_what_writes_token_by_token_refuses_a_canvas():
    cfg = canvas_model("encoder_decoder")
    params = decoding.prepare_params(cfg, weights("encoder_decoder"))
    request = decoding.make_request(cfg, [EXAMPLES[0]], GREEDY)
    with pytest.raises(ValueError, match="needs a model that writes from left to right"):
        decoding.generate(cfg, params, request, GREEDY)
    with pytest.raises(ValueError, match="--lengths needs a model that writes from left to right"):
        measure_lengths(cfg, params, None, (4,), 1)
    with pytest.raises(ValueError, match="log-probability of a text needs a model"):
        decoding.score(cfg, params, [EXAMPLES[0]], [EXAMPLES[1]])
