# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens per row over a cache: greedy steps, drafts, trees, inputs."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite.kernels import block_decode_tpu as tpu
from t5x_lite.kernels import block_rows, tiles
from t5x_lite.kernels import relative as relatives
from t5x_lite.kernels.block_plan import MOST_ROWS
from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.source import Source

__all__ = [
    "MOST_ROWS",
    "Part",
    "Source",
    "attend",
    "block_decode_attention",
    "cross_decode_attention",
    "merged",
    "merged_decode_attention",
    "part",
]


class Part(NamedTuple):
    """Attention to one source alone: float32 context, and the logarithm of its softmax's sum.

    A query that sees nothing has context 0 and log_z HIDDEN.
    """

    context: Float[Array, "b w k g h"]
    log_z: Float[Array, "b w k g"]


def block_decode_attention(
    q: Float[Array, "b w k g h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s h"],
    block: BlockSight,
    relative: relatives.Relative | None,
    softcap: float | None,
    how: tiles.How,
) -> Float[Array, "b w k g h"]:
    """Softmax attention of a block over the cache that it is already written into.

    Queries come scaled; softcap comes before bias and mask; the bias is that of key position minus
    query position. Of each row only the slots that its block may see are fetched, once for all w g
    queries of a key head. A query that sees nothing gets 0.

    Raises:
      ValueError: a tree has more than 64 tokens. A chain may be of any width.
    """
    return attend(q, Source(keys, values, block, relative), softcap, how)


def cross_decode_attention(
    q: Float[Array, "b w k g h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s h"],
    seen: Bool[Array, "b s"],
    softcap: float | None,
    how: tiles.How,
) -> Float[Array, "b w k g h"]:
    """The same over an encoder's output, of which each row sees the same slots."""
    return attend(q, Source(keys, values, seen), softcap, how)


def merged_decode_attention(
    q: Float[Array, "b w k g h"],
    sources: tuple[Source, ...],
    softcap: float | None,
    how: tiles.How,
) -> Float[Array, "b w k g h"]:
    """One softmax over all sources (T5Gemma 2: the past and the inputs), nothing concatenated."""
    return merged([part(q, source, softcap, how) for source in sources]).astype(
        sources[0].values.dtype
    )


def merged(parts: list[Part]) -> Float[Array, "b w k g h"]:
    """The float32 context of one softmax over what the parts attended to, each for itself."""
    peak = functools.reduce(jnp.maximum, (part.log_z for part in parts))
    shares = [jnp.exp(part.log_z - peak)[..., None] for part in parts]
    context = sum(part.context * share for part, share in zip(parts, shares, strict=True))
    return context / sum(shares)


def attend(q, source: Source, softcap: float | None, how: tiles.How):
    """The context alone, in the values' dtype."""
    context, _ = tpu.call(q, source, softcap, how, parts=False)
    return block_rows.from_rows(context, q.shape[1], q.shape[3])


def part(q, source: Source, softcap: float | None, how: tiles.How) -> Part:
    """Attention to one source, to be merged with others or with other slots of the same one."""
    context, log_z = tpu.call(q, source, softcap, how, parts=True)
    unfold = functools.partial(block_rows.from_rows, w=q.shape[1], g=q.shape[3])
    return Part(unfold(context), unfold(log_z)[..., 0])
