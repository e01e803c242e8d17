# SPDX-License-Identifier: Apache-2.0
"""Small cases of flash attention, and the same attention in float64 with all pairs at hand."""

import functools
from typing import NamedTuple

import chips
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.kernels.flash.api import AttentionSource, flash_attention
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.relative import RelativePositionBias

SMALL = BlockSizes(128, 128)


class Kind(NamedTuple):
    """Static features of an attention case.

    Attributes:
      lengths: numbers of queries and of keys.
      heads: key heads, query heads per key head, head size.
      causal: has a causal mask.
      prefix: has a bidirectional prefix.
      window: has a sliding window.
      offset: queries begin at another position than keys.
      biased: has a relative position bias.
      second: length of a second source; 0 for none.
      softcap: bound of the scores; None for none.
    """

    lengths: tuple[int, int] = (150, 200)
    heads: tuple[int, int, int] = (2, 1, 64)
    causal: bool = False
    prefix: bool = False
    window: bool = False
    offset: bool = False
    biased: bool = True
    second: int = 0
    softcap: float | None = None


def segments(draw: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Segments of texts one after the other, and of padding behind them.

    Args:
      draw: random generator.
      rows: number of rows.
      length: length of a row.
    """
    texts = draw.integers(1, 4)
    cuts = np.sort(draw.integers(1, length + 1, (rows, texts)), axis=1)
    place = np.arange(length)[None, :, None]
    number = 1 + np.sum(place >= cuts[:, None, :], axis=-1)
    return np.where(number > texts, 0, number).astype(np.int32)


def random_mask(kind: Kind, draw: np.random.Generator) -> Mask:
    """A random mask with the features of kind."""
    t, s = kind.lengths
    longest = segments(draw, 2, max(t, s))
    prefix = draw.random((2, max(t, s))) < 0.3 if kind.prefix else None
    return Mask(
        longest[:, :t],
        longest[:, :s],
        causal=kind.causal,
        query_prefix=prefix if prefix is None else prefix[:, :t],
        key_prefix=prefix if prefix is None else prefix[:, :s],
        window_size=draw.integers(0, 120, 2).astype(np.int32) if kind.window else None,
        offset=np.int32(draw.integers(-150, 250)) if kind.offset else None,
    )


def case(kind: Kind, seed: int, dtype=np.float32):
    """Random queries, sources and gradient of the context.

    Args:
      kind: features.
      seed: seed of the draw.
      dtype: dtype of queries, keys, values and gradient.
    """
    draw = np.random.default_rng(seed)
    k, g, h = kind.heads

    def normal(*shape):
        return draw.standard_normal(shape).astype(dtype)

    def keys_values(length):
        return normal(2, k, length, h), normal(2, k, length, h)

    t, s = kind.lengths
    table = draw.standard_normal((16, k * g)).astype(np.float32)
    bias = RelativePositionBias(table, 64, not kind.causal) if kind.biased else None
    q = normal(2, t, k, g, h) * np.asarray(h**-0.5, dtype)
    sources = [AttentionSource(*keys_values(s), random_mask(kind, draw), bias)]
    if kind.second:
        mask = Mask(sources[0].mask.query_segments, segments(draw, 2, kind.second))
        sources.append(AttentionSource(*keys_values(kind.second), mask))
    return q, tuple(sources), normal(2, t, k, g, h)


def exact(q, sources: tuple[AttentionSource, ...], softcap: float | None):
    """Attention with the whole matrix of scores, in the dtype of q (float64 in tests).

    Args:
      q: [b t k g h] queries.
      sources: keys, values, masks and biases that share one softmax.
      softcap: bound of the scores; None for none.
    """
    b, t, k, g, h = q.shape
    scores, masks = [], []
    for source in sources:
        score = jnp.einsum("btkgh,bksh->bkgts", q, source.keys)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if source.bias is not None:
            bucket = source.bias.bucket(-source.mask.distance())
            score = score + jnp.moveaxis(source.bias.table[bucket], 2, 0).reshape(k, g, t, -1)
        scores.append(score)
        masks.append(source.mask.materialize())
    mask = jnp.concatenate(masks, axis=2)[:, None, None]
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, jnp.concatenate(scores, axis=4), 0)), 0)
    total = jnp.sum(weights, axis=4, keepdims=True)
    probs = weights / jnp.where(total == 0, 1, total)
    v = jnp.concatenate([source.values for source in sources], axis=2)
    return jnp.einsum("bkgts,bksh->btkgh", probs, v)


def flash(q, sources, softcap):
    """Attention by the TPU kernel with small tiles.

    Args:
      q: [b t k g h] queries.
      sources: keys, values, masks and biases that share one softmax.
      softcap: bound of the scores; None for none.
    """
    return flash_attention(q, sources, softcap, chips.backend_for("tpu"), SMALL)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def context_and_gradients(attention, q, sources, gradient, softcap):
    """The context, and gradients of q and of every k, v and bias table.

    Args:
      attention: function of (q, sources, softcap).
      q: [b t k g h] queries.
      sources: keys, values, masks and biases that share one softmax.
      gradient: gradient of the context.
      softcap: bound of the scores; None for none.
    """
    parts = [(x.keys, x.values, None if x.bias is None else x.bias.table) for x in sources]

    def context(q, parts):
        return attention(q, tuple(map(assembled, sources, parts)), softcap)

    value, pull = jax.vjp(context, q, parts)
    return value, pull(gradient)


def assembled(source: AttentionSource, parts) -> AttentionSource:
    """source with other keys, values and bias table."""
    k, v, table = parts
    bias = source.bias
    if bias is not None:
        bias = RelativePositionBias(table, bias.max_distance, bias.both_sides)
    return AttentionSource(k, v, source.mask, bias)


def exactly(q, sources, gradient, softcap):
    """`context_and_gradients` of `exact` in float64.

    Args:
      q: [b t k g h] queries.
      sources: keys, values, masks and biases that share one softmax.
      gradient: gradient of the context.
      softcap: bound of the scores; None for none.
    """

    def widen(x):
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True), chips.float64():
        arguments = jax.tree.map(widen, (q, sources, gradient))
        return jax.tree.map(np.asarray, context_and_gradients(exact, *arguments, softcap))


def difference(actual, wanted) -> float:
    """The largest deviation of any array, in shares of its largest value.

    A table's is in shares of the largest of all: with every key of a query in one bucket its true
    gradient is 0, a sum of thousands of scores' gradients that cancel.
    """
    wanted = jax.tree.leaves(wanted)
    largest = [np.max(np.abs(y)) for y in wanted]
    worst = 0.0
    for x, y, scale in zip(jax.tree.leaves(actual), wanted, largest, strict=True):
        scale = (max(largest) or 1) if y.ndim == 2 else max(scale, 1)
        worst = max(worst, np.max(np.abs(np.asarray(x, np.float64) - y)) / scale)
    return worst
