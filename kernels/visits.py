# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys a block of queries has to visit: one number or two per block."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_lite.kernels.sight import Sight

# The code of a key that nobody sees; no query has a negative one.
NOBODY = -2


class Sizes(NamedTuple):
    """Queries and keys of one block, multiples of 128."""

    query: int
    key: int


class Visits(NamedTuple):
    """For every block of one side (b * blocks of them) a run of blocks of the other side.

    first and count of the run; own and other: the segment of a block, of either side, that holds
    nothing but this segment, else a number that is never equal to one of the opposite side.
    """

    first: Int[Array, " m"]
    count: Int[Array, " m"]
    own: Int[Array, " m"]
    other: Int[Array, " l"]


class Codes(NamedTuple):
    """Twice the segment of every token, plus 1 inside a prefix; whole blocks, the rest hidden."""

    query: Int[Array, "b 1 t"]
    key: Int[Array, "b 1 s"]


def codes(sight: Sight, sizes: Sizes) -> Codes:
    query, key = 2 * sight.query_segments, 2 * sight.key_segments
    if sight.causal and sight.query_prefix is not None:
        query, key = query + sight.query_prefix, key + sight.key_prefix
    key = jnp.where(sight.key_segments > 0, key, NOBODY)
    return Codes(padded(query, sizes.query, 0)[:, None], padded(key, sizes.key, NOBODY)[:, None])


def padded(x: Int[Array, "b t"], block: int, value: int) -> Int[Array, "b t2"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=value)


def blocks(codes: Int[Array, "b 1 t"], block: int) -> Int[Array, "b m c"]:
    return codes.reshape(codes.shape[0], -1, block)


def needed(sight: Sight, codes: Codes, sizes: Sizes) -> Bool[Array, "b m l"]:
    """The pairs of blocks (queries m, keys l) in which a query may see a key.

    Exact where segments stand one after the other and only one of causality, reach and segments
    hides anything; otherwise it may name a pair too many, never one too few.
    """
    query, key = blocks(codes.query, sizes.query), blocks(codes.key, sizes.key)
    low, high = extremes(query)
    low_key, high_key = extremes(key)
    seen = (low[:, :, None] <= high_key[:, None]) & (low_key[:, None] <= high[:, :, None])
    offset = 0 if sight.offset is None else sight.offset
    first = jnp.arange(query.shape[1]) * sizes.query + offset
    last = jnp.minimum(first + sizes.query, sight.query_segments.shape[1] + offset) - 1
    first_key = jnp.arange(key.shape[1]) * sizes.key
    last_key = jnp.minimum(first_key + sizes.key, sight.key_segments.shape[1]) - 1
    if sight.causal:
        past = (first_key <= last[:, None])[None]
        if sight.query_prefix is not None:
            inside = lambda x: jnp.any((x > 0) & (x % 2 == 1), axis=-1)
            past = past | (inside(query)[:, :, None] & inside(key)[:, None])
        seen = seen & past
    if sight.reach is not None:
        behind, ahead = sight.reach
        seen = seen & (first[:, None] - last_key <= behind) & (last[:, None] - first_key >= -ahead)
    return seen


def extremes(codes: Int[Array, "b m c"]) -> tuple[Int[Array, "b m"], Int[Array, "b m"]]:
    """The lowest and highest segment of each block; of a block of padding, a range of nothing."""
    segment = codes >> 1
    low = jnp.min(jnp.where(segment > 0, segment, jnp.iinfo(jnp.int32).max), axis=-1)
    return low, jnp.max(jnp.where(segment > 0, segment, 0), axis=-1)


def single(codes: Int[Array, "b m c"], otherwise: int) -> Int[Array, " m"]:
    """The segment of each block if it holds only one and no padding."""
    segment = codes >> 1
    first = segment[:, :, 0]
    alone = jnp.all(segment == first[:, :, None], axis=-1) & (first > 0)
    return jnp.where(alone, first, otherwise).reshape(-1)


def visits(sight: Sight, codes: Codes, sizes: Sizes) -> tuple[Visits, Visits]:
    """The runs of key blocks for every query block, and of query blocks for every key block."""
    seen = needed(sight, codes, sizes)
    query = single(blocks(codes.query, sizes.query), -1)
    key = single(blocks(codes.key, sizes.key), -3)
    return Visits(*runs(seen), query, key), Visits(*runs(jnp.swapaxes(seen, 1, 2)), key, query)


def runs(seen: Bool[Array, "b m l"]) -> tuple[Int[Array, " bm"], Int[Array, " bm"]]:
    """The first block seen, and how many from it to the last one."""
    first = jnp.argmax(seen, axis=-1)
    last = seen.shape[-1] - jnp.argmax(seen[:, :, ::-1], axis=-1)
    count = jnp.where(jnp.any(seen, axis=-1), last - first, 0)
    return first.reshape(-1).astype(jnp.int32), count.reshape(-1).astype(jnp.int32)
