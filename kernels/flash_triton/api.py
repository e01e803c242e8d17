# SPDX-License-Identifier: Apache-2.0
"""Flash attention for GPUs as Triton kernels: what the TPU's computes, with the same masks.

Interpreted against float64 and lowered for CUDA in tests, and once compiled to machine code by
Triton's own compiler (tile.LARGEST_BLOCKS); never run on a GPU, nor timed. Axes: b batch,
t queries, s keys, n = k g query heads of k key heads, h head size, d distances.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.flash.api import source_spec
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.flash_triton import tile as tiles
from t5x_lite.kernels.flash_triton.backward import (
    TritonQueryResiduals,
    backward_keys,
    backward_queries,
)
from t5x_lite.kernels.flash_triton.bias_backward import backward_bias
from t5x_lite.kernels.flash_triton.forward import flash_forward
from t5x_lite.kernels.flash_triton.tile import MIN_SIZE, TritonFlashConfig
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.reference import CHECKPOINT_NAME


class TritonSource(NamedTuple):
    """Arrays of a source that have a gradient.

    Attributes:
      k: [b k s h], keys.
      v: [b k s h], values.
      bias: [n d], by distance, as far as it changes; None without a bias.
    """

    k: Float[Array, "b k s h"]
    v: Float[Array, "b k s h"]
    bias: Float[Array, "n d"] | None


def flash_attention(
    q: Float[Array, "b t k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    backend: Backend,
    largest: BlockSizes | None = None,
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b n t"]]:
    """Softmax attention over all sources in one softmax; memory linear in length, both ways.

    Scores and sums are float32. A fully masked query gets 0, and gives no gradient.

    Args:
      q: [b t k g h], queries, already scaled.
      sources: keys and values with a Mask each, and a bias of key index minus query index.
      softcap: c turns scores x into c tanh(x / c), before bias and mask; None without one.
      backend: what runs the kernels.
      largest: bounds of a block, powers of two from 16 on; by default what fits a GPU.

    Returns:
      the context, and log(Z) of every query, by which parts of a softmax are merged: MASK_VALUE for
      a fully masked query.
    """
    config = make_config(q, sources, softcap, backend, largest)
    arrays = tuple(
        TritonSource(source.keys, source.values, bias_vectors(source)) for source in sources
    )
    return triton_attention(config, q, arrays, tuple(source.mask for source in sources))


def make_config(
    q,
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    backend: Backend,
    largest: BlockSizes | None,
) -> TritonFlashConfig:
    """Returns the sizes of a kernel call.

    Args:
      q: [b t k g h], queries.
      sources: keys, values, masks and biases.
      softcap: cap of the scores, or None.
      backend: what runs the kernels.
      largest: bounds of a block; None is what fits a GPU.
    """
    _, t, _, g, h = q.shape
    size = max(MIN_SIZE, pl.next_power_of_2(h))
    largest = largest or tiles.largest_blocks(size, q.dtype)
    longest = max(source.keys.shape[2] for source in sources)
    queries, keys = (max(MIN_SIZE, pl.next_power_of_2(length)) for length in (t, longest))
    return TritonFlashConfig(
        group=g,
        head_size=h,
        queries=t,
        block_sizes=BlockSizes(min(largest.query, queries), min(largest.key, keys)),
        sources=tuple(source_spec(source) for source in sources),
        softcap=softcap,
        backend=backend,
    )


def bias_vectors(source: AttentionSource) -> Float[Array, "n d"] | None:
    """Returns the bias by distance, as far as it changes; None without a bias."""
    bias = source.relative_bias
    if bias is None:
        return None
    last = bias.last_boundary
    return bias.by_distance(-last, 2 * last + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def triton_attention(config: TritonFlashConfig, q, sources, masks):
    """Attention: the context, and log(Z) of every query.

    Args:
      config: sizes.
      q: [b t k g h], queries.
      sources: TritonSources.
      masks: their masks.
    """
    return triton_attention_fwd(config, q, sources, masks)[0]


def triton_attention_fwd(config: TritonFlashConfig, q, sources: tuple[TritonSource, ...], masks):
    """Forward rule of `triton_attention`.

    Args:
      config: sizes.
      q: [b t k g h], queries.
      sources: keys, values and biases.
      masks: their masks.
    """
    operands = tuple(
        make_operands(config, source, mask)[0] for source, mask in zip(sources, masks, strict=True)
    )
    context, log_z = flash_forward(config, q, operands)
    context = checkpoint_name(context, CHECKPOINT_NAME)
    log_z = checkpoint_name(log_z, CHECKPOINT_NAME)
    return (context, log_z), (q, sources, masks, context, log_z)


def make_operands(config: TritonFlashConfig, source: TritonSource, mask: Mask):
    """Returns the source for programs of queries, and for programs of keys.

    Args:
      config: sizes.
      source: keys, values and bias.
      mask: of whole rows.
    """
    return tiles.make_operands(source.k, source.v, source.bias, mask, config.block_sizes)


def triton_attention_bwd(config: TritonFlashConfig, residuals, gradients):
    """Backward rule of `triton_attention`.

    Args:
      config: sizes.
      residuals: what the forward rule kept.
      gradients: of the context and of log(Z).
    """
    q, sources, masks, context, log_z = residuals
    dout, dlog_z = gradients
    # The gradient of a score is p (dp - delta); that of log(Z) is added to it as p dlog_z.
    delta = jnp.sum(dout.astype(jnp.float32) * context.astype(jnp.float32), axis=-1)
    delta = jnp.moveaxis(delta.reshape(*q.shape[:2], -1), 1, 2) - dlog_z
    queries = TritonQueryResiduals(q, dout, log_z, delta)
    operands = [
        make_operands(config, source, mask) for source, mask in zip(sources, masks, strict=True)
    ]
    by_query, by_key = zip(*operands, strict=True)
    dq, far_dbiases = backward_queries(config, queries, by_query)
    dsources = []
    for index, (source, far_dbias) in enumerate(zip(by_key, far_dbiases, strict=True)):
        dbias = None
        if far_dbias is not None:
            dbias = backward_bias(config, index, queries, source, far_dbias)
        dk, dv = backward_keys(config, index, queries, source)
        dsources.append(TritonSource(dk, dv, dbias))
    return dq, tuple(dsources), None


triton_attention.defvjp(triton_attention_fwd, triton_attention_bwd)
