# SPDX-License-Identifier: Apache-2.0
"""Laws of the decoding loop: the ids are the same with any drafter and in any batch."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import generation, loop, protocol, sampling, scoring, target
from t5x_lite.decoding.acceptance import exact

KINDS = {
    "encoder_decoder": toy_model("encoder_decoder", positions="relative"),
    "decoder_only": toy_model("decoder_only", positions="rotary", kv_heads=2),
    "prefix": toy_model("decoder_only", prefix_lm=True, positions="relative"),
}
EXAMPLES = [[5, 9, 33], [7], [60, 2, 2, 8, 14, 31, 9], [12, 13], [40] * 5]
GREEDY = config.Decode(max_new_tokens=10)
SAMPLED = config.Decode(max_new_tokens=10, temperature=0.9, top_k=20, top_p=0.95, seed=3)
# An EOS that no model predicts, so that rows run to their limit.
NEVER = -1


@pytest.fixture
def alone():
    """A mesh of one device."""
    use_one_device()


def use_one_device():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def weights():
    """Weights of each kind, larger than at initialization so that texts are not all alike."""
    use_one_device()
    return {kind: lively(cfg) for kind, cfg in KINDS.items()}


def lively(cfg, seed=1):
    random = np.random.default_rng(seed)

    def draw(shape):
        return (0.4 * random.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map(draw, model.shapes(cfg))


def ready(kind, weights):
    return decoding.prepare_params(KINDS[kind], weights[kind])


def generate(kind, weights, decode, examples=EXAMPLES, drafter=None, script=None, **options):
    request = decoding.make_request(KINDS[kind], examples, decode, **({"eos": NEVER} | options))
    params = ready(kind, weights)
    drafting = decoding.Drafting() if drafter is None else decoding.Drafting(drafter, script)
    return decoding.generate(KINDS[kind], params, request, decode, drafting)


class Rollout:
    """Plain Python: every token by a teacher-forced pass over the whole text."""

    def __init__(self, kind, weights):
        self.cfg, self.params = KINDS[kind], weights[kind]
        self.apply = jax.jit(
            lambda params, batch: model.Transformer(self.cfg).apply({"params": params}, batch)
        )

    def logits(self, example, written):
        """Returns the logits [v] after the tokens of `written`."""
        row = [*written, 0]
        filled = row + [0] * (32 - len(row) - (0 if self.cfg.encoder else len(example)))
        batch = scoring.teacher_forced_batch(self.cfg, [example], [filled])
        place = len(written) + (0 if self.cfg.encoder else len(example))
        return np.asarray(self.apply(self.params, generation.shard_rows(batch)))[0, place]

    def text(self, example, pick, length, eos=NEVER):
        written = []
        while len(written) < length and (not written or written[-1] != eos):
            # The slot of Model.decoder_start_token_id and of a prompt come before.
            position = len(written) + 1 + (0 if self.cfg.encoder else len(example))
            written.append(int(pick(self.logits(example, written), position)))
        return written


def nucleus(logits, decode):
    """Returns the tokens that top-k, then top-p, leave; by sorting."""
    order = np.argsort(-logits, kind="stable")
    if decode.top_k:
        order = order[: decode.top_k]
    probability = np.exp(logits[order] - logits[order].max())
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    return order[before < decode.top_p]


def reference_draw(decode, row):
    """The reference draw: temperature, top-k, top-p, then argmax of logits plus keyed Gumbel."""

    def pick(logits, position):
        logits = logits / decode.temperature
        key = jax.random.fold_in(jax.random.key(decode.seed), row)
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, position), logits.shape))
        left = nucleus(logits, decode)
        return left[np.argmax((logits + noise)[left])]

    return pick


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_argmax_rollout_of_the_uncached_model(alone, weights, kind):
    result, plain = generate(kind, weights, GREEDY), Rollout(kind, weights)
    for row, example in enumerate(EXAMPLES):
        expected = plain.text(example, lambda logits, position: np.argmax(logits), 10)
        assert result.tokens[row, 0].tolist() == expected
        assert result.lengths[row, 0] == 10


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_sampled_text_is_that_of_a_plain_python_loop(alone, weights, kind):
    result, plain = generate(kind, weights, SAMPLED), Rollout(kind, weights)
    for row in (0, 2):
        expected = plain.text(EXAMPLES[row], reference_draw(SAMPLED, row), 10)
        assert result.tokens[row, 0].tolist() == expected


@pytest.mark.parametrize(
    "kind, decode", [("encoder_decoder", GREEDY), ("decoder_only", SAMPLED), ("prefix", GREEDY)]
)
def test_a_row_depends_on_no_other_row_nor_on_its_place(alone, weights, kind, decode):
    together = generate(kind, weights, decode)
    order = [4, 2, 0, 3]
    mixed = generate(kind, weights, decode, [EXAMPLES[i] for i in order], rows=order, batch=7)
    for place, row in enumerate(order):
        np.testing.assert_array_equal(mixed.tokens[place], together.tokens[row])
        np.testing.assert_allclose(mixed.scores[place], together.scores[row], atol=1e-5)
    assert mixed.lengths[4:].tolist() == [[0]] * 3


@pytest.mark.slow
def test_another_seed_or_row_number_draws_another_text(alone, weights):
    same = [EXAMPLES[0]] * 3
    first = (
        generate("encoder_decoder", weights, SAMPLED, same, rows=[0, 1, 0]).tokens[:, 0].tolist()
    )
    assert first[0] == first[2] != first[1]
    seeded = config.Decode(max_new_tokens=10, temperature=0.9, top_k=20, top_p=0.95, seed=4)
    assert generate("encoder_decoder", weights, seeded, same).tokens[0, 0].tolist() != first[0]


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_text_ends_at_its_own_eos(alone, weights, kind):
    free = generate(kind, weights, GREEDY)
    eos = int(free.tokens[0, 0, 4])
    ended = generate(kind, weights, GREEDY, eos=eos)
    for row in range(len(EXAMPLES)):
        text = free.tokens[row, 0].tolist()
        length = text.index(eos) + 1 if eos in text else 10
        assert ended.lengths[row, 0] == length
        assert ended.tokens[row, 0].tolist() == text[:length] + [0] * (10 - length)


def test_rows_have_limits_of_their_own_and_a_row_without_room_is_inert(alone, weights):
    free = generate("encoder_decoder", weights, GREEDY)
    request = decoding.make_request(KINDS["encoder_decoder"], EXAMPLES, GREEDY, eos=NEVER)
    request = request._replace(limit=np.array([3, 0, 10, 1, 7], np.int32))
    limited = decoding.generate(
        KINDS["encoder_decoder"], ready("encoder_decoder", weights), request, GREEDY
    )
    assert limited.lengths[:, 0].tolist() == [3, 0, 10, 1, 7]
    for row, limit in enumerate(request.limit):
        assert limited.tokens[row, 0, :limit].tolist() == free.tokens[row, 0, :limit].tolist()


@dataclass(frozen=True)
class Scripted:
    """Drafts from a script [b T] of what follows each slot, right or wrong."""

    width: int
    top: int = 0

    @property
    def tree(self):
        return protocol.chain(self.width)

    def begin(self, context):
        return context.weights

    def propose(self, context, drafter_state, state):
        def take(row, start):
            return jax.lax.dynamic_slice_in_dim(row, start, self.width - 1)

        return protocol.Draft(jax.vmap(take)(drafter_state, state.length)), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


def script(kind, result, shift=0):
    """Returns the token of a result after each slot of the texts of a kind, or the one `shift` ids
    further; -1 in the prompt."""
    rows, _, length = result.tokens.shape
    tokens = np.full((rows, 64), -1, np.int32)
    for row, example in enumerate(EXAMPLES):
        first = 0 if KINDS[kind].encoder else len(example)
        tokens[row, first : first + length] = (result.tokens[row, 0] + shift) % 64
    return generation.shard_rows(tokens)


EACH_KIND = pytest.mark.parametrize(
    "kind, decode",
    [
        ("encoder_decoder", GREEDY),
        ("decoder_only", SAMPLED),
        ("prefix", GREEDY),
        ("encoder_decoder", SAMPLED),
    ],
)


@pytest.mark.slow
@EACH_KIND
def test_no_drafter_changes_a_token(alone, weights, kind, decode):
    plain = generate(kind, weights, decode)
    scripts = script(kind, plain), script(kind, plain, shift=1)
    oracle, hostile = (
        generate(kind, weights, decode, drafter=Scripted(4), script=each) for each in scripts
    )
    assert plain.steps == hostile.steps == 10
    assert oracle.steps == 3
    for drafted in (oracle, hostile):
        np.testing.assert_array_equal(drafted.tokens, plain.tokens)
        np.testing.assert_array_equal(drafted.lengths, plain.lengths)
        np.testing.assert_allclose(drafted.scores, plain.scores, atol=1e-4)


def test_eos_inside_an_accepted_block_ends_the_text_there(alone, weights):
    free = generate("encoder_decoder", weights, GREEDY)
    eos = int(free.tokens[2, 0, 5])
    plain = generate("encoder_decoder", weights, GREEDY, eos=eos)
    right = script("encoder_decoder", free)
    drafted = generate(
        "encoder_decoder", weights, GREEDY, eos=eos, drafter=Scripted(8), script=right
    )
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)


@pytest.mark.parametrize("width", [1, 4])
def test_the_cache_equals_a_fresh_prefill_of_what_was_written(alone, weights, width):
    cfg, params = KINDS["decoder_only"], ready("decoder_only", weights)
    request = decoding.make_request(cfg, EXAMPLES, GREEDY, eos=NEVER)
    request = generation.shard_rows(request._replace(eos=None))
    drafter_state = generation.shard_rows(np.full((len(EXAMPLES), 64), 5, np.int32))

    def prefill(params, prompts):
        return target.prefill(cfg, params, model.EncoderMemory(), prompts, 40)

    def decode_script(params, request, drafter_state):
        prompts = target.Prompts(request.prompts, request.prompts_length)
        stopping = protocol.StoppingCriteria(NEVER, prompts.length + request.limit)
        lone = target.make_target(cfg, params, model.EncoderMemory())
        context = protocol.DecodeContext(lone, stopping, prompts, weights=drafter_state)
        state = generation.initial_state(context, prefill(params, prompts), 40, drafter_state)
        return loop.run_loop(context, Scripted(width), exact.Exact(), state)

    state = jax.jit(decode_script)(params, request, drafter_state)
    fresh = jax.jit(prefill)(params, target.Prompts(state.tokens, state.length))
    assert state.length.tolist() == [len(example) + 10 for example in EXAMPLES]
    for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(fresh), strict=True):
        for row, length in enumerate(state.length.tolist()):
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind, decode", [("encoder_decoder", SAMPLED), ("decoder_only", GREEDY)])
def test_a_mesh_changes_no_token(weights, kind, decode):
    many = [*EXAMPLES, *EXAMPLES[:3]]
    use_one_device()
    expected = generate(kind, weights, decode, many)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = generate(kind, weights, decode, many)
    np.testing.assert_array_equal(split.tokens, expected.tokens)
    np.testing.assert_allclose(split.scores, expected.scores, rtol=1e-4)


def test_a_request_that_no_model_can_answer_says_why():
    cfg = KINDS["encoder_decoder"]
    with pytest.raises(ValueError, match="vocabulary 0..63"):
        decoding.make_request(cfg, [[3], [64]], GREEDY)
    with pytest.raises(ValueError, match="Input 1 is empty"):
        decoding.make_request(cfg, [[3], []], GREEDY)
    with pytest.raises(ValueError, match="no rows"):
        decoding.make_request(cfg, [], GREEDY)
    with pytest.raises(ValueError, match="needs a decoder"):
        decoding.make_request(toy_model("encoder_only"), [[3]], GREEDY)


def test_rows_that_the_mesh_cannot_split_are_refused(weights):
    sharding.use_mesh(config.Mesh(data=8))
    with pytest.raises(ValueError, match="5 rows cannot be split over 8"):
        generate("encoder_decoder", weights, GREEDY)


def test_other_sampling_parameters_compile_nothing_new(alone, weights):
    generate("encoder_decoder", weights, SAMPLED)
    before = generation.compiled_generate._cache_size()
    for temperature, top_k, seed, length in ((0.5, 3, 1, 9), (1.3, 0, 2, 12)):
        decode = config.Decode(
            max_new_tokens=length, temperature=temperature, top_k=top_k, seed=seed
        )
        generate("encoder_decoder", weights, decode)
    assert generation.compiled_generate._cache_size() == before


def test_zero_temperature_rows_are_greedy_among_sampled_ones(alone):
    logits = jnp.array([[[0.0, 3.0, 2.0]], [[0.0, 3.0, 2.0]]])
    rows = jnp.arange(2)
    params = sampling.SamplingParams(jnp.array([0.0, 9.0]), rows * 0, rows * 0 + 1.0, rows, rows)
    choose = jax.jit(lambda place: sampling.choose_tokens(logits, jnp.full((2, 1), place), params))
    chosen = [choose(place) for place in range(40)]
    assert {int(each[0, 0]) for each in chosen} == {1}
    assert {int(each[1, 0]) for each in chosen} == {0, 1, 2}


def test_any_of_several_eos_ends_a_text(alone, weights):
    free = generate("decoder_only", weights, GREEDY)
    texts = free.tokens[:, 0].tolist()
    eos = [texts[0][4], texts[1][2], 63]
    ended = generate("decoder_only", weights, GREEDY, eos=eos)
    for row, text in enumerate(texts):
        length = min([text.index(token) + 1 for token in eos if token in text], default=10)
        assert ended.lengths[row, 0] == length
        assert ended.tokens[row, 0].tolist() == text[:length] + [0] * (10 - length)


def test_a_decoder_without_start_token_continues_the_prompt_as_it_is(alone, weights):
    with_start = KINDS["decoder_only"]
    without = dataclasses.replace(with_start, add_bos=False)
    params = ready("decoder_only", weights)
    prompts = [[with_start.decoder_start_token_id, *example] for example in EXAMPLES]
    started = decoding.make_request(with_start, EXAMPLES, GREEDY, eos=NEVER)
    request = decoding.make_request(without, [*prompts[:4], []], GREEDY, eos=NEVER)
    assert request.prompts_length.tolist() == [4, 2, 8, 3, 1]
    expected = decoding.generate(with_start, params, started, GREEDY).tokens[:4]
    tokens = decoding.generate(without, params, request, GREEDY).tokens[:4]
    np.testing.assert_array_equal(tokens, expected)
