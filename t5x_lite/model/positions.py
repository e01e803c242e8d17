# SPDX-License-Identifier: Apache-2.0
"""Positions: embeddings that are added, rotations, biases of scores; and window sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.kernels.relative import LinearPositionBias, RelativePositionBias, alibi_slopes
from t5x_lite.sharding import spec


def relative(
    table: Float[Array, "k n"], stack: config.Stack, both_sides: bool
) -> RelativePositionBias:
    """T5's relative position bias (Raffel et al., 2020, section 2.1).

    Args:
      table: [buckets heads] bias of each bucket of distances.
      stack: architecture, for the largest distance.
      both_sides: bidirectional buckets, as in an encoder.
    """
    return RelativePositionBias(table, stack.max_distance, both_sides)


def alibi(stack: config.Stack) -> LinearPositionBias:
    """ALiBi's bias (Press et al., 2022); in an encoder of the distance to either side."""
    return LinearPositionBias(jax.reshard(jnp.asarray(alibi_slopes(stack.heads)), spec("heads")))


def frequencies(stack: config.Stack, sliding: bool) -> np.ndarray:
    """Rotary frequencies [h/2], radians per position: base^(-2j/h), scaled by `rotary_scaling`."""
    sliding_base = sliding and stack.sliding_rotary_base is not None
    base = np.float32(stack.sliding_rotary_base if sliding_base else stack.rotary_base)
    exponent = np.arange(0, stack.head_dim, 2, dtype=np.float32) / np.float32(stack.head_dim)
    frequency = (1 / base**exponent).astype(np.float32)
    if stack.rotary_span is not None:
        frequency = np.where(frequency * stack.rotary_span < 2 * np.pi, 0, frequency)
    scaling = stack.rotary_scaling
    if scaling is None or sliding_base or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    if scaling.kind == "yarn":
        kept = 1 - yarn_ramp(scaling, float(base), stack.head_dim)
    else:
        # Llama 3.1: the rotations in the original length decide how much a frequency is divided.
        rotations = scaling.original * frequency / (2 * np.pi)
        kept = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (kept * frequency + (1 - kept) * frequency / scaling.factor).astype(np.float32)


def yarn_ramp(scaling: config.RotaryScaling, base: float, head_dim: int) -> np.ndarray:
    """YaRN's share [h/2] by which each frequency is interpolated (Peng et al., 2023, section 3.2).

    Args:
      scaling: numbers of turns between which the share rises from 0 to 1.
      base: rotary base.
      head_dim: width of a head.
    """

    def index_of(turns: float) -> float:
        longest = scaling.original / (turns * 2 * math.pi)
        return head_dim * math.log(longest) / (2 * math.log(base))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Of two equal ends a step, as in transformers.
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def rotary_magnitude(stack: config.Stack, sliding: bool) -> float:
    """Factor on rotated queries and keys: YaRN's, of layers whose positions are stretched."""
    scaling = stack.rotary_scaling
    if sliding and stack.sliding_rotary_base is not None:
        return 1.0
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1


