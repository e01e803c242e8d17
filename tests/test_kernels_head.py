# SPDX-License-Identifier: Apache-2.0
"""Laws of the token chosen without logits.

Hidden states and tables are small whole numbers: their products are exact in any order, so ids and
logits must be equal, ties included (but for the last bit of tanh).
"""

import dataclasses

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.decoding import sampling
from t5x_lite.kernels import choosing
from t5x_lite.kernels.head_choose import Chosen, Draw, head_choose
from t5x_lite.kernels.vocabulary import VocabularyRule

RULES = [
    VocabularyRule(tied=True, scale=0.25),
    VocabularyRule(tied=False, scale=0.0625, softcap=4.0),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles so small that a toy has several."""
    monkeypatch.setattr(choosing, "ROWS", 16)
    monkeypatch.setattr(choosing, "IDS", 128)


def drawn(rule, rows=37, width=24, vocab=300, seed=0, dtype=jnp.float32):
    """Hidden states, a table, and how each row draws: some greedily."""
    draw = np.random.default_rng(seed)
    shape = (vocab, width) if rule.tied else (width, vocab)
    hidden, table = (draw.integers(-3, 4, size) for size in ((rows, width), shape))
    temperature = draw.choice([0.0, 0.3, 1.0, 2.5], rows)
    seeds, numbers = draw.integers(0, 2**32, (2, rows)).astype(np.uint32)
    position = draw.integers(0, 1000, rows).astype(np.int32)
    how = Draw(jnp.asarray(temperature, jnp.float32), *map(jnp.asarray, (seeds, numbers, position)))
    return jnp.asarray(hidden, dtype), jnp.asarray(table, dtype), how


def logits_of(hidden, table, rule):
    exact = hidden.astype(jnp.float32) @ (table.T if rule.tied else table).astype(jnp.float32)
    return rule.capped(exact)


@jax.jit
def expected(logits, draw: Draw | None):
    if draw is None:
        return sampling.choose(logits[:, None], None, None)[:, 0]
    rows = len(logits)
    nothing = (jnp.zeros(rows, jnp.int32), jnp.ones(rows))
    asked = sampling.Sampling(draw.temperature, *nothing, draw.seed, draw.row)
    return sampling.choose(logits[:, None], draw.position[:, None], asked)[:, 0]


def agree(told: Chosen, logits, draw, top_k):
    tokens = expected(logits, draw)
    np.testing.assert_array_equal(told.token, tokens)
    found = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    # Two compilations of tanh may differ in the last bit.
    np.testing.assert_allclose(told.logit, found, rtol=2e-7)
    exact = np.asarray(logits, np.float64)
    peak = exact.max(1)
    log_z = peak + np.log(np.exp(exact - peak[:, None]).sum(1))
    assert np.max(np.abs(told.log_z - log_z)) <= 2e-6 * np.max(np.abs(log_z))
    values, ids = jax.lax.top_k(logits, top_k)
    np.testing.assert_allclose(told.top_values, values, rtol=2e-7)
    np.testing.assert_array_equal(told.top_ids, ids)


choose = jax.jit(head_choose, static_argnames=("rule", "how", "top_k"))


@pytest.mark.parametrize("rule", RULES, ids=["tied", "capped"])
@pytest.mark.parametrize("greedy, top_k", [(True, 0), (False, 8), (True, 3)])
def test_the_token_is_the_one_chosen_from_the_logits(rule, greedy, top_k):
    hidden, table, draw = drawn(rule)
    draw = None if greedy else draw
    told = choose(hidden, table, rule=rule, draw=draw, how=chips.how("tpu"), top_k=top_k)
    agree(told, logits_of(hidden, table, rule), draw, top_k)


@pytest.mark.parametrize("rows, vocab", [(1, 9), (5, 128), (16, 129), (33, 512)])
def test_any_number_of_rows_and_ids(rows, vocab):
    hidden, table, draw = drawn(RULES[0], rows, 24, vocab, dtype=jnp.bfloat16)
    told = choose(hidden, table, rule=RULES[0], draw=draw, how=chips.how("tpu"), top_k=2)
    agree(told, logits_of(hidden, table, RULES[0]), draw, 2)


def test_of_equal_logits_the_lowest_id_is_chosen():
    rule = RULES[0]
    told = choose(
        jnp.zeros((3, 24)),
        drawn(rule)[1],
        rule=rule,
        draw=None,
        how=chips.how("tpu"),
        top_k=8,
    )
    np.testing.assert_array_equal(told.token, 0)
    np.testing.assert_array_equal(told.top_ids, np.tile(np.arange(8), (3, 1)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_split_vocabulary_and_split_rows_change_nothing(tied):
    mesh = chips.mesh((2, 4), ("data", "tensor"))
    whole = VocabularyRule(tied, scale=0.25)
    split = dataclasses.replace(whole, axes=("tensor",))
    hidden, table, draw = drawn(whole, rows=32, vocab=4 * 150)
    told = jax.jit(
        jax.shard_map(
            lambda *x: head_choose(*x[:2], split, x[2], chips.how("tpu"), 8),
            mesh=mesh,
            in_specs=(P("data"), P("tensor") if tied else P(None, "tensor"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
    )(hidden, table, draw)
    agree(told, logits_of(hidden, table, whole), draw, 8)


def test_what_cannot_be_kept_is_refused():
    hidden, table, _ = drawn(RULES[0])
    with pytest.raises(ValueError, match="top_k must be from 0 to 8; got 9"):
        head_choose(hidden, table, RULES[0], None, chips.how("tpu"), 9)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=["tied", "capped"])
def test_many_rows_seeds_and_temperatures_draw_the_same_tokens(rule):
    for seed in range(100):
        hidden, table, draw = drawn(rule, rows=64, seed=seed)
        told = choose(hidden, table, rule=rule, draw=draw, how=chips.how("tpu"), top_k=4)
        agree(told, logits_of(hidden, table, rule), draw, 4)
