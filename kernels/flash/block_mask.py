# SPDX-License-Identifier: Apache-2.0
"""Block mask: which blocks of keys a block of queries visits, one integer or two per block.

Axes: b batch, m blocks of one side, l blocks of the other, c tokens of a block.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_lite.kernels.mask import Mask
from t5x_lite.utils.not_none import not_none

# Id of a key to which nothing attends; no query has a negative one.
PADDING_ID = -2


class BlockSizes(NamedTuple):
    """Sizes of a tile, multiples of 128 on TPU.

    Attributes:
      query: queries of a block.
      key: keys of a block.
    """

    query: int
    key: int


class BlockMask(NamedTuple):
    """Run of blocks of the other side that each block of one side visits: b * m of them.

    Attributes:
      first: [b*m], first block of the run.
      count: [b*m], blocks of the run.
      segment: [b*m], the segment of a block that holds nothing else, without padding; else a
        number that equals no other_segment.
      other_segment: [b*l], the same of the blocks of the other side.
    """

    first: Int[Array, " m"]
    count: Int[Array, " m"]
    segment: Int[Array, " m"]
    other_segment: Int[Array, " l"]


class SegmentIds(NamedTuple):
    """Twice the segment of every token, plus 1 inside a prefix; padded to whole blocks.

    Attributes:
      query: [b 1 t], 0 for padding.
      key: [b 1 s], PADDING_ID for padding.
    """

    query: Any
    key: Any


def make_segment_ids(mask: Mask, sizes: BlockSizes) -> SegmentIds:
    """Returns the ids by which a tile decides segments and prefixes."""
    query, key = 2 * mask.query_segments, 2 * mask.key_segments
    if mask.causal and mask.query_prefix is not None:
        query, key = query + mask.query_prefix, key + not_none(mask.key_prefix)
    key = jnp.where(mask.key_segments > 0, key, PADDING_ID)
    query, key = pad_to_blocks(query, sizes.query, 0), pad_to_blocks(key, sizes.key, PADDING_ID)
    return SegmentIds(query[:, None], key[:, None])


def pad_to_blocks(x: Int[Array, "b t"], block: int, value: int) -> Int[Array, "b t2"]:
    """Returns x padded to whole blocks.

    Args:
      x: [b t], ids.
      block: tokens of a block.
      value: what to pad with.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=value)


def split_blocks(ids: Int[Array, "b 1 t"], block: int) -> Int[Array, "b m c"]:
    """Returns ids block by block."""
    return ids.reshape(ids.shape[0], -1, block)


def needed_blocks(mask: Mask, segment_ids: SegmentIds, sizes: BlockSizes) -> Bool[Array, "b m l"]:
    """Returns True for the pairs of blocks (queries m, keys l) in which a query attends to a key.

    Exact where segments stand one after the other and only one of causality, window and segments
    masks anything; otherwise it may name a pair too many, never one too few.

    Args:
      mask: of whole rows.
      segment_ids: of this mask.
      sizes: queries and keys of a block.
    """
    query = split_blocks(segment_ids.query, sizes.query)
    key = split_blocks(segment_ids.key, sizes.key)
    low, high = segment_range(query)
    low_key, high_key = segment_range(key)
    needed = (low[:, :, None] <= high_key[:, None]) & (low_key[:, None] <= high[:, :, None])
    offset = 0 if mask.offset is None else mask.offset
    first = jnp.arange(query.shape[1]) * sizes.query + offset
    last = jnp.minimum(first + sizes.query, mask.query_segments.shape[1] + offset) - 1
    first_key = jnp.arange(key.shape[1]) * sizes.key
    last_key = jnp.minimum(first_key + sizes.key, mask.key_segments.shape[1]) - 1
    if mask.causal:
        past = (first_key <= last[:, None])[None]
        if mask.query_prefix is not None:
            query_prefix, key_prefix = has_prefix(query), has_prefix(key)
            past = past | (query_prefix[:, :, None] & key_prefix[:, None])
        needed = needed & past
    if mask.window_size is not None:
        left, right = mask.window_size
        needed = needed & (first[:, None] - last_key <= left)
        needed = needed & (last[:, None] - first_key >= -right)
    return needed


def has_prefix(ids: Int[Array, "b m c"]) -> Bool[Array, "b m"]:
    """Returns True for blocks with a token of a prefix."""
    return jnp.any((ids > 0) & (ids % 2 == 1), axis=-1)


def segment_range(ids: Int[Array, "b m c"]) -> tuple[Int[Array, "b m"], Int[Array, "b m"]]:
    """Returns the lowest and highest segment of each block; of a block of padding, a range of
    nothing."""
    segment = ids >> 1
    low = jnp.min(jnp.where(segment > 0, segment, jnp.iinfo(jnp.int32).max), axis=-1)
    return low, jnp.max(jnp.where(segment > 0, segment, 0), axis=-1)


def single_segment(ids: Int[Array, "b m c"], otherwise: int) -> Int[Array, " m"]:
    """Returns the segment of each block that holds only one and no padding, else `otherwise`."""
    segment = ids >> 1
    first = segment[:, :, 0]
    is_single = jnp.all(segment == first[:, :, None], axis=-1) & (first > 0)
    return jnp.where(is_single, first, otherwise).reshape(-1)


def make_block_masks(
    mask: Mask, segment_ids: SegmentIds, sizes: BlockSizes
) -> tuple[BlockMask, BlockMask]:
    """Returns the runs of key blocks for every query block, and of query blocks for every key
    block.

    Args:
      mask: of whole rows.
      segment_ids: of this mask.
      sizes: queries and keys of a block.
    """
    needed = needed_blocks(mask, segment_ids, sizes)
    query = single_segment(split_blocks(segment_ids.query, sizes.query), -1)
    key = single_segment(split_blocks(segment_ids.key, sizes.key), -3)
    by_query = BlockMask(*block_runs(needed), query, key)
    return by_query, BlockMask(*block_runs(jnp.swapaxes(needed, 1, 2)), key, query)


def block_runs(needed: Bool[Array, "b m l"]) -> tuple[Int[Array, " bm"], Int[Array, " bm"]]:
    """Returns the first block needed, and how many there are from it to the last one."""
    first = jnp.argmax(needed, axis=-1)
    last = needed.shape[-1] - jnp.argmax(needed[:, :, ::-1], axis=-1)
    count = jnp.where(jnp.any(needed, axis=-1), last - first, 0)
    return first.reshape(-1).astype(jnp.int32), count.reshape(-1).astype(jnp.int32)