def raise_base(
    frequency: Float[Array, " h/2"], where: Int[Array, "b t"], scaling: config.RotaryScaling
) -> Float[Array, "b t 1 h/2"]:
    """Frequencies of each position by dynamic NTK scaling.

    transformers recomputes them for the length of the text so far, and a cache keeps the keys that
    it has: one by one, each token is rotated by those of its own position.

    Args:
      frequency: [h/2] radians per position up to `original` positions.
      where: [b t] positions.
      scaling: factor and original.
    """
    half = frequency.shape[-1]
    length = jnp.maximum(where + 1, scaling.original).astype(jnp.float32)
    growth = scaling.factor * length / scaling.original - (scaling.factor - 1)
    exponent = jnp.arange(half) / np.float32(half - 1)
    return frequency * growth[:, :, None, None] ** -exponent


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], frequency: Float[Array, "*b h/2"]
) -> Float[Array, "b t n h"]:
    """Rotates halves (x1, x2) of x by angles position * frequency (RoPE; Su et al., 2021).

    The halves are those of GPT-NeoX and Llama checkpoints, not interleaved pairs.

    Args:
      x: [b t n h] queries or keys.
      positions: [b t] positions.
      frequency: [h/2] radians per position, or [b t 1 h/2] where they depend on it.
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cosine - x2 * sine, x2 * cosine + x1 * sine], axis=-1)
    return rotated.astype(x.dtype)


def sinusoids(where: Int[Array, "b t"], stack: config.Stack) -> Float[Array, "b t d"]:
    """Sinusoidal position embeddings (Vaswani et al., 2017, section 3.5), in float32.

    All sines, then all cosines, not interleaved. An odd width has one more sine (vaswani), or ends
    with a zero (tensor2tensor).
    """
    half = stack.embed // 2
    if stack.sinusoids == "vaswani":
        exponent, sines = np.arange(stack.embed - half) * 2 / stack.embed, stack.embed - half
    else:
        exponent, sines = np.arange(half) / (half - 1), half
    frequency = (10000.0**-exponent).astype(np.float32)
    place = (where + stack.position_offset).astype(jnp.float32)
    angle = place[:, :, None] * frequency
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle[:, :, :half])], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, stack.embed - half - sines)))


def look_up_positions(
    table: Float[Array, "p d"], where: Int[Array, "b t"], stack: config.Stack
) -> Float[Array, "b t d"]:
    """Learned position embeddings, with positions between the rows of their table.

    Args:
      table: [p d] embeddings.
      where: [b t] positions.
      stack: architecture: the first row, and places from a row to the next.
    """
    placed = spec("batch length width")
    if stack.interpolation == 1:
        return table.at[where + stack.position_offset].get(out_sharding=placed)
    place = where.astype(jnp.float32) / stack.interpolation + stack.position_offset
    row = jnp.floor(place).astype(jnp.int32)
    share = (place - row)[:, :, None].astype(table.dtype)
    before, after = (table.at[at].get(mode="clip", out_sharding=placed) for at in (row, row + 1))
    return before + share * (after - before)


def draw_positions(
    segments: Int[Array, "b t"], where: Int[Array, "b t"], count: int, key: jax.Array
) -> Int[Array, "b t"]:
    """Draws increasing positions below count for every text, as those of segments of longer texts
    (Ruoss et al., 2023, section 3).

    Args:
      segments: [b t] segment ids, which do not fall along a row; 0 is padding, at its end.
      where: [b t] positions within each segment, from 0.
      count: positions to draw from.
      key: random key.

    Raises:
      ValueError: rows are longer than count.
    """
    length = where.shape[1]
    config.require(
        length <= count,
        f"Stack.random_positions is {count}, and rows have {length} tokens: raise it to that "
        "or more",
    )
    noise = jax.random.uniform(key, where.shape, out_sharding=spec("batch length"))
    # Sorted within each segment: a segment's numbers are between those of its neighbors.
    order = jnp.where(segments > 0, segments, length + 1)
    rows = jax.reshard(order + noise, spec("batch whole"))
    share = jax.reshard(jnp.sort(rows, axis=1), spec("batch length")) - order
    gaps = jnp.floor(jnp.clip(share, 0, 1) * (count - length + 1)).astype(jnp.int32)
    return jnp.where(segments > 0, where + jnp.minimum(gaps, count - length), where)


def vector_bias(
    vectors: Float[Array, "k h"],
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b n s h"],
    buckets: Int[Array, "t s"] | Int[Array, "b t s"],
) -> Float[Array, "b n t s"]:
    """Products of queries and of keys with the vector of their bucket, float32 (Huang et al., 2020,
    method 4).

    Args:
      vectors: [k h] a vector of each bucket, shared by all heads.
      q: [b t n h] queries, scaled.
      keys: [b n s h] keys, scaled as the queries are.
      buckets: [t s] or [b t s] bucket of every pair.
    """
    # Products with one-hot rows, not gathers: their gradients are products too.
    one_hot = jax.nn.one_hot(buckets, len(vectors), dtype=jnp.float32)
    pairs = "tsk" if buckets.ndim == 2 else "btsk"
    of_queries = jnp.einsum("btnh,kh->bntk", q, vectors).astype(jnp.float32)
    of_keys = jnp.einsum("bnsh,kh->bnsk", keys, vectors).astype(jnp.float32)
    bias = jnp.einsum(f"bntk,{pairs}->bnts", of_queries, one_hot)
    return bias + jnp.einsum(f"bnsk,{pairs}->bnts", of_keys, one_hot)


def window_size(window: int, form: str) -> tuple[int, int]:
    """Number of keys to the left and to the right of a query that a window covers.

    form is `config.Stack.window_form`. A causal mask removes those to the right.
    """
    if form == "halved":
        return (window + 1) // 2 - 1, window // 2
    return (window, window) if form == "within" else (window - 1, window - 1)
