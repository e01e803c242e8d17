# SPDX-License-Identifier: Apache-2.0
"""Laws of sampling: which tokens may be sampled, how often, and that wrong keys would show."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_lite import sharding
from t5x_lite.decoding import loop, protocol, sampling
from t5x_lite.decoding.acceptance import exact

VOCABULARY, LENGTH, ROWS = 5, 3, 40_000


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def draws(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    def fill(value, dtype):
        return jnp.full(rows, value, dtype)

    return sampling.SamplingParams(
        fill(temperature, jnp.float32),
        fill(top_k, jnp.int32),
        fill(top_p, jnp.float32),
        fill(seed, jnp.uint32),
        jnp.arange(rows, dtype=jnp.uint32),
    )


@jax.jit
def kept_by_filter(logits, settings):
    return jnp.isfinite(sampling.filter_logits(logits, settings))


def by_sorting(logits, top_k, top_p):
    """Marks the tokens of logits [v] that top_k and then top_p keep, ties with the last one too."""
    order = np.argsort(-logits, kind="stable")
    kept = logits >= logits[order[top_k - 1]] if 0 < top_k < len(logits) else logits > -np.inf
    if top_p >= 1:
        return kept
    probability = np.where(kept, np.exp((logits - logits.max()).astype(np.float64)), 0)
    probability /= probability.sum()
    before = np.cumsum(probability[order]) - probability[order]
    last = order[np.flatnonzero(before < top_p)[-1]]
    return kept & (logits >= logits[last])


@settings(max_examples=200, deadline=None)
@example([0.0] * 11 + [-1.1754943508222875e-38], 0, 0.1)  # equal probabilities, unequal logits
@given(
    st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=12, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]),
)
def test_top_k_and_top_p_keep_what_sorting_says(values, top_k, top_p):
    logits = np.array(values, np.float32)
    expected = by_sorting(logits, top_k, top_p)
    kept_tokens = np.asarray(
        kept_by_filter(jnp.array(logits)[None, None], draws(1, 1.0, top_k, top_p))
    )[0, 0]
    if not np.array_equal(kept_tokens, expected):
        # Only a sum within rounding of top_p may fall on either side.
        probability = np.exp(logits.astype(np.float64) - logits.max())
        probability = probability * (expected | kept_tokens)
        smaller = min(probability[kept_tokens].sum(), probability[expected].sum())
        assert abs(smaller / probability.sum() - top_p) < 1e-5


def test_infinite_logits_and_whole_distributions_pass_unchanged():
    logits = jnp.array([[[0.0, -jnp.inf, 2.0, -1.0]]])
    np.testing.assert_array_equal(sampling.filter_logits(logits, draws(1)), logits)


def table(seed=0):
    """Log-probabilities of a next token by position and token: a model small enough to know."""
    draw = np.random.default_rng(seed)
    logits = 1.5 * draw.normal(size=(LENGTH + 1, VOCABULARY, VOCABULARY))
    return jnp.array(logits, jnp.float32)


def target(logits):
    def forward(tokens, index, cache, tree=None):
        position = index[:, None] + jnp.arange(tokens.shape[1])
        return logits[jnp.minimum(position, LENGTH), tokens], cache

    return protocol.Target(forward, lambda hidden: hidden)


@dataclass(frozen=True)
class NextIds:
    """Drafts that are right now and then: the root's token again, and the id after it."""

    tree: protocol.Tree = protocol.chain(3)
    top: int = 0

    def begin(self, context):
        return None

    def propose(self, context, drafter_state, state):
        tokens = (state.root[:, None] + jnp.arange(self.tree.width - 1)) % VOCABULARY
        return protocol.Draft(tokens), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


def texts(logits, settings, drafter=None, eos=-1):
    """LENGTH tokens of ROWS rows, all after token 0.

    Args:
      logits: table of the model.
      settings: SamplingParams; None for greedy.
      drafter: None for plain decoding.
      eos: id that ends a text.
    """
    zeros = jnp.zeros(ROWS, jnp.int32)
    slots = jnp.zeros((ROWS, LENGTH + 8), jnp.int32)
    state = protocol.DecodeState(
        tokens=slots,
        length=zeros,
        root=zeros,
        done=zeros > 0,
        log_probability=jnp.zeros(ROWS),
        token_step=slots,
        token_node=slots,
        steps=jnp.int32(0),
        cache=(),
        drafter_state=None,
    )
    stopping = protocol.StoppingCriteria(eos, zeros + LENGTH + 1)
    prompts = protocol.Prompts(slots[:, :1], zeros + 1)
    context = protocol.DecodeContext(target(logits), stopping, prompts, sampling=settings)
    drafter = drafter or loop.Plain()
    with jax.set_mesh(None):  # The table of the target is not placed on any.
        return jax.jit(lambda state: loop.run_loop(context, drafter, exact.Exact(), state))(state)


