# SPDX-License-Identifier: Apache-2.0
"""Laws of acceptance: the law of texts by enumeration, mutants that break it, and lossy rules.

The model is a table: the law of a token is a row of its own for every position and token before.
"""

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
from t5x_lite.decoding import acceptance, generation, loop, lossy, protocol, sampling, speculative

WORDS, STEPS, ROWS = 5, 4, 50_000
draw = np.random.default_rng(0)
# Positions 0.. of the token before; the drafter's law is near the model's, but not the same.
MODEL = 1.3 * draw.normal(size=(STEPS + 4, WORDS, WORDS)).astype(np.float32)
DRAFT = (MODEL + 0.9 * draw.normal(size=MODEL.shape)).astype(np.float32)
NEVER = -1
# The suite compiles quickly and runs slowly; 50,000 rows of noise are worth compiling well.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.fixture(autouse=True)
def alone():
    use_one_device()


def looked_up(table, tokens, positions):
    """Logits after each token at its position, as a sum, which has its place on any mesh."""
    place = jax.nn.one_hot(positions, table.shape[0])
    before = jax.nn.one_hot(tokens, table.shape[1])
    return jnp.einsum("bwp,bwt,ptv->bwv", place, before, table)


def table_target(table):
    def forward(tokens, index, cache, tree=None):
        positions = index[:, None] + jnp.arange(tokens.shape[1])
        return jnp.stack([tokens, positions], axis=-1), cache

    return protocol.Target(forward, lambda h: looked_up(table, h[..., 0], h[..., 1]))


@dataclass(frozen=True)
class Table:
    """Draws a chain from DRAFT; `told` says whether with its law or by the model's own noise."""

    width: int = 3
    told: bool = True
    missing: bool = False
    top: int = 0

    @property
    def tree(self):
        return protocol.chain(self.width)

    def begin(self, setting):
        return None

    def propose(self, setting, memory, state):
        begin, token, draws = state.length + 1, state.root, setting.rules.sampling
        tokens, laws = [], []
        for ahead in range(self.width - 1):
            positions = (begin + ahead - 1)[:, None]
            logits = looked_up(DRAFT, token[:, None], positions)
            if self.told:
                law = sampling.law(logits, draws)
                token = sampling.guess(law[:, 0], begin, begin + ahead, draws)
                laws.append(law)
            else:
                token = sampling.choose(logits, positions + 1, draws)[:, 0]
            tokens.append(token)
        tokens = jnp.stack(tokens, axis=1)
        if self.missing:
            # Every second row guesses one token only: it depends on no guess.
            short = (jnp.arange(self.width - 1) >= 1) & (state.root % 2 == 1)[:, None]
            tokens = jnp.where(short, -1, tokens)
        return protocol.Draft(tokens, jnp.concatenate(laws, axis=1) if laws else None), memory

    def observe(self, setting, memory, state, verdict):
        return memory


def texts(drafter, accept, rows=ROWS, seed=11, temperature=1.0, top_k=0):
    """The state after STEPS tokens of every row, which all begin with token 0."""

    def run(row):
        draws = sampling.Sampling(
            temperature=row * 0.0 + temperature,
            top_k=(row * 0).astype(jnp.int32) + top_k,
            top_p=row * 0.0 + 1.0,
            seed=(row * 0 + seed).astype(jnp.uint32),
            row=row.astype(jnp.uint32),
        )
        prompts = protocol.Prompts((row * 0).astype(jnp.int32)[:, None], (row * 0 + 1).astype(int))
        rules = protocol.Rules(NEVER, prompts.length + STEPS, draws)
        setting = protocol.Setting(table_target(MODEL), rules, prompts)
        state = generation.started(setting, None, 1 + STEPS + drafter.width, None)
        return loop.run(setting, drafter, accept, state)

    numbers = generation.place(np.arange(rows))
    return jax.jit(run).lower(numbers).compile(OPTIMISED)(numbers)


@functools.cache
def honest(drafter, accept):
    """The texts while nothing is mutated, for all tests that count something in them."""
    return jax.device_get(texts(drafter, accept))


