# SPDX-License-Identifier: Apache-2.0
"""New tokens as the decode kernels take them: queries of a key head as rows, and their masks.

Axes: b batch, w new tokens, k key heads, g query heads per key head, r rows, c slots of a block.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.relative import RelativePositionBias

# Ancestors are kept as the bits of two 32-bit words.
MAX_TREE_TOKENS = 64


class DecodeScalars(NamedTuple):
    """Scalars that a kernel reads ahead: which slots are fetched, and which are masked.

    [b*c]: c chunks of each row's tokens. Ranges of slots end before `end`.

    Attributes:
      first: [b*c], first slot that some query of the chunk may attend to.
      end: [b*c], end of those slots.
      unmasked_first: [b*c], first slot that every query attends to, so far away that the bias no
        longer changes.
      unmasked_end: [b*c], end of those slots.
      index: [b], slot of the first new token; None for inputs that all queries attend to alike.
      prefix: [b], slots before it attend to one another, or None.
      window_size: (left, right) of a sliding window, or None.
    """

    first: Any
    end: Any
    unmasked_first: Any
    unmasked_end: Any
    index: Any = None
    prefix: Any = None
    window_size: Any = None

    def of_chunk(self, row, chunk, chunks: int) -> "DecodeScalars":
        """Returns the scalars of one chunk of one row.

        Args:
          row: index in the batch.
          chunk: index of the chunk.
          chunks: number of chunks.
        """
        at = row * chunks + chunk
        window = self.window_size
        return DecodeScalars(
            first=self.first[at],
            end=self.end[at],
            unmasked_first=self.unmasked_first[at],
            unmasked_end=self.unmasked_end[at],
            index=None if self.index is None else self.index[row],
            prefix=None if self.prefix is None else self.prefix[row],
            window_size=None if window is None else (window[0], window[1]),
        )


class RowInfo(NamedTuple):
    """The token of each row, [r 1] each.

    Attributes:
      order: place of the token among the new ones.
      depth: its position minus index.
      ancestors_low: bits of its ancestors among the first 32 tokens; None in a chain.
      ancestors_high: bits of its ancestors among the other 32; None in a chain.
    """

    order: Any
    depth: Any
    ancestors_low: Any = None
    ancestors_high: Any = None


def cache_scalars(mask: CacheMask, last_boundary: int | None, chunk_tokens: int) -> DecodeScalars:
    """Returns the scalars of new tokens over their own cache.

    Args:
      mask: of the new tokens.
      last_boundary: distance from which on the bias no longer changes; None without a bias.
      chunk_tokens: tokens of a chunk.
    """
    padding = (0, -mask.width % chunk_tokens)
    tokens, depths = (
        jnp.pad(x, padding, mode="edge").reshape(1, -1, chunk_tokens)
        for x in (jnp.arange(mask.width), mask.depths())
    )
    is_tree = mask.ancestors is not None
    index = mask.index[:, None]
    shallow, deep = index + jnp.min(depths, axis=2), index + jnp.max(depths, axis=2)
    first, unmasked_first = jnp.zeros_like(deep), jnp.zeros_like(deep)
    # Every token of a tree attends to the past alone; of a chain, to what its first token does.
    end = index + (mask.width if is_tree else jnp.max(tokens, axis=2) + 1)
    unmasked_end = index + (0 if is_tree else jnp.min(tokens, axis=2) + 1)
    if last_boundary is not None:
        unmasked_end = jnp.minimum(unmasked_end, shallow - last_boundary + 1)
    if mask.prefix is not None:
        prefix = mask.prefix[:, None]
        end = jnp.maximum(end, jnp.where(shallow < prefix, prefix, 0))
    if mask.window_size is not None:
        left, right = mask.window_size
        first, window_end = jnp.maximum(shallow - left, 0), deep + right + 1
        if is_tree:
            # A tree's slots are not its positions: the kernel decides which are in the window.
            first = jnp.minimum(first, index)
            window_end = jnp.maximum(window_end, index + mask.width)
        end, unmasked_first = jnp.minimum(end, window_end), deep - left
        unmasked_end = jnp.minimum(unmasked_end, shallow + right + 1)
    bounds = (
        jnp.broadcast_to(jnp.clip(x, 0, mask.slots), deep.shape).reshape(-1)
        for x in (first, end, unmasked_first, unmasked_end)
    )
    return DecodeScalars(*bounds, mask.index, mask.prefix, mask.window_size)


def input_scalars(visible: Bool[Array, "b s"], chunks: int) -> DecodeScalars:
    """Returns the scalars of inputs to which every query of a row attends alike."""
    slots = jnp.arange(visible.shape[1])
    end = jnp.max(jnp.where(visible, slots + 1, 0), axis=1)
    first = jnp.min(jnp.where(visible, slots, end[:, None]), axis=1)
    hole = jnp.min(jnp.where(~visible & (slots >= first[:, None]), slots, end[:, None]), axis=1)
    return DecodeScalars(*(jnp.repeat(x, chunks) for x in (first, end, first, hole)))


def pack_rows(q: Float[Array, "b w k g h"], rows: int) -> Float[Array, "b k r h"]:
    """Returns the w g queries of each key head as rows, g innermost, padded with zeros."""
    b, w, k, g, h = q.shape
    q = jnp.moveaxis(q, 2, 1).reshape(b, k, w * g, h)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - w * g), (0, 0)))


def unpack_rows(x: Float[Array, "b k r h"], w: int, g: int) -> Float[Array, "b w k g h"]:
    """Inverse of `pack_rows`.

    Args:
      x: [b k r h], rows.
      w: number of new tokens.
      g: query heads of a key head.
    """
    b, k, _, h = x.shape
    return jnp.moveaxis(x[:, :, : w * g].reshape(b, k, w, g, h), 1, 2)


def pack_ancestors(ancestors: Bool[Array, "w w"]) -> Int[Array, "2 w"]:
    """Returns every token's ancestors as bits: those of the first 32 tokens, then of the others.

    Raises:
      ValueError: more tokens than there are bits.
    """
    width = ancestors.shape[0]
    if width > MAX_TREE_TOKENS:
        raise ValueError(f"a tree has at most {MAX_TREE_TOKENS} tokens; got {width}")
    bits = jnp.pad(ancestors, ((0, 0), (0, MAX_TREE_TOKENS - width))).astype(jnp.uint32)
    words = jnp.sum(bits.reshape(-1, 2, 32) << jnp.arange(32, dtype=jnp.uint32), axis=-1)
    return words.astype(jnp.uint32).view(jnp.int32).T


def row_info(mask: CacheMask, group: int, rows: int) -> RowInfo:
    """Returns the token of each row.

    Args:
      mask: of the new tokens.
      group: query heads of a key head, which are as many rows of a token.
      rows: number of rows, padding included.
    """

    def per_row(x):
        return jnp.pad(jnp.repeat(x, group), (0, rows - mask.width * group))[:, None]

    order, depth = per_row(jnp.arange(mask.width)), per_row(mask.depths().astype(jnp.int32))
    if mask.ancestors is None:
        return RowInfo(order, depth)
    low, high = pack_ancestors(mask.ancestors)
    return RowInfo(order, depth, per_row(low), per_row(high))


def bias_table(
    bias: RelativePositionBias, heads: tuple[int, int], rows: int
) -> Float[Array, "k r n"]:
    """Returns the bias of every bucket for the rows of a chunk of every key head.

    Args:
      bias: of n buckets.
      heads: key heads, and query heads of each.
      rows: rows of a chunk.
    """
    k, g = heads
    table = bias.table.astype(jnp.float32).T.reshape(k, g, -1)
    return jnp.tile(table, (1, -(-rows // g), 1))[:, :rows]


def visible_slots(
    slot: Int[Array, "1 c"],
    position: Int[Array, "1 c"],
    info: RowInfo,
    scalars: DecodeScalars,
    width: int,
) -> Bool[Array, "r c"]:
    """Returns True where a row attends to a slot.

    Args:
      slot: [1 c], slots of a block.
      position: [1 c], positions of the tokens in them.
      info: the token of each row.
      scalars: of one chunk.
      width: number of new tokens.
    """
    offset = slot - scalars.index
    if info.ancestors_low is None:
        visible = offset <= info.order
    else:
        word = jnp.where(offset < 32, info.ancestors_low, info.ancestors_high)
        bit = jnp.right_shift(word, offset & 31) & 1
        visible = (offset < 0) | ((bit == 1) & (offset < width))
    query_position = scalars.index + info.depth
    if scalars.prefix is not None:
        visible = visible | ((slot < scalars.prefix) & (query_position < scalars.prefix))
    if scalars.window_size is not None:
        left, right = scalars.window_size
        visible = visible & (position >= query_position - left)
        visible = visible & (position <= query_position + right)
    return visible


def bias_of_distance(
    distance: Int[Array, "r c"],
    table: Float[Array, "k r n"],
    boundaries: tuple[int, ...],
    both_sides: bool,
) -> Float[Array, "k r c"]:
    """Returns the bias of distances, bucket by bucket: a selection for each boundary.

    Args:
      distance: [r c], key position minus query position.
      table: [k r n], bias of every bucket by row.
      boundaries: smallest distance of every bucket of one side after the first.
      both_sides: True if the table has buckets for keys after the query.
    """

    def column(bucket: int):
        return table[..., bucket : bucket + 1]

    bias = jnp.broadcast_to(column(0), (*table.shape[:-1], distance.shape[-1]))
    for bucket, boundary in enumerate(boundaries, start=1):
        bias = jnp.where(distance <= -boundary, column(bucket), bias)
    for bucket, boundary in enumerate(boundaries if both_sides else (), start=len(boundaries) + 2):
        bias = jnp.where(distance >= boundary, column(bucket), bias)
    return bias
