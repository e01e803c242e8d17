# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPU with T5's bias, packing, prefixes, windows, and two sources in one
softmax.

Axes: b batch, t queries, s keys, n = k g query heads of k key heads, h head size, w lanes of packed
heads, m blocks of p heads, d distances.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.flash import (
    block_mask,
    toeplitz,
    tpu_backward_kv,
    tpu_backward_q,
    tpu_forward,
)
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.flash.config import (
    FlashConfig,
    FlashScalars,
    SourceSpec,
    largest_blocks,
    pack_heads,
    padded_lanes,
    unpack_heads,
)
from t5x_lite.kernels.flash.tpu_backward_q import QueryResiduals
from t5x_lite.kernels.flash.tpu_forward import FlashOperands
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.reference import CHECKPOINT_NAME
from t5x_lite.kernels.tile_math import LANES
from t5x_lite.kernels.tile_table import AttentionShape, fastest_blocks


class PackedSource(NamedTuple):
    """Arrays of a source that have a gradient, as the kernels take them.

    Attributes:
      k: [b s w], keys, heads side by side in lanes.
      v: [b s w], values, likewise.
      bias: [m p d], by difference of indices; None without a bias.
    """

    k: Float[Array, "b s w"]
    v: Float[Array, "b s w"]
    bias: Float[Array, "m p d"] | None


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
      largest: bounds of a block; by default what suits the chip.

    Returns:
      the context, and log(Z) of every query, by which parts of a softmax are merged: MASK_VALUE for
      a fully masked query.
    """
    b, t, k, g, h = q.shape
    config = make_config(q, sources, softcap, backend, largest)
    arrays, origins = [], []
    for source in sources:
        bias, origin = make_bias_vectors(config, source)
        keys, values = (pack_heads(jnp.swapaxes(x, 1, 2)) for x in (source.keys, source.values))
        arrays.append(PackedSource(keys, values, bias))
        origins.append(origin)
    masks = tuple(source.mask for source in sources)
    packed = pack_heads(q.reshape(b, t, k * g, h))
    context, log_z = packed_attention(config, packed, tuple(arrays), masks, tuple(origins))
    log_z = log_z.reshape(b, -1, t)[:, : k * g]
    return unpack_heads(context, k * g, h).reshape(q.shape), log_z


def make_config(
    q,
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    backend: Backend,
    largest: BlockSizes | None,
) -> FlashConfig:
    """Returns the sizes of a kernel call.

    Args:
      q: [b t k g h], queries.
      sources: keys, values, masks and biases.
      softcap: cap of the scores, or None.
      backend: what runs the kernels.
      largest: bounds of a block; None is what was measured, or suits the chip.
    """
    _, t, k, g, h = q.shape
    row_bytes = max(LANES, padded_lanes(h)) * q.dtype.itemsize
    longest = max(source.keys.shape[2] for source in sources)
    largest = largest or measured_blocks(backend, q, sources[0], longest)
    largest = largest or largest_blocks(backend, row_bytes)
    padded_queries, padded_keys = (-(-length // LANES) * LANES for length in (t, longest))
    return FlashConfig(
        heads=k * g,
        group=g,
        head_lanes=padded_lanes(h),
        queries=t,
        block_sizes=BlockSizes(min(largest.query, padded_queries), min(largest.key, padded_keys)),
        sources=tuple(source_spec(source) for source in sources),
        softcap=softcap,
        backend=backend,
    )


def measured_blocks(backend: Backend, q, source: AttentionSource, keys: int) -> BlockSizes | None:
    """Returns the blocks that were measured on this chip for such shapes, None without any.

    Args:
      backend: with the chip.
      q: [b t k g h], queries.
      source: the first one.
      keys: most keys of a source.
    """
    if not backend.chip:
        return None
    _, t, _, _, h = q.shape
    sizes = fastest_blocks(
        AttentionShape(
            chip=backend.chip,
            queries=t,
            keys=keys,
            head_dim=h,
            bytes=q.dtype.itemsize,
            biased=source.bias is not None,
            causal=source.row_mask.causal,
        )
    )
    return BlockSizes(*sizes) if sizes else None


def source_spec(source: AttentionSource) -> SourceSpec:
    """Returns the static features of a source."""
    mask = source.row_mask
    return SourceSpec(
        causal=mask.causal,
        prefix=mask.causal and mask.query_prefix is not None,
        window=mask.window_size is not None,
        biased=source.bias is not None,
        length=source.keys.shape[2],
    )


def make_bias_vectors(config: FlashConfig, source: AttentionSource):
    """Returns the bias by difference of indices, a row per head of every block, and the difference
    of its first value."""
    relative = source.relative_bias
    if relative is None:
        return None, jnp.int32(0)
    widest = max(config.block_sizes)
    bias, origin = toeplitz.bias_vector(relative, source.row_mask.offset, widest)
    spare_heads = config.head_blocks * config.block_heads - config.heads
    bias = jnp.pad(bias, ((0, spare_heads), (0, 0)))
    return bias.reshape(config.head_blocks, config.block_heads, -1), origin


class PreparedSource(NamedTuple):
    """A source as the kernels take it.

    Attributes:
      operands: for kernels with queries along rows.
      scalars: for these.
      reversed_operands: for the kernel with keys along rows.
      reversed_scalars: for this.
    """

    operands: FlashOperands
    scalars: FlashScalars
    reversed_operands: FlashOperands
    reversed_scalars: FlashScalars


def prepare_source(config: FlashConfig, source: PackedSource, mask: Mask, origin) -> PreparedSource:
    """Returns a source's arrays and scalars, for kernels either way round.

    Args:
      config: sizes.
      source: keys, values and bias.
      mask: of whole rows.
      origin: difference of indices of the bias's first value.
    """
    segment_ids = block_mask.make_segment_ids(mask, config.block_sizes)
    by_query, by_key = block_mask.make_block_masks(mask, segment_ids, config.block_sizes)

    def stack_offsets(origin):
        return jnp.stack([jnp.int32(x) for x in (*mask.index_scalars(), origin)])

    bias, reversed_bias, end = source.bias, None, 0
    if bias is not None:
        reversed_bias, end = toeplitz.reverse_vector(bias), origin + bias.shape[-1]
    return PreparedSource(
        operands=FlashOperands(source.k, source.v, segment_ids, bias),
        scalars=FlashScalars(stack_offsets(origin), by_query),
        reversed_operands=FlashOperands(source.k, source.v, segment_ids, reversed_bias),
        reversed_scalars=FlashScalars(stack_offsets(-end), by_key),
    )


def prepare_sources(config: FlashConfig, sources, masks, origins) -> list[PreparedSource]:
    """Returns all sources as the kernels take them.

    Args:
      config: sizes.
      sources: PackedSources.
      masks: their masks.
      origins: differences of indices of their biases' first values.
    """
    return [
        prepare_source(config, source, mask, origin)
        for source, mask, origin in zip(sources, masks, origins, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_attention(config: FlashConfig, q, sources, masks, origins):
    """Attention of packed heads: the context, and log(Z) of every query.

    Args:
      config: sizes.
      q: [b t w], queries, heads packed in lanes.
      sources: PackedSources.
      masks: their masks.
      origins: differences of indices of their biases' first values.
    """
    return packed_attention_fwd(config, q, sources, masks, origins)[0]


def packed_attention_fwd(config: FlashConfig, q, sources, masks, origins):
    """Forward rule of `packed_attention`.

    Args:
      config: sizes.
      q: [b t w], queries, heads packed in lanes.
      sources: PackedSources.
      masks: their masks.
      origins: differences of indices of their biases' first values.
    """
    prepared = prepare_sources(config, sources, masks, origins)
    operands = tuple(source.operands for source in prepared)
    scalars = tuple(source.scalars for source in prepared)
    context, log_z = tpu_forward.flash_forward(config, q, operands, scalars)
    context = checkpoint_name(context, CHECKPOINT_NAME)
    log_z = checkpoint_name(log_z, CHECKPOINT_NAME)
    return (context, log_z), (q, sources, masks, origins, context, log_z)


def packed_attention_bwd(config: FlashConfig, residuals, gradients):
    """Backward rule of `packed_attention`.

    Args:
      config: sizes.
      residuals: what the forward rule kept.
      gradients: of the context and of log(Z).
    """
    q, sources, masks, origins, context, log_z = residuals
    dout, dlog_z = gradients
    delta = make_delta(config, dout, context, dlog_z)
    queries = QueryResiduals(q, dout, log_z, delta)
    prepared = prepare_sources(config, sources, masks, origins)
    operands = tuple(source.operands for source in prepared)
    scalars = tuple(source.scalars for source in prepared)
    dq, dbiases = tpu_backward_q.backward_queries(config, queries, operands, scalars)
    dsources = []
    for index, (source, dbias) in enumerate(zip(prepared, dbiases, strict=True)):
        dk, dv = tpu_backward_kv.backward_keys(
            config, index, queries, source.reversed_operands, source.reversed_scalars
        )
        dsources.append(PackedSource(dk, dv, dbias))
    return dq, tuple(dsources), None, None


def make_delta(config: FlashConfig, dout, context, dlog_z) -> Float[Array, "b m p t"]:
    """Returns the row sum of dout * context, less the gradient of log(Z).

    The gradient of a score is p (dp - delta); that of log(Z) is added to it as p dlog_z.

    Args:
      config: sizes.
      dout: [b t w], gradient of the context.
      context: [b t w].
      dlog_z: [b m p t], gradient of log(Z).
    """
    b, t, _ = dout.shape
    product = dout.astype(jnp.float32) * context.astype(jnp.float32)
    heads = (config.head_blocks, config.block_heads, config.head_lanes)
    delta = jnp.sum(product.reshape(b, t, *heads), axis=-1)
    return jnp.transpose(delta, (0, 2, 3, 1)) - dlog_z


packed_attention.defvjp(packed_attention_fwd, packed_attention_bwd)
