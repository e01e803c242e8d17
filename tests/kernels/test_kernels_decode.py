# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache in a kernel equals attention over all pairs in float64."""

import dataclasses

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels.decode import api as decode
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.decode.rows import cache_scalars
from t5x_lite.kernels.relative import RelativePositionBias

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def expected(q, sources, softcap):
    """One softmax over all sources of queries q, pair by pair, with scores below the softcap."""
    q = np.asarray(q, np.float64)
    scores, masks, values = [], [], []
    for source in sources:
        score = np.einsum("bwkgh,bksh->bkgws", q, np.asarray(source.keys, np.float64))
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        if not isinstance(source.mask, CacheMask):
            mask = np.broadcast_to(
                np.asarray(source.mask)[:, None], (*q.shape[:2], score.shape[-1])
            )
        else:
            mask = np.asarray(source.mask.materialize())
        if source.bias is not None:
            score = score + bias_of_pairs(source, q.shape[2:4])
        scores.append(score)
        masks.append(mask)
        values.append(np.asarray(source.values, np.float64))
    mask = np.concatenate(masks, axis=-1)[:, None, None]
    score = np.where(mask, np.concatenate(scores, axis=-1), -np.inf)
    m = np.max(score, axis=-1, keepdims=True, initial=-1e9)
    p = np.exp(score - m)
    total = np.sum(p, axis=-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    return np.einsum("bkgws,bksh->bwkgh", p, np.concatenate(values, axis=2))


def bias_of_pairs(source, heads):
    queries, keys = source.mask.query_positions(), source.mask.key_positions()
    distance = np.asarray(keys)[:, None, :] - np.asarray(queries)[:, :, None]
    bucket = np.asarray(source.bias.bucket(jnp.asarray(distance)))
    table = np.asarray(source.bias.table, np.float64)[bucket]
    return np.moveaxis(table.reshape(*bucket.shape, *heads), (1, 2), (3, 4))


@dataclasses.dataclass
class Case:
    """Shapes, and which of the rules hold.

    Attributes:
      rows: rows of the batch.
      width: new tokens of a row.
      heads: key heads, and query heads of each.
      slots: slots of the cache.
      size: size of a head.
      dtype: dtype of the arrays.
      tree: new tokens are a tree instead of a chain.
      bias: there is a relative position bias.
      window: keys that a query attends to; None for all.
      prefix: there are keys that all queries of a row attend to.
      softcap: cap of the scores; None without one.
      seed: seed of the draw.
    """

    rows: int = 3
    width: int = 4
    heads: tuple[int, int] = (2, 1)
    slots: int = 200
    size: int = 16
    dtype: object = jnp.float32
    tree: bool = False
    bias: bool = False
    window: int | None = None
    prefix: bool = False
    softcap: float | None = None
    seed: int = 0

    def draw(self):
        """Queries, and the source that new tokens attend to."""
        random = np.random.default_rng(self.seed)
        b, (k, g) = self.rows, self.heads

        def normal(*shape):
            return jnp.asarray(random.normal(size=shape), self.dtype)

        cache = (b, k, self.slots, self.size)
        keys, values = normal(*cache), normal(*cache)
        # As a model scales them: at scores of 40 float32 itself would err by more than 2e-6.
        q = normal(b, self.width, k, g, self.size) * self.size**-0.5
        index = random.integers(0, self.slots - self.width + 1, b)
        # The cache's ends, and past its last one.
        index[0] = random.choice([0, self.slots - self.width, self.slots - 1])
        mask = CacheMask(jnp.asarray(index, jnp.int32), self.width, self.slots)
        if self.tree:
            mask = dataclasses.replace(mask, **grown(random, self.width))
        if self.window is not None:
            mask = mask.with_window(jnp.asarray([self.window - 1] * 2, jnp.int32))
        if self.prefix:
            prefix = jnp.asarray(random.integers(0, self.slots + 1, b), jnp.int32)
            mask = dataclasses.replace(mask, prefix=prefix)
        table = jnp.asarray(random.normal(size=(32, k * g)), jnp.float32)
        bias = RelativePositionBias(table, 128, False) if self.bias else None
        return q, decode.AttentionSource(keys, values, mask, bias)


def grown(random, width):
    """A tree: each token's parent is one before it."""
    depth, ancestors = np.zeros(width, np.int32), np.eye(width, dtype=bool)
    for token in range(1, width):
        parent = random.integers(0, token)
        depth[token] = depth[parent] + 1
        ancestors[token] |= ancestors[parent]
    return {"depth": jnp.asarray(depth), "ancestors": jnp.asarray(ancestors)}


@jax.jit(static_argnames=("softcap",))
def decode_attention(q, source, softcap):
    return decode.decode_attention(q, source, softcap, chips.backend_for("tpu"))


def close(got, wanted, dtype):
    got = np.asarray(got, np.float64)
    assert np.max(np.abs(got - wanted)) <= TOLERANCE[dtype] * np.max(np.abs(wanted), initial=1e-3)


def check(case):
    q, source = case.draw()
    got = decode_attention(q, source, case.softcap)
    assert got.dtype == case.dtype
    close(got, expected(q, [source], case.softcap), case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(width=1, heads=(1, 4), softcap=2.0),
        Case(bias=True, seed=1),
        Case(tree=True, bias=True, width=6, heads=(2, 2), seed=2),
        Case(window=20, bias=True, slots=300, seed=3),
        Case(tree=True, window=3, width=8, seed=4),
        Case(prefix=True, seed=5),
        Case(dtype=jnp.bfloat16, bias=True, seed=6),
    ],
    ids=lambda case: str(case.seed),
)
def test_a_block_sees_its_past_as_the_pairs_say(case):
    check(case)


