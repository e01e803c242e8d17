# SPDX-License-Identifier: Apache-2.0
"""Laws of acceptance: distributions of texts by enumeration, mutants that break them, lossy rules.

The model is a table: a row for every position and token before is the distribution of a token."""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_decoding_loop import use_one_device

from t5x_lite import config, sharding
from t5x_lite.decoding import generation, loop, protocol, sampling
from t5x_lite.decoding.acceptance import approximate, speculative
from t5x_lite.decoding.acceptance import exact as acceptance

pytestmark = pytest.mark.slow
WORDS, STEPS, ROWS = 5, 4, 50_000
draw = np.random.default_rng(0)
# Positions 0.. of the token before; the drafter's distribution is near the model's.
MODEL = 1.3 * draw.normal(size=(STEPS + 4, WORDS, WORDS)).astype(np.float32)
DRAFT = (MODEL + 0.9 * draw.normal(size=MODEL.shape)).astype(np.float32)
NEVER = -1
# Unlike the rest of the suite: 50,000 rows of noise are worth compiling well.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.fixture(autouse=True)
def alone():
    use_one_device()


def table_logits(table, tokens, positions):
    """Logits of a table after tokens at positions, as a sum, which has its place on any mesh."""
    place = jax.nn.one_hot(positions, table.shape[0])
    before = jax.nn.one_hot(tokens, table.shape[1])
    return jnp.einsum("bwp,bwt,ptv->bwv", place, before, table)


def table_target(table):
    def forward(tokens, index, cache, tree=None):
        positions = index[:, None] + jnp.arange(tokens.shape[1])
        return jnp.stack([tokens, positions], axis=-1), cache

    return protocol.Target(forward, lambda h: table_logits(table, h[..., 0], h[..., 1]))


@dataclass(frozen=True)
class TableDrafter:
    """A chain (width) from DRAFT, or the model if not stochastic; some are missing; no top."""

    width: int = 3
    stochastic: bool = True
    missing: bool = False
    top: int = 0

    @property
    def tree(self):
        return protocol.chain(self.width)

    def begin(self, context):
        return None

    def propose(self, context, drafter_state, state):
        begin, token, draws = state.length + 1, state.root, context.sampling
        tokens, distributions = [], []
        for ahead in range(self.width - 1):
            positions = (begin + ahead - 1)[:, None]
            logits = table_logits(DRAFT, token[:, None], positions)
            if self.stochastic:
                log_p = sampling.log_distribution(logits, draws)
                token = sampling.sample_draft(log_p[:, 0], begin, begin + ahead, draws)
                distributions.append(log_p)
            else:
                token = sampling.choose_tokens(logits, positions + 1, draws)[:, 0]
            tokens.append(token)
        tokens = jnp.stack(tokens, axis=1)
        if self.missing:
            # Every second row drafts one token only, whatever its drafts are.
            short = (jnp.arange(self.width - 1) >= 1) & (state.root % 2 == 1)[:, None]
            tokens = jnp.where(short, -1, tokens)
        log_p = jnp.concatenate(distributions, axis=1) if distributions else None
        return protocol.Draft(tokens, log_p), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


def texts(drafter, accept, rows=ROWS, seed=11, temperature=1.0, top_k=0):
    """Texts by drafter and accept from token 0 on, in rows; sampled by seed, temperature, top_k."""

    def run(row):
        draws = sampling.SamplingParams(
            temperature=row * 0.0 + temperature,
            top_k=(row * 0).astype(jnp.int32) + top_k,
            top_p=row * 0.0 + 1.0,
            seed=(row * 0 + seed).astype(jnp.uint32),
            row=row.astype(jnp.uint32),
        )
        prompts = protocol.Prompts((row * 0).astype(jnp.int32)[:, None], (row * 0 + 1).astype(int))
        stopping = protocol.StoppingCriteria(NEVER, prompts.length + STEPS)
        context = protocol.DecodeContext(table_target(MODEL), stopping, prompts, sampling=draws)
        state = generation.initial_state(context, None, 1 + STEPS + drafter.width, None)
        return loop.run_loop(context, drafter, accept, state)

    numbers = generation.shard_rows(np.arange(rows))
    return jax.jit(run).lower(numbers).compile(OPTIMIZED)(numbers)


