# SPDX-License-Identifier: Apache-2.0
"""Small cases of flash attention, and the same attention in float64 with all pairs at hand."""

import functools
from typing import NamedTuple

import chips
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.kernels.flash_attention import Source, flash_attention
from t5x_lite.kernels.relative import Relative
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.visits import Sizes

SMALL = Sizes(128, 128)


class Kind(NamedTuple):
    """What is compiled for: lengths, heads, and which parts there are."""

    lengths: tuple[int, int] = (150, 200)
    heads: tuple[int, int, int] = (2, 1, 64)
    causal: bool = False
    prefix: bool = False
    reach: bool = False
    offset: bool = False
    biased: bool = True
    second: int = 0
    softcap: float | None = None


def segments(draw: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Texts one after the other, and padding behind them."""
    texts = draw.integers(1, 4)
    cuts = np.sort(draw.integers(1, length + 1, (rows, texts)), axis=1)
    place = np.arange(length)[None, :, None]
    number = 1 + np.sum(place >= cuts[:, None, :], axis=-1)
    return np.where(number > texts, 0, number).astype(np.int32)


def sight_of(kind: Kind, draw: np.random.Generator) -> Sight:
    t, s = kind.lengths
    longest = segments(draw, 2, max(t, s))
    prefix = draw.random((2, max(t, s))) < 0.3 if kind.prefix else None
    of = lambda x, length: None if x is None else x[:, :length]
    return Sight(
        longest[:, :t],
        longest[:, :s],
        causal=kind.causal,
        query_prefix=of(prefix, t),
        key_prefix=of(prefix, s),
        reach=draw.integers(0, 120, 2).astype(np.int32) if kind.reach else None,
        offset=np.int32(draw.integers(-150, 250)) if kind.offset else None,
    )


def case(kind: Kind, seed: int, dtype=np.float32):
    """Queries, sources and a gradient of the context, all drawn by seed."""
    draw = np.random.default_rng(seed)
    k, g, h = kind.heads
    normal = lambda *shape: draw.standard_normal(shape).astype(dtype)
    t, s = kind.lengths
    table = draw.standard_normal((16, k * g)).astype(np.float32)
    relative = Relative(table, 64, not kind.causal) if kind.biased else None
    q = normal(2, t, k, g, h) * np.asarray(h**-0.5, dtype)
    keys = lambda length: (normal(2, k, length, h), normal(2, k, length, h))
    sources = [Source(*keys(s), sight_of(kind, draw), relative)]
    if kind.second:
        own = Sight(sources[0].sight.query_segments, segments(draw, 2, kind.second))
        sources.append(Source(*keys(kind.second), own))
    return q, tuple(sources), normal(2, t, k, g, h)


def exact(q, sources: tuple[Source, ...], softcap: float | None):
    """The same with every pair's score, in the dtype of q (float64 in tests)."""
    b, t, k, g, h = q.shape
    scores, masks = [], []
    for source in sources:
        score = jnp.einsum("btkgh,bksh->bkgts", q, source.keys)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if source.relative is not None:
            bucket = source.relative.bucket(-source.sight.distance())
            score = score + jnp.moveaxis(source.relative.table[bucket], 2, 0).reshape(k, g, t, -1)
        scores.append(score)
        masks.append(source.sight.mask())
    mask = jnp.concatenate(masks, axis=2)[:, None, None]
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, jnp.concatenate(scores, axis=4), 0)), 0)
    total = jnp.sum(weights, axis=4, keepdims=True)
    shares = weights / jnp.where(total == 0, 1, total)
    v = jnp.concatenate([source.values for source in sources], axis=2)
    return jnp.einsum("bkgts,bksh->btkgh", shares, v)


def flash(q, sources, softcap):
    return flash_attention(q, sources, softcap, chips.how("tpu"), SMALL)


@functools.partial(jax.jit, static_argnums=(0, 4))
def context_and_gradients(attention, q, sources, gradient, softcap):
    """The context, and gradients of q and of every k, v and table."""
    parts = [(x.keys, x.values, None if x.relative is None else x.relative.table) for x in sources]

    def context(q, parts):
        return attention(q, tuple(map(assembled, sources, parts)), softcap)

    value, pull = jax.vjp(context, q, parts)
    return value, pull(gradient)


def assembled(source: Source, parts) -> Source:
    k, v, table = parts
    relative = source.relative
    if relative is not None:
        relative = Relative(table, relative.max_distance, relative.both_sides)
    return Source(k, v, source.sight, relative)


def exactly(q, sources, gradient, softcap):
    """`context_and_gradients` in float64."""
    wide = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    with jax.enable_x64(True), chips.float64():
        given = jax.tree.map(wide, (q, sources, gradient))
        return jax.tree.map(np.asarray, context_and_gradients(exact, *given, softcap))


def difference(found, wanted) -> float:
    """The largest deviation of any array, in shares of its largest value.

    A table's is in shares of the largest of all: with every key of a query in one bucket its true
    gradient is 0, a sum of thousands of scores' gradients that cancel.
    """
    wanted = jax.tree.leaves(wanted)
    largest = [np.max(np.abs(y)) for y in wanted]
    worst = 0.0
    for x, y, scale in zip(jax.tree.leaves(found), wanted, largest, strict=True):
        scale = (max(largest) or 1) if y.ndim == 2 else max(scale, 1)
        worst = max(worst, np.max(np.abs(np.asarray(x, np.float64) - y)) / scale)
    return worst