def text_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Computes the probability of each of the VOCABULARY ** LENGTH texts of logits, at a
    temperature and with the filters top_k and top_p."""
    step = np.asarray(logits, np.float64) / temperature
    for place in np.ndindex(step.shape[:2]):
        step[place] = np.where(by_sorting(step[place], top_k, top_p), step[place], -np.inf)
    step = np.exp(step)
    step /= step.sum(axis=-1, keepdims=True)
    probability = []
    for text in itertools.product(range(VOCABULARY), repeat=LENGTH):
        path = zip((0, *text), text, strict=False)
        probability.append(np.prod([step[i, a, b] for i, (a, b) in enumerate(path)]))
    return np.array(probability)


def p_value(tokens, probability):
    """Computes the p-value of whole texts (Pearson), those expected fewer than 5 times pooled."""
    scipy_stats = pytest.importorskip("scipy.stats")
    number = np.asarray(tokens)[:, 1 : LENGTH + 1] @ (VOCABULARY ** np.arange(LENGTH)[::-1])
    observed = np.bincount(number, minlength=VOCABULARY**LENGTH)
    expected = probability * len(number)
    common = expected >= 5
    rest = [observed[~common].sum()], [expected[~common].sum()]
    assert observed[probability == 0].sum() == 0
    observed = np.concatenate([observed[common], rest[0]])
    wanted = np.concatenate([expected[common], rest[1]])
    filled = wanted > 0
    return scipy_stats.chisquare(observed[filled], wanted[filled]).pvalue


SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"temperature": 1.3, "top_p": 0.8}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_whole_texts_are_sampled_with_their_probability(options):
    logits = table()
    state = texts(logits, draws(ROWS, seed=11, **options))
    assert p_value(state.tokens, text_probabilities(logits, **options)) > 1e-3


def test_drafts_change_no_sampled_token():
    logits, options = table(), draws(ROWS, 0.9, 4, 0.95, seed=5)
    plain, drafted = texts(logits, options), texts(logits, options, NextIds())
    assert int(drafted.steps) <= int(plain.steps)
    np.testing.assert_array_equal(drafted.tokens[:, : LENGTH + 1], plain.tokens[:, : LENGTH + 1])
    np.testing.assert_allclose(drafted.log_probability, plain.log_probability, atol=1e-5)


def test_one_noise_for_all_positions_would_show(monkeypatch):
    keyed = sampling.gumbel_noise

    def frozen(settings, positions, size):
        return keyed(settings, 0 * positions, size)

    monkeypatch.setattr(sampling, "gumbel_noise", frozen)
    state = texts(table(), draws(ROWS, seed=11))
    assert p_value(state.tokens, text_probabilities(table())) < 1e-6


def test_log_probabilities_are_the_models_own_whatever_is_sampled():
    logits = table()
    state = texts(logits, draws(ROWS, 0.5, 2, 0.9))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    tokens = np.asarray(state.tokens)[:50, : LENGTH + 1]
    expected = [sum(log_p[i, row[i], row[i + 1]] for i in range(LENGTH)) for row in tokens]
    np.testing.assert_allclose(state.log_probability[:50], expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_logits_the_lowest_id_is_the_most_probable(seed):
    """As numpy's argmax: few values, so that most rows have ties, both zeros among them."""
    values = np.array([-np.inf, -1.5, -0.0, 0.0, 2.0], np.float32)
    logits = np.random.default_rng(seed).choice(values[: 3 + seed], (50, 3, 7))
    ids = jax.jit(sampling.argmax_token)(logits)
    np.testing.assert_array_equal(ids, np.argmax(logits, axis=-1))
    assert ids.dtype == np.int32
    broken = np.full((1, 1, 7), np.nan, np.float32)
    assert sampling.argmax_token(broken).tolist() == [[6]]