def law_of_texts(temperature=1.0, top_k=0):
    """The probability of each of the WORDS ** STEPS texts, in float64."""
    logits = MODEL.astype(np.float64) / temperature
    if top_k:
        least = np.sort(logits, axis=-1)[..., -top_k, None]
        logits = np.where(logits >= least, logits, -np.inf)
    p = np.exp(logits)
    p /= p.sum(axis=-1, keepdims=True)
    found = []
    for text in itertools.product(range(WORDS), repeat=STEPS):
        steps = zip([0, *text], text, strict=False)
        found.append(np.prod([p[place, a, b] for place, (a, b) in enumerate(steps)]))
    return np.array(found)


def agreement(state, law):
    """The p-value of the texts under the law, by chi-square with rare texts pooled."""
    tokens = np.asarray(state.tokens)[:, 1 : STEPS + 1]
    number = (tokens * WORDS ** np.arange(STEPS)[::-1]).sum(axis=1)
    counts = np.bincount(number, minlength=WORDS**STEPS)
    expected = law * len(tokens)
    assert counts[law == 0].sum() == 0
    common = expected >= 5
    seen = np.append(counts[common], counts[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum())
    seen, hoped = (seen, hoped) if hoped[-1] >= 5 else (seen[:-1], hoped[:-1])
    assert len(hoped) > 30
    return stats.chi2.sf(((seen - hoped) ** 2 / hoped).sum(), len(hoped) - 1)


RULES = {
    "speculative": (speculative.Speculative(), {}),
    "block": (speculative.BlockVerification(), {}),
    "one of one": (speculative.Speculative(), {"told": False}),
    "block, one of one": (speculative.BlockVerification(), {"told": False}),
    "no guess": (speculative.Speculative(), {"missing": True}),
    "block, no guess": (speculative.BlockVerification(), {"missing": True, "width": 4}),
    "lenient 1": (lossy.Lenient(1.0), {}),
    "exact": (acceptance.Exact(), {"told": False}),
}


@pytest.mark.parametrize("name", RULES)
def test_texts_have_the_law_of_the_model(name):
    accept, drafter = RULES[name]
    assert agreement(honest(Table(**drafter), accept), law_of_texts()) > 1e-3


@pytest.mark.parametrize("accept", [speculative.Speculative(), speculative.BlockVerification()])
def test_the_law_is_that_after_temperature_and_top_k(accept):
    state = texts(Table(), accept, temperature=0.7, top_k=3)
    assert agreement(state, law_of_texts(temperature=0.7, top_k=3)) > 1e-3


def spill(p, q):
    """A residual that is not normalised: what is missing goes to the last token."""
    left = jnp.maximum(p - q, 0)
    return left.at[..., -1].add(1 - left.sum(axis=-1))


def rolled(judged):
    laws = speculative_both(judged)
    guess = jnp.roll(laws.guess, 1, axis=1)
    return laws._replace(guess=guess)


def one_number(judged, stream):
    every = speculative_noise(judged, stream)
    return jnp.broadcast_to(every[:, :1], every.shape)


def bonus_before(x, node):
    return jax.vmap(lambda row, node: row[jnp.minimum(node, row.shape[0] - 2)])(x, node)


speculative_both, speculative_noise = speculative.both, speculative.noise
MUTANTS = {
    "no residual": ("residual", lambda p, q: p),
    "residual not normalised": ("residual", spill),
    "one uniform number for all": ("noise", one_number),
    "bonus of the node before": ("at", bonus_before),
    "q of another position": ("both", rolled),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_with_the_rule_shows_in_the_law(monkeypatch, name):
    part, mutant = MUTANTS[name]
    monkeypatch.setattr(speculative, part, mutant)
    assert agreement(texts(Table(), speculative.Speculative()), law_of_texts()) < 1e-6


@pytest.mark.parametrize("name", ["no residual", "one uniform number for all"])
def test_what_is_wrong_with_blocks_shows_in_the_law(monkeypatch, name):
    part, mutant = MUTANTS[name]
    if part == "residual":
        closed = speculative.closed
        monkeypatch.setattr(speculative, "closed", lambda j, count, left, p: closed(j, count, p, p))
    else:
        # A number per row would do for a block: all the guesses and what follows share it.
        monkeypatch.setattr(speculative, part, lambda judged, stream: guess_noise(judged))
    state = texts(Table(width=4), speculative.BlockVerification())
    assert agreement(state, law_of_texts()) < 1e-6


def guess_noise(judged):
    """The noise of the residual, used to accept as well."""
    shape = judged.logits.shape[-1:]
    begin = judged.positions[:, 0]
    stream = sampling.Stream.RESIDUAL
    return sampling.fresh(judged.sampling, stream, begin, judged.positions, shape)[..., 0]


def probabilities(table):
    p = np.exp(table.astype(np.float64))
    return p / p.sum(axis=-1, keepdims=True)


def first_call(state):
    """How many tokens the first call of each row wrote."""
    return (np.asarray(state.call)[:, 1 : STEPS + 1] == 0).sum(axis=1)


def test_guesses_hold_as_often_as_the_laws_overlap():
    count = first_call(honest(Table(), speculative.Speculative()))
    p, q = probabilities(MODEL), probabilities(DRAFT)
    overlap = np.minimum(p, q).sum(axis=-1)
    first = overlap[0, 0]
    # After a first guess that holds, which has the law min(p, q), the second is judged.
    second = (np.minimum(p, q)[0, 0] * overlap[1]).sum()
    for share, seen in ((first, count >= 2), (second, count >= 3)):
        error = 4 * np.sqrt(share * (1 - share) / ROWS)
        assert abs(seen.mean() - share) < error


def test_judged_as_a_block_more_tokens_hold():
    token = first_call(honest(Table(width=4), speculative.Speculative())).mean()
    block = first_call(honest(Table(width=4), speculative.BlockVerification())).mean()
    # The expected number of a block by its definition (arXiv 2403.10444): sum of E min over paths.
    p, q = probabilities(MODEL), probabilities(DRAFT)
    hoped = 1.0
    for size in (1, 2, 3):
        for text in itertools.product(range(WORDS), repeat=size):
            pairs = list(zip([0, *text], text, strict=False))
            reach, spent = 1.0, 1.0
            for place, (a, b) in enumerate(pairs):
                reach = min(1.0, reach * p[place, a, b] / q[place, a, b])
                spent *= q[place, a, b]
            hoped += spent * reach
    assert block > token
    assert abs(block - hoped) < 0.015


def test_shared_noise_guesses_right_nearly_as_often_as_any_rule_could():
    count = first_call(honest(Table(told=False), acceptance.Exact()))
    apart = 1 - np.minimum(probabilities(MODEL), probabilities(DRAFT)).sum(axis=-1)[0, 0]
    right = (count >= 2).mean()
    assert (1 - apart) / (1 + apart) - 0.01 < right < 1 - apart + 0.01


def test_the_same_request_is_drawn_the_same_and_another_seed_otherwise():
    one, same, other = (
        np.asarray(texts(Table(), speculative.Speculative(), rows=64, seed=seed).tokens)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("accept", [speculative.Speculative(), speculative.BlockVerification()])
def test_a_mesh_changes_no_token(accept):
    one = np.asarray(texts(Table(), accept, rows=64).tokens)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(np.asarray(texts(Table(), accept, rows=64).tokens), one)


def test_a_tree_is_refused_by_rules_for_chains():
    tree = protocol.Tree((-1, 0, 0))
    draws = sampling.Sampling(*[jnp.ones(1)] * 3, *[jnp.ones(1, jnp.uint32)] * 2)
    block = jnp.zeros((1, 3), jnp.int32)
    judged = acceptance.Judged(
        block, jnp.zeros((1, 3, 4)), block, protocol.Draft(block[:, 1:]), block, tree, draws
    )
    for rule in (speculative.Speculative(), speculative.BlockVerification(), lossy.Lenient(0.5)):
        with pytest.raises(ValueError, match="one chain"):
            rule(judged)


def judged_greedily(seed, parents=(-1, 0, 1, 2)):
    """A random block of 40 rows with guesses near the model's choice, and what is expected."""
    random = np.random.default_rng(seed)
    tree = protocol.Tree(parents)
    logits = random.normal(size=(40, tree.width, 7)).astype(np.float32)
    block = random.integers(-1, 7, (40, tree.width)).astype(np.int32)
    block[:, 0] = 3
    chosen = logits.argmax(axis=-1).astype(np.int32)
    draft = protocol.Draft(jnp.array(block[:, 1:]))
    arrays = map(jnp.array, (block, logits, chosen))
    return acceptance.Judged(*arrays, draft, jnp.zeros((40, tree.width), int), tree, None)


def plainly(judged, holds):
    """Tokens of each row by a walk in Python; holds(row, node, parent, guess)."""
    block, chosen = np.asarray(judged.block), np.asarray(judged.chosen)
    for row in range(len(block)):
        good, best = {0: [0]}, [0]
        for node, parent in enumerate(judged.tree.parents[1:], start=1):
            guess = int(block[row, node])
            if parent in good and guess >= 0 and holds(row, node, parent, guess):
                good[node] = [*good[parent], node]
                best = max(best, good[node], key=len)
        yield [*block[row, best[1:]].tolist(), int(chosen[row, best[-1]])]


def entropy_floor(logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return p, min(0.3, 0.09 * np.exp((p * np.log(p)).sum()))


LOSSY = {
    "top-k": (lossy.TopK(3), lambda x, c, node, guess: (x > x[guess]).sum() < 3),
    "distance": (lossy.Distance(2), lambda x, c, node, guess: abs(guess - c) <= 2),
    "typical": (
        lossy.Typical(),
        lambda x, c, node, guess: entropy_floor(x)[0][guess] > entropy_floor(x)[1],
    ),
    "lenient": (
        lossy.Lenient(0.3),
        lambda x, c, node, guess: np.exp(x[guess] - x.max()) >= 0.3,
    ),
    "always": (lossy.Always(), lambda x, c, node, guess: True),
    "exact": (acceptance.Exact(), lambda x, c, node, guess: guess == c),
}


@pytest.mark.parametrize("parents", [(-1, 0, 1, 2), (-1, 0, 0, 1, 2, 2, 4)])
@pytest.mark.parametrize("name", LOSSY)
def test_a_rule_accepts_what_its_definition_says(name, parents):
    rule, holds = LOSSY[name]
    judged = judged_greedily(5, parents)
    logits, chosen = np.asarray(judged.logits), np.asarray(judged.chosen)
    expected = plainly(
        judged,
        lambda row, node, parent, guess: holds(
            logits[row, parent], chosen[row, parent], node, guess
        ),
    )
    found = rule(judged)
    for row, text in enumerate(expected):
        assert found.tokens[row, : int(found.count[row])].tolist() == text


def test_a_minimum_block_is_written_wherever_there_are_guesses():
    judged = judged_greedily(6)
    found, exact = lossy.MinimumBlock(3)(judged), acceptance.Exact()(judged)
    for row in range(40):
        guessed = np.asarray(judged.block)[row, 1:3]
        room = 3 if (guessed >= 0).all() else 1 + int(guessed[0] >= 0)
        assert int(found.count[row]) >= max(room, int(exact.count[row]))
    np.testing.assert_array_equal(lossy.MinimumBlock(1)(judged).tokens, exact.tokens)


@pytest.mark.parametrize(
    "made",
    [
        lambda: lossy.TopK(0),
        lambda: lossy.Distance(-1),
        lambda: lossy.Typical(epsilon=1.5),
        lambda: lossy.Typical(delta=0),
        lambda: lossy.Lenient(0),
        lambda: lossy.MinimumBlock(0),
    ],
)
def test_a_bound_that_means_nothing_is_refused(made):
    with pytest.raises(ValueError, match="must be"):
        made()
