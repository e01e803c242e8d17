# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens per row over a cache on TPU: chains, trees of drafts, inputs.

Axes: b batch, w new tokens, s slots, k key heads, g query heads per key head, h head size.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.decode import tpu
from t5x_lite.kernels.decode.rows import unpack_rows
from t5x_lite.kernels.dense_mask import AttentionSource

__all__ = [
    "AttentionSource",
    "PartialAttention",
    "decode_attention",
    "merge_partials",
    "merged_decode_attention",
    "partial_attention",
]


class PartialAttention(NamedTuple):
    """Attention to one source, or to some of its slots, alone.

    Attributes:
      context: [b w k g h], float32; 0 for a query that attends to nothing.
      log_z: [b w k g], log of the softmax's sum; MASK_VALUE for such a query.
    """

    context: Float[Array, "b w k g h"]
    log_z: Float[Array, "b w k g"]


def decode_attention(
    q: Float[Array, "b w k g h"], source: AttentionSource, softcap: float | None, backend: Backend
) -> Float[Array, "b w k g h"]:
    """Softmax attention of new tokens over the cache that they are already written into.

    Of each row only the slots to which some new token attends are fetched, once for all w g
    queries of a key head. A fully masked query gets 0.

    Args:
      q: [b w k g h], queries, already scaled.
      source: keys and values of the cache, with a CacheMask, or of inputs, with Bool [b s].
      softcap: cap of the scores, before bias and mask; None without one.
      backend: what runs the kernel.

    Raises:
      ValueError: a tree has more than 64 tokens. A chain may have any number.
    """
    context, _ = tpu.call_kernel(q, source, softcap, backend, partial=False)
    return unpack_rows(context, q.shape[1], q.shape[3])


def merged_decode_attention(
    q: Float[Array, "b w k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    backend: Backend,
) -> Float[Array, "b w k g h"]:
    """One softmax over all sources (T5Gemma 2: the past and the inputs), nothing concatenated.

    Args:
      q: [b w k g h], queries, already scaled.
      sources: caches and inputs, as for `decode_attention`.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
    """
    partials = [partial_attention(q, source, softcap, backend) for source in sources]
    return merge_partials(partials).astype(sources[0].values.dtype)


def merge_partials(partials: list[PartialAttention]) -> Float[Array, "b w k g h"]:
    """Returns the float32 context of one softmax over what the partials attended to, each for
    itself."""
    m = functools.reduce(jnp.maximum, (partial.log_z for partial in partials))
    weights = [jnp.exp(partial.log_z - m)[..., None] for partial in partials]
    context: Any = sum(
        partial.context * weight for partial, weight in zip(partials, weights, strict=True)
    )
    return context / sum(weights)


def partial_attention(
    q: Float[Array, "b w k g h"], source: AttentionSource, softcap: float | None, backend: Backend
) -> PartialAttention:
    """Attention to one source, to be merged with others or with other slots of the same one.

    Args:
      q: [b w k g h], queries, already scaled.
      source: as for `decode_attention`.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
    """
    context, log_z = tpu.call_kernel(q, source, softcap, backend, partial=True)
    unpack = functools.partial(unpack_rows, w=q.shape[1], g=q.shape[3])
    return PartialAttention(unpack(context), unpack(log_z)[..., 0])