def test_every_row_sees_its_own_inputs_and_a_row_without_any_gets_zero():
    q, source = Case(slots=300).draw()
    visible = np.arange(300) < np.array([[5], [300], [0]])
    source = source._replace(mask=jnp.asarray(visible))
    got = decode_attention(q, source, None)
    close(got, expected(q, [source], None), jnp.float32)
    assert not np.any(np.asarray(got)[2])


def test_past_and_inputs_share_one_softmax():
    q, past = Case().draw()
    _, inputs = Case(slots=140, seed=9).draw()
    inputs = inputs._replace(mask=jnp.asarray(np.arange(140) < np.array([[50], [140], [0]])))
    got = decode.merged_decode_attention(q, (past, inputs), 3.0, chips.backend_for("tpu"))
    close(got, expected(q, [past, inputs], 3.0), jnp.float32)


@pytest.mark.parametrize("window, hidden", [(None, slice(512, None)), (20, slice(0, 256))])
def test_blocks_that_nobody_sees_are_not_read(window, hidden):
    q, source = Case(slots=700, rows=2, window=window).draw()
    mask = dataclasses.replace(source.mask, index=jnp.asarray([480, 300], jnp.int32))
    source = source._replace(mask=mask)
    wanted = expected(q, [source], None)
    spoiled = [x.at[:, :, hidden].set(jnp.nan) for x in source[:2]]
    close(decode_attention(q, decode.AttentionSource(*spoiled, mask), None), wanted, jnp.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": None},
        {"ancestors": None},
        {"ancestors": jnp.asarray(np.arange(25).reshape(5, 5) % 3 == 0)},
        {"depth": jnp.asarray([9, 9, 12, 9, 10]), "window_size": jnp.asarray([3, 3])},
        {"window_size": jnp.asarray([7, 0])},
        {"window_size": jnp.asarray([1 << 30, 1 << 30])},
    ],
    ids=range(6),
)
def test_trees_of_any_kind_are_seen_as_the_pairs_say(changes):
    q, source = Case(width=5, tree=True, bias=True, seed=31).draw()
    source = source._replace(mask=dataclasses.replace(source.mask, **changes))
    close(decode_attention(q, source, None), expected(q, [source], None), jnp.float32)


def test_a_bias_of_both_sides_reaches_into_the_prefix():
    q, source = Case(width=5, prefix=True, bias=True, seed=32).draw()
    source = source._replace(bias=dataclasses.replace(source.bias, both_sides=True))
    close(decode_attention(q, source, None), expected(q, [source], None), jnp.float32)


def test_a_block_wider_than_a_kernel_takes_at_once_is_cut_into_chunks():
    check(Case(rows=2, width=300, heads=(1, 2), slots=400, bias=True, window=100, prefix=True))


def test_a_tree_of_more_tokens_than_bits_is_refused():
    with pytest.raises(ValueError, match="at most 64"):
        check(Case(width=65, tree=True))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("span", [2, 6])
def test_what_is_fetched_is_what_some_query_sees(tree, span):
    for seed in range(20):
        window = 5 + 3 * seed if seed % 2 else None
        case = Case(tree=tree, width=6, window=window, prefix=seed % 3 == 0, seed=seed)
        block = case.draw()[1].mask
        mask = np.asarray(block.materialize())
        scalars = cache_scalars(block, None, span)
        first, end, unmasked_first, unmasked_end = (
            np.asarray(x).reshape(case.rows, -1) for x in scalars[:4]
        )
        for row, chunk in np.ndindex(first.shape):
            chunk_mask = mask[row, chunk * span : (chunk + 1) * span]
            visible = np.any(chunk_mask, axis=0)
            unmasked = slice(unmasked_first[row, chunk], unmasked_end[row, chunk])
            bounds = np.flatnonzero(visible)[[0, -1]] if np.any(visible) else (0, -1)
            assert first[row, chunk] <= bounds[0] and bounds[1] < end[row, chunk]
            assert np.all(chunk_mask[:, unmasked])
            if not tree and not case.prefix and np.any(visible):
                assert (first[row, chunk], end[row, chunk]) == (bounds[0], bounds[1] + 1)


WIDE = [
    dict(width=1, bias=True),
    dict(width=5, heads=(1, 3), bias=True, softcap=5.0),
    dict(width=8, tree=True, bias=True, slots=260),
    dict(width=7, tree=True, window=9, heads=(2, 2)),
    dict(width=64, tree=True, bias=True, window=40, prefix=True, slots=300),
    dict(width=3, window=1, bias=True, slots=128),
    dict(width=9, prefix=True, window=70, slots=300),
    dict(width=4, slots=50, size=96, prefix=True, bias=True),
    dict(width=2, slots=1100, size=64, bias=True, window=300),
    dict(width=6, size=128, tree=True, slots=90),
    dict(width=4, size=256, dtype=jnp.bfloat16, bias=True, heads=(1, 2)),
    dict(width=260, heads=(1, 2), slots=300, window=200, bias=True, rows=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(len(WIDE)))
def test_a_block_sees_its_past_in_many_draws(kind):
    for seed in range(20):
        changes = dict(WIDE[kind])
        if "window" in changes:
            changes["window"] += 3 * seed
        check(Case(seed=100 + seed, **changes))
