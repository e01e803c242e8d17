# SPDX-License-Identifier: Apache-2.0
"""Laws of the decoding loop: whatever drafts and whoever shares a batch, the ids are the same."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import (
    acceptance,
    generation,
    loop,
    protocol,
    sampling,
    scoring,
    target,
)

KINDS = {
    "pair": toy_model("pair", positions="relative"),
    "joined": toy_model("joined", positions="rotary", kv_heads=2),
    "prefix": toy_model("joined", prefix_lm=True, positions="relative"),
}
EXAMPLES = [[5, 9, 33], [7], [60, 2, 2, 8, 14, 31, 9], [12, 13], [40] * 5]
GREEDY = config.Decode(length=10)
SAMPLED = config.Decode(length=10, temperature=0.9, top_k=20, top_p=0.95, seed=3)
# A token nothing ends with, so that rows run to their limit.
NEVER = -1


@pytest.fixture
def alone():
    """A mesh of one device."""
    use_one_device()


def use_one_device():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def weights():
    """Weights of each kind, larger than at initialisation so that texts are not all alike."""
    use_one_device()
    return {kind: lively(cfg) for kind, cfg in KINDS.items()}


def lively(cfg, seed=1):
    draw = np.random.default_rng(seed)
    make = lambda shape: (0.4 * draw.normal(size=shape.shape)).astype(np.float32)
    return jax.tree.map(make, model.shapes(cfg))


def ready(kind, weights):
    return decoding.prepare(KINDS[kind], weights[kind])


def generate(kind, weights, decode, examples=EXAMPLES, drafter=None, script=None, **given):
    request = decoding.request(KINDS[kind], examples, decode, **({"eos": NEVER} | given))
    params = ready(kind, weights)
    drafting = decoding.Drafting() if drafter is None else decoding.Drafting(drafter, script)
    return decoding.generate(KINDS[kind], params, request, decode, drafting)


class Rollout:
    """Plain Python: every token by a whole teacher-forced pass over all that is there."""

    def __init__(self, kind, weights):
        self.cfg, self.params = KINDS[kind], weights[kind]
        self.apply = jax.jit(
            lambda params, batch: model.Transformer(self.cfg).apply({"params": params}, batch)
        )

    def logits(self, example, written):
        """[v] after what is written."""
        row = [*written, 0]
        filled = row + [0] * (32 - len(row) - (0 if self.cfg.encoder else len(example)))
        batch = scoring.teacher_forced(self.cfg, [example], [filled])
        place = len(written) + (0 if self.cfg.encoder else len(example))
        return np.asarray(self.apply(self.params, generation.place(batch)))[0, place]

    def text(self, example, pick, length, eos=NEVER):
        written = []
        while len(written) < length and (not written or written[-1] != eos):
            # The slot of Model.start and of a prompt come before.
            position = len(written) + 1 + (0 if self.cfg.encoder else len(example))
            written.append(int(pick(self.logits(example, written), position)))
        return written


def nucleus(logits, decode):
    """Which tokens top-k, then top-p, leave; by sorting."""
    order = np.argsort(-logits, kind="stable")
    if decode.top_k:
        order = order[: decode.top_k]
    probability = np.exp(logits[order] - logits[order].max())
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    return order[before < decode.top_p]


def drawn(decode, row):
    """The reference draw: temperature, top-k, top-p, then argmax of logits plus keyed Gumbel."""

    def pick(logits, position):
        logits = logits / decode.temperature
        key = jax.random.fold_in(jax.random.key(decode.seed), row)
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, position), logits.shape))
        left = nucleus(logits, decode)
        return left[np.argmax((logits + noise)[left])]

    return pick


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_argmax_rollout_of_the_uncached_model(alone, weights, kind):
    result, plain = generate(kind, weights, GREEDY), Rollout(kind, weights)
    for row, example in enumerate(EXAMPLES):
        expected = plain.text(example, lambda logits, position: np.argmax(logits), 10)
        assert result.tokens[row, 0].tolist() == expected
        assert result.lengths[row, 0] == 10


@pytest.mark.parametrize("kind", ["pair", "joined"])
def test_sampled_text_is_that_of_a_plain_python_loop(alone, weights, kind):
    result, plain = generate(kind, weights, SAMPLED), Rollout(kind, weights)
    for row in (0, 2):
        expected = plain.text(EXAMPLES[row], drawn(SAMPLED, row), 10)
        assert result.tokens[row, 0].tolist() == expected


@pytest.mark.parametrize(
    "kind, decode", [("pair", GREEDY), ("joined", SAMPLED), ("prefix", GREEDY)]
)
def test_a_row_depends_on_no_other_row_nor_on_its_place(alone, weights, kind, decode):
    together = generate(kind, weights, decode)
    order = [4, 2, 0, 3]
    mixed = generate(kind, weights, decode, [EXAMPLES[i] for i in order], rows=order, batch=7)
    for place, row in enumerate(order):
        np.testing.assert_array_equal(mixed.tokens[place], together.tokens[row])
        np.testing.assert_allclose(mixed.scores[place], together.scores[row], atol=1e-5)
    assert mixed.lengths[4:].tolist() == [[0]] * 3


def test_another_seed_or_row_number_draws_another_text(alone, weights):
    same = [EXAMPLES[0]] * 3
    first = generate("pair", weights, SAMPLED, same, rows=[0, 1, 0]).tokens[:, 0].tolist()
    assert first[0] == first[2] != first[1]
    seeded = config.Decode(length=10, temperature=0.9, top_k=20, top_p=0.95, seed=4)
    assert generate("pair", weights, seeded, same).tokens[0, 0].tolist() != first[0]


@pytest.mark.parametrize("kind", ["pair", "joined"])
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
    free = generate("pair", weights, GREEDY)
    request = decoding.request(KINDS["pair"], EXAMPLES, GREEDY, eos=NEVER)
    request = request._replace(limit=np.array([3, 0, 10, 1, 7], np.int32))
    limited = decoding.generate(KINDS["pair"], ready("pair", weights), request, GREEDY)
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

    def begin(self, setting):
        return setting.weights

    def propose(self, setting, memory, state):
        take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, self.width - 1)
        return protocol.Draft(jax.vmap(take)(memory, state.length)), memory

    def observe(self, setting, memory, state, verdict):
        return memory


def script(kind, result, shift=0):
    """What follows each slot in the texts of a result, or another token: none in the prompt."""
    rows, _, length = result.tokens.shape
    made = np.full((rows, 64), -1, np.int32)
    for row, example in enumerate(EXAMPLES):
        first = 0 if KINDS[kind].encoder else len(example)
        made[row, first : first + length] = (result.tokens[row, 0] + shift) % 64
    return generation.place(made)


@pytest.mark.parametrize(
    "kind, decode", [("pair", GREEDY), ("joined", SAMPLED), ("prefix", GREEDY), ("pair", SAMPLED)]
)
def test_no_drafter_changes_a_token(alone, weights, kind, decode):
    plain = generate(kind, weights, decode)
    scripts = script(kind, plain), script(kind, plain, shift=1)
    oracle, hostile = (
        generate(kind, weights, decode, drafter=Scripted(4), script=given) for given in scripts
    )
    assert plain.calls == hostile.calls == 10
    assert oracle.calls == 3
    for drafted in (oracle, hostile):
        np.testing.assert_array_equal(drafted.tokens, plain.tokens)
        np.testing.assert_array_equal(drafted.lengths, plain.lengths)
        np.testing.assert_allclose(drafted.scores, plain.scores, atol=1e-4)


def test_eos_inside_an_accepted_block_ends_the_text_there(alone, weights):
    free = generate("pair", weights, GREEDY)
    eos = int(free.tokens[2, 0, 5])
    plain = generate("pair", weights, GREEDY, eos=eos)
    right = script("pair", free)
    drafted = generate("pair", weights, GREEDY, eos=eos, drafter=Scripted(8), script=right)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)


@pytest.mark.parametrize("width", [1, 4])
def test_the_cache_equals_a_fresh_prefill_of_what_was_written(alone, weights, width):
    cfg, params = KINDS["joined"], ready("joined", weights)
    request = decoding.request(cfg, EXAMPLES, GREEDY, eos=NEVER)
    request = generation.place(request._replace(eos=None))
    memory = generation.place(np.full((len(EXAMPLES), 64), 5, np.int32))
    prefill = lambda params, prompts: target.prefill(cfg, params, model.Read(), prompts, 40)

    def written(params, request, memory):
        prompts = target.Prompts(request.prompts, request.prompts_length)
        rules = protocol.Rules(NEVER, prompts.length + request.limit, None)
        lone = target.of(cfg, params, model.Read())
        setting = protocol.Setting(lone, rules, prompts, weights=memory)
        state = generation.started(setting, prefill(params, prompts), 40, memory)
        return loop.run(setting, Scripted(width), acceptance.Exact(), state)

    state = jax.jit(written)(params, request, memory)
    fresh = jax.jit(prefill)(params, target.Prompts(state.tokens, state.length))
    assert state.length.tolist() == [len(example) + 10 for example in EXAMPLES]
    for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(fresh), strict=True):
        for row, length in enumerate(state.length.tolist()):
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length], atol=1e-5)


@pytest.mark.parametrize("kind, decode", [("pair", SAMPLED), ("joined", GREEDY)])
def test_a_mesh_changes_no_token(weights, kind, decode):
    many = [*EXAMPLES, *EXAMPLES[:3]]
    use_one_device()
    expected = generate(kind, weights, decode, many)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = generate(kind, weights, decode, many)
    np.testing.assert_array_equal(split.tokens, expected.tokens)
    np.testing.assert_allclose(split.scores, expected.scores, rtol=1e-4)


def test_a_request_that_no_model_can_answer_says_why():
    cfg = KINDS["pair"]
    with pytest.raises(ValueError, match="vocabulary 0..63"):
        decoding.request(cfg, [[3], [64]], GREEDY)
    with pytest.raises(ValueError, match="Example 1 is empty"):
        decoding.request(cfg, [[3], []], GREEDY)
    with pytest.raises(ValueError, match="no rows"):
        decoding.request(cfg, [], GREEDY)
    with pytest.raises(ValueError, match="needs a decoder"):
        decoding.request(toy_model("aligned"), [[3]], GREEDY)


def test_rows_that_the_mesh_cannot_split_are_refused(weights):
    sharding.use_mesh(config.Mesh(data=8))
    with pytest.raises(ValueError, match="5 rows cannot be split over 8"):
        generate("pair", weights, GREEDY)


def test_changing_how_text_is_drawn_compiles_nothing_new(alone, weights):
    generate("pair", weights, SAMPLED)
    before = generation.compiled._cache_size()
    for temperature, top_k, seed, length in ((0.5, 3, 1, 9), (1.3, 0, 2, 12)):
        decode = config.Decode(length=length, temperature=temperature, top_k=top_k, seed=seed)
        generate("pair", weights, decode)
    assert generation.compiled._cache_size() == before


def test_zero_temperature_rows_are_greedy_among_sampled_ones(alone):
    logits = jnp.array([[[0.0, 3.0, 2.0]], [[0.0, 3.0, 2.0]]])
    rows = jnp.arange(2)
    draws = sampling.Sampling(jnp.array([0.0, 9.0]), rows * 0, rows * 0 + 1.0, rows, rows)
    choose = jax.jit(lambda place: sampling.choose(logits, jnp.full((2, 1), place), draws))
    chosen = [choose(place) for place in range(40)]
    assert {int(each[0, 0]) for each in chosen} == {1}
    assert {int(each[1, 0]) for each in chosen} == {0, 1, 2}


def test_any_of_several_eos_ends_a_text(alone, weights):
    free = generate("joined", weights, GREEDY)
    texts = free.tokens[:, 0].tolist()
    eos = [texts[0][4], texts[1][2], 63]
    ended = generate("joined", weights, GREEDY, eos=eos)
    for row, text in enumerate(texts):
        length = min([text.index(token) + 1 for token in eos if token in text], default=10)
        assert ended.lengths[row, 0] == length
        assert ended.tokens[row, 0].tolist() == text[:length] + [0] * (10 - length)


def test_a_lone_decoder_without_start_continues_the_prompt_as_it_is(alone, weights):
    told = KINDS["joined"]
    untold = dataclasses.replace(told, starts_prompts=False)
    params = ready("joined", weights)
    begun = [[told.start, *example] for example in EXAMPLES]
    same = decoding.request(told, EXAMPLES, GREEDY, eos=NEVER)
    given = decoding.request(untold, [*begun[:4], []], GREEDY, eos=NEVER)
    assert given.prompts_length.tolist() == [4, 2, 8, 3, 1]
    expected = decoding.generate(told, params, same, GREEDY).tokens[:4]
    found = decoding.generate(untold, params, given, GREEDY).tokens[:4]
    np.testing.assert_array_equal(found, expected)
