# SPDX-License-Identifier: Apache-2.0
"""Operands of the Mosaic GPU kernel over a cache: chunks of rows, blocks of slots, near bias.

Far slots, which every query of a chunk attends to at one bias, are most of a long cache: they take
a number per row. Near ones, whose bias or mask differs, lie in a few blocks: their bias and mask
are an array [r m c], made outside of the kernel, once for all layers that share a bias.

Axes: b batch, w new tokens, k key heads, g query heads per key head, h head size, r rows (the
queries of a chunk of tokens of one key head), s slots, c slots of a block, m near blocks.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.decode import rows as packed_rows
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.decode.rows import DecodeScalars, RowInfo
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.flash_mosaic.tile import BLOCK
from t5x_lite.kernels.tile_math import MASK_VALUE

# Two programs for each of an H100's 132 processors.
PROGRAMS = 264
# First slot of a row that is padding: it attends to none.
NO_SLOT = 1 << 30


class DecodeSchedule(NamedTuple):
    """Blocks of slots that each program visits, [b * chunks * splits], or the references to them.

    Attributes:
      begin: its first block.
      far: how many far blocks it visits from there on.
      near: how many near blocks it visits after those.
      tile: place of the first of these among the near blocks of its chunk.
    """

    begin: Any
    far: Any
    near: Any
    tile: Any


class MosaicDecodeOperands(NamedTuple):
    """Arrays that the kernel reads besides its schedule, or the references to them.

    Attributes:
      q: [b k chunks r h], queries.
      keys: [b k s h].
      values: [b k s h].
      first: [b chunks r], first far slot that each row attends to.
      bias: [k r], bias of far slots.
      near: [b k chunks m r c], bias of near slots, MASK_VALUE where a row does not attend to one.
      visible: [b blocks c], 1 for slots that every row attends to; all ones for a cache.
    """

    q: Any
    keys: Any
    values: Any
    first: Any
    bias: Any
    near: Any
    visible: Any


@dataclass(frozen=True)
class MosaicDecodeConfig:
    """Sizes of a kernel call, known before the kernel runs.

    Attributes:
      dtype: of queries, keys and values.
      size: size of a head.
      slots: slots of the cache, at least a block.
      width: new tokens of a row.
      group: query heads of a key head.
      chunks: chunks of a row's tokens.
      splits: programs that share the slots of a chunk.
      near_blocks: blocks that the near slots of a chunk may lie in.
      softcap: cap of the scores, or None.
      interpret: the kernel runs in the interpreter.
    """

    dtype: Any
    size: int
    slots: int
    width: int
    group: int
    chunks: int
    splits: int
    near_blocks: int
    softcap: float | None
    interpret: bool

    @property
    def accumulator(self) -> Any:
        """Layout of a product, and of scores and probabilities."""
        return plgpu.Layout.MMA_ACC(self.dtype)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return min(self.width, BLOCK // self.group)

    @property
    def blocks(self) -> int:
        """Blocks of slots."""
        return -(-self.slots // BLOCK)

    def first_slot(self, block) -> Any:
        """Returns the first slot that a block loads: the last block overlaps the one before it."""
        return jnp.minimum(block * BLOCK, self.slots - BLOCK)


def make_config(
    q, source: AttentionSource, softcap: float | None, interpret: bool
) -> MosaicDecodeConfig:
    """Returns chunks of rows, and as many splits as keep the card busy.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      softcap: cap of the scores, or None.
      interpret: the kernel runs in the interpreter.
    """
    b, w, k, g, h = q.shape
    slots, bias = source.keys.shape[2], source.relative_bias
    chunks, blocks = -(-w // min(w, BLOCK // g)), -(-slots // BLOCK)
    # From the first slot whose bias changes to the last new token, wherever these begin in a block.
    span = w + (0 if bias is None else bias.last_boundary)
    near_blocks = min(blocks, -(-span // BLOCK) + 1)
    return MosaicDecodeConfig(
        dtype=q.dtype,
        size=h,
        slots=slots,
        width=w,
        group=g,
        chunks=chunks,
        splits=max(1, min(blocks, PROGRAMS // (b * k * chunks))),
        near_blocks=near_blocks if isinstance(source.mask, CacheMask) else 1,
        softcap=softcap,
        interpret=interpret,
    )


def make_operands(
    q, source: AttentionSource, config: MosaicDecodeConfig
) -> tuple[DecodeSchedule, MosaicDecodeOperands]:
    """Returns everything the kernel reads; keys and values as they lie.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      config: sizes.
    """
    b, _, k, g, _ = q.shape
    mask, info = source.mask, chunk_rows(config, source.mask)
    exists = info.order[..., 0] < config.width
    visible = jnp.ones((b, config.slots), bool)
    bias = jnp.zeros((k, BLOCK), jnp.float32)
    if isinstance(mask, CacheMask):
        scalars = packed_rows.cache_scalars(mask, last_boundary(source), config.chunk_tokens)
        first, near_begin = jnp.zeros((b, 1, 1), jnp.int32), scalars.unmasked_end
        if mask.window_size is not None:
            first = mask.index[:, None, None] + info.depth[..., 0] - mask.window_size[0]
        if source.relative_bias is not None:
            last = source.relative_bias.last_boundary
            far = source.relative_bias.by_distance(-last, 1).reshape(k, g)
            bias = jnp.resize(far.T, (BLOCK, k)).T
    else:
        assert isinstance(mask, jax.Array)
        scalars, visible = packed_rows.input_scalars(mask, config.chunks), mask
        # No block is near.
        first, near_begin = jnp.zeros((b, 1, 1), jnp.int32), -(-scalars.end // BLOCK) * BLOCK
    schedule = make_schedule(config, scalars.first, near_begin, scalars.end)
    slots = block_slots(config, jnp.arange(config.blocks))
    near_block = jnp.minimum(near_begin, scalars.end) // BLOCK
    return schedule, MosaicDecodeOperands(
        q=chunk_queries(config, q),
        keys=source.keys,
        values=source.values,
        first=jnp.where(exists, first, NO_SLOT).astype(jnp.int32),
        bias=bias,
        near=near_tiles(config, source, info, near_block.reshape(b, -1)),
        visible=jnp.where(slots < 0, False, visible[:, slots]).astype(jnp.int32),
    )


def last_boundary(source: AttentionSource) -> int | None:
    """Returns the distance from which on the bias no longer changes; None without a bias."""
    bias = source.relative_bias
    return None if bias is None else bias.last_boundary


def chunk_queries(config: MosaicDecodeConfig, q: Float[Array, "b w k g h"]) -> jax.Array:
    """Returns queries as rows [b k chunks r h], the group innermost."""
    b, w, k, g, h = q.shape
    tokens = config.chunk_tokens
    q = jnp.pad(jnp.moveaxis(q, 2, 1), ((0, 0), (0, 0), (0, -w % tokens), (0, 0), (0, 0)))
    q = q.reshape(b, k, config.chunks, tokens * g, h)
    return jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, BLOCK - tokens * g), (0, 0)))


def chunk_rows(config: MosaicDecodeConfig, mask) -> RowInfo:
    """Returns the token of each row [chunks r 1]; that of padding is past the last one.

    Args:
      config: sizes.
      mask: a CacheMask, or that of inputs, whose queries have no positions.
    """
    row = jnp.arange(BLOCK)
    token = jnp.arange(config.chunks)[:, None] * config.chunk_tokens + row // config.group
    padding = (row >= config.chunk_tokens * config.group) | (token >= config.width)
    order = jnp.where(padding, config.width, token)[..., None]
    if not isinstance(mask, CacheMask):
        return RowInfo(order, order)
    at = jnp.minimum(order, config.width - 1)
    info = RowInfo(order, mask.depths().astype(jnp.int32)[at])
    if mask.ancestors is None:
        return info
    low, high = packed_rows.pack_ancestors(mask.ancestors)
    return info._replace(ancestors_low=low[at], ancestors_high=high[at])


def make_schedule(config: MosaicDecodeConfig, first, near_begin, end) -> DecodeSchedule:
    """Returns the blocks of every program: an even share of those of its chunk.

    Args:
      config: sizes.
      first: [b * chunks], first slot that a chunk attends to.
      near_begin: [b * chunks], end of far slots.
      end: [b * chunks], end of its slots.
    """
    first_block, end_block = first // BLOCK, -(-end // BLOCK)
    near_block = jnp.clip(near_begin // BLOCK, first_block, jnp.maximum(first_block, end_block))
    share = -(-jnp.maximum(end_block - first_block, 0) // config.splits)
    begin = first_block[:, None] + share[:, None] * jnp.arange(config.splits)
    count = jnp.clip(end_block[:, None] - begin, 0, share[:, None])
    far = jnp.clip(near_block[:, None] - begin, 0, count)
    # A near block is the near_tiles' own: they begin at near_begin's, whatever the window hides.
    tile = begin + far - (jnp.minimum(near_begin, end) // BLOCK)[:, None]
    fields = (begin, far, count - far, tile)
    return DecodeSchedule(*(field.reshape(-1).astype(jnp.int32) for field in fields))


def block_slots(config: MosaicDecodeConfig, block: Int[Array, "..."]) -> Int[Array, "... c"]:
    """Returns the slots that blocks load, -1 for one that another block has or that is past all."""
    slot = config.first_slot(block)[..., None] + jnp.arange(BLOCK)
    return jnp.where((slot >= block[..., None] * BLOCK) & (slot < config.slots), slot, -1)


def near_tiles(
    config: MosaicDecodeConfig, source: AttentionSource, info: RowInfo, first_block
) -> Float[Array, "b k chunks m r c"]:
    """Returns the bias of near slots, MASK_VALUE where a row does not attend to one.

    Args:
      config: sizes.
      source: the cache, or inputs, whose slots are all far.
      info: the token of each row.
      first_block: [b chunks], the first near block.
    """
    mask, (b, k) = source.mask, source.keys.shape[:2]
    if not isinstance(mask, CacheMask):
        return jnp.full((b, k, config.chunks, 1, BLOCK, BLOCK), MASK_VALUE, jnp.float32)
    # [b chunks m 1 c], beside rows [chunks 1 r 1].
    slot = block_slots(config, first_block[..., None] + jnp.arange(config.near_blocks))
    slot = slot[:, :, :, None]
    info = RowInfo(*(None if x is None else x[:, None] for x in info))
    index = mask.index[:, None, None, None, None]
    position = slot
    if mask.ancestors is not None:
        token = slot - index
        is_token = (token >= 0) & (token < config.width)
        depth = mask.depths()[jnp.where(is_token, token, 0)]
        position = jnp.where(is_token, index + depth, slot)
    scalars = DecodeScalars(*4 * [None], index, None, mask.window_size)
    visible = packed_rows.visible_slots(slot, position, info, scalars, config.width)
    visible = (visible & (slot >= 0) & (info.order < config.width))[:, None]
    bias = source.relative_bias
    if bias is None:
        shape = (b, k, *visible.shape[2:])
        return jnp.where(jnp.broadcast_to(visible, shape), 0.0, MASK_VALUE)
    last = bias.last_boundary
    column = jnp.clip(position - index - info.depth, -last, last) + last
    by_head = bias.by_distance(-last, 2 * last + 1).reshape(k, config.group, -1)
    head = (jnp.arange(BLOCK) % config.group)[:, None]
    return jnp.where(visible, jnp.moveaxis(by_head[:, head, column], 0, 1), MASK_VALUE)