@functools.cache
def honest(drafter, accept):
    """The texts while nothing is mutated, for all tests that count something in them."""
    return jax.device_get(texts(drafter, accept))


def text_probabilities(temperature=1.0, top_k=0):
    """Computes the probability of each of the WORDS ** STEPS texts, in float64."""
    logits = MODEL.astype(np.float64) / temperature
    if top_k:
        least = np.sort(logits, axis=-1)[..., -top_k, None]
        logits = np.where(logits >= least, logits, -np.inf)
    p = np.exp(logits)
    p /= p.sum(axis=-1, keepdims=True)
    probabilities = []
    for text in itertools.product(range(WORDS), repeat=STEPS):
        steps = zip([0, *text], text, strict=False)
        probabilities.append(np.prod([p[place, a, b] for place, (a, b) in enumerate(steps)]))
    return np.array(probabilities)


def p_value(state, probability):
    """Computes the p-value of the texts by chi-square, with rare texts pooled."""
    tokens = np.asarray(state.tokens)[:, 1 : STEPS + 1]
    number = (tokens * WORDS ** np.arange(STEPS)[::-1]).sum(axis=1)
    counts = np.bincount(number, minlength=WORDS**STEPS)
    expected = probability * len(tokens)
    assert counts[probability == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    pooled = np.append(expected[common], expected[~common].sum())
    if pooled[-1] < 5:
        observed, pooled = observed[:-1], pooled[:-1]
    assert len(pooled) > 30
    return stats.chi2.sf(((observed - pooled) ** 2 / pooled).sum(), len(pooled) - 1)


EXACT_RULES = {
    "speculative": (speculative.Speculative(), {}),
    "block": (speculative.BlockVerification(), {}),
    "one of one": (speculative.Speculative(), {"stochastic": False}),
    "block, one of one": (speculative.BlockVerification(), {"stochastic": False}),
    "no draft": (speculative.Speculative(), {"missing": True}),
    "block, no draft": (speculative.BlockVerification(), {"missing": True, "width": 4}),
    "lenient 1": (approximate.Lenient(1.0), {}),
    "exact": (acceptance.Exact(), {"stochastic": False}),
}


@pytest.mark.parametrize("name", EXACT_RULES)
def test_texts_have_the_distribution_of_the_model(name):
    accept, drafter = EXACT_RULES[name]
    assert p_value(honest(TableDrafter(**drafter), accept), text_probabilities()) > 1e-3


@pytest.mark.parametrize("accept", [speculative.Speculative(), speculative.BlockVerification()])
def test_the_distribution_is_that_after_temperature_and_top_k(accept):
    state = texts(TableDrafter(), accept, temperature=0.7, top_k=3)
    assert p_value(state, text_probabilities(temperature=0.7, top_k=3)) > 1e-3


def spill(p, q):
    """A residual that is not normalized: the missing mass goes to the last token."""
    left = jnp.maximum(p - q, 0)
    return left.at[..., -1].add(1 - left.sum(axis=-1))


def rolled(inputs):
    distributions = block_distributions(inputs)
    return distributions._replace(q=jnp.roll(distributions.q, 1, axis=1))


def one_noise(inputs, kind):
    return jnp.broadcast_to(node_noise(inputs, kind)[:, :1], inputs.block.shape)


def bonus_before(x, node):
    return jax.vmap(lambda row, node: row[jnp.minimum(node, row.shape[0] - 2)])(x, node)


block_distributions, node_noise = speculative.block_distributions, speculative.node_noise
MUTANTS = {
    "no residual": ("residual", lambda p, q: p),
    "residual not normalized": ("residual", spill),
    "one uniform number for all": ("node_noise", one_noise),
    "bonus of the node before": ("take_node", bonus_before),
    "q of another position": ("block_distributions", rolled),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_rule_shows_in_the_distribution(monkeypatch, name):
    part, mutant = MUTANTS[name]
    monkeypatch.setattr(speculative, part, mutant)
    assert p_value(texts(TableDrafter(), speculative.Speculative()), text_probabilities()) < 1e-6


@pytest.mark.parametrize("name", ["no residual", "one uniform number for all"])
def test_a_mutant_of_block_verification_shows_in_the_distribution(monkeypatch, name):
    part, mutant = MUTANTS[name]
    if part == "residual":
        closed = speculative.close_path
        monkeypatch.setattr(
            speculative, "close_path", lambda j, count, left, p: closed(j, count, p, p)
        )
    else:
        # One number per row would do for a block: all the drafts and the last token share it.
        monkeypatch.setattr(speculative, part, lambda inputs, kind: residual_noise(inputs))
    state = texts(TableDrafter(width=4), speculative.BlockVerification())
    assert p_value(state, text_probabilities()) < 1e-6


def residual_noise(inputs):
    """The noise of the residual, used to accept as well."""
    kind, positions, shape = sampling.NoiseKind.RESIDUAL, inputs.positions, inputs.logits.shape[-1:]
    return sampling.uniform_noise(inputs.sampling, kind, positions[:, 0], positions, shape)[..., 0]


def probabilities(table):
    p = np.exp(table.astype(np.float64))
    return p / p.sum(axis=-1, keepdims=True)


def first_step_counts(state):
    """Counts the tokens of the first step of each row."""
    return (np.asarray(state.token_step)[:, 1 : STEPS + 1] == 0).sum(axis=1)


def test_drafts_are_accepted_as_often_as_the_distributions_overlap():
    count = first_step_counts(honest(TableDrafter(), speculative.Speculative()))
    p, q = probabilities(MODEL), probabilities(DRAFT)
    overlap = np.minimum(p, q).sum(axis=-1)
    first = overlap[0, 0]
    # The second draft comes after an accepted first one, which has the distribution min(p, q).
    second = (np.minimum(p, q)[0, 0] * overlap[1]).sum()
    for share, observed in ((first, count >= 2), (second, count >= 3)):
        error = 4 * np.sqrt(share * (1 - share) / ROWS)
        assert abs(observed.mean() - share) < error


def test_block_verification_accepts_more_tokens():
    token = first_step_counts(honest(TableDrafter(width=4), speculative.Speculative())).mean()
    block = first_step_counts(honest(TableDrafter(width=4), speculative.BlockVerification())).mean()
    # The expected number of a block by its definition (arXiv 2403.10444): sum of E min over paths.
    p, q = probabilities(MODEL), probabilities(DRAFT)
    expected_size = 1.0
    for size in (1, 2, 3):
        for text in itertools.product(range(WORDS), repeat=size):
            pairs = list(zip([0, *text], text, strict=False))
            reach, spent = 1.0, 1.0
            for place, (a, b) in enumerate(pairs):
                reach = min(1.0, reach * p[place, a, b] / q[place, a, b])
                spent *= q[place, a, b]
            expected_size += spent * reach
    assert block > token
    assert abs(block - expected_size) < 0.015


def test_shared_noise_is_accepted_nearly_as_often_as_by_any_rule():
    count = first_step_counts(honest(TableDrafter(stochastic=False), acceptance.Exact()))
    apart = 1 - np.minimum(probabilities(MODEL), probabilities(DRAFT)).sum(axis=-1)[0, 0]
    right = (count >= 2).mean()
    assert (1 - apart) / (1 + apart) - 0.01 < right < 1 - apart + 0.01


def test_the_same_request_is_drawn_the_same_and_another_seed_otherwise():
    one, same, other = (
        np.asarray(texts(TableDrafter(), speculative.Speculative(), rows=64, seed=seed).tokens)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("accept", [speculative.Speculative(), speculative.BlockVerification()])
def test_a_mesh_changes_no_token(accept):
    one = np.asarray(texts(TableDrafter(), accept, rows=64).tokens)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(np.asarray(texts(TableDrafter(), accept, rows=64).tokens), one)


def test_a_tree_is_refused_by_rules_for_chains():
    tree = protocol.Tree((-1, 0, 0))
    draws = sampling.SamplingParams(*[jnp.ones(1)] * 3, *[jnp.ones(1, jnp.uint32)] * 2)
    block = jnp.zeros((1, 3), jnp.int32)
    inputs = acceptance.VerifyInput(
        block, jnp.zeros((1, 3, 4)), block, protocol.Draft(block[:, 1:]), block, tree, draws
    )
    for rule in (
        speculative.Speculative(),
        speculative.BlockVerification(),
        approximate.Lenient(0.5),
    ):
        with pytest.raises(ValueError, match="one chain"):
            rule(inputs)


def greedy_inputs(seed, parents=(-1, 0, 1, 2)):
    """Returns a random block of 40 rows with drafts near the model's choice."""
    random = np.random.default_rng(seed)
    tree = protocol.Tree(parents)
    logits = random.normal(size=(40, tree.width, 7)).astype(np.float32)
    block = random.integers(-1, 7, (40, tree.width)).astype(np.int32)
    block[:, 0] = 3
    chosen = logits.argmax(axis=-1).astype(np.int32)
    draft = protocol.Draft(jnp.array(block[:, 1:]))
    arrays = map(jnp.array, (block, logits, chosen))
    return acceptance.VerifyInput(*arrays, draft, jnp.zeros((40, tree.width), int), tree, None)


def expected_tokens(inputs, holds):
    """Yields the tokens of each row by a walk in Python; holds(row, node, parent, draft)."""
    block, chosen = np.asarray(inputs.block), np.asarray(inputs.chosen)
    for row in range(len(block)):
        good, best = {0: [0]}, [0]
        for node, parent in enumerate(inputs.tree.parents[1:], start=1):
            draft = int(block[row, node])
            if parent in good and draft >= 0 and holds(row, node, parent, draft):
                good[node] = [*good[parent], node]
                best = max(best, good[node], key=len)
        yield [*block[row, best[1:]].tolist(), int(chosen[row, best[-1]])]


def entropy_floor(logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return p, min(0.3, 0.09 * np.exp((p * np.log(p)).sum()))


LOSSY = {
    "top-k": (approximate.TopK(3), lambda x, c, node, draft: (x > x[draft]).sum() < 3),
    "distance": (approximate.Distance(2), lambda x, c, node, draft: abs(draft - c) <= 2),
    "typical": (
        approximate.Typical(),
        lambda x, c, node, draft: entropy_floor(x)[0][draft] > entropy_floor(x)[1],
    ),
    "lenient": (
        approximate.Lenient(0.3),
        lambda x, c, node, draft: np.exp(x[draft] - x.max()) >= 0.3,
    ),
    "always": (approximate.Always(), lambda x, c, node, draft: True),
    "exact": (acceptance.Exact(), lambda x, c, node, draft: draft == c),
}


@pytest.mark.parametrize("parents", [(-1, 0, 1, 2), (-1, 0, 0, 1, 2, 2, 4)])
@pytest.mark.parametrize("name", LOSSY)
def test_a_rule_accepts_what_its_definition_says(name, parents):
    rule, holds = LOSSY[name]
    inputs = greedy_inputs(5, parents)
    logits, chosen = np.asarray(inputs.logits), np.asarray(inputs.chosen)
    expected = expected_tokens(
        inputs,
        lambda row, node, parent, draft: holds(
            logits[row, parent], chosen[row, parent], node, draft
        ),
    )
    path = rule(inputs)
    for row, text in enumerate(expected):
        assert path.tokens[row, : int(path.count[row])].tolist() == text


def test_a_minimum_block_is_accepted_wherever_there_are_drafts():
    inputs = greedy_inputs(6)
    path, exact = approximate.MinimumBlock(3)(inputs), acceptance.Exact()(inputs)
    for row in range(40):
        drafts = np.asarray(inputs.block)[row, 1:3]
        room = 3 if (drafts >= 0).all() else 1 + int(drafts[0] >= 0)
        assert int(path.count[row]) >= max(room, int(exact.count[row]))
    np.testing.assert_array_equal(approximate.MinimumBlock(1)(inputs).tokens, exact.tokens)


@pytest.mark.parametrize(
    "make_rule",
    [
        lambda: approximate.TopK(0),
        lambda: approximate.Distance(-1),
        lambda: approximate.Typical(epsilon=1.5),
        lambda: approximate.Typical(delta=0),
        lambda: approximate.Lenient(0),
        lambda: approximate.MinimumBlock(0),
    ],
)
def test_a_parameter_out_of_range_is_refused(make_rule):
    with pytest.raises(ValueError, match="must be"):
        make_rule()
