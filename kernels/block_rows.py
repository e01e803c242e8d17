# SPDX-License-Identifier: Apache-2.0
"""A decoded block as a kernel sees it: the queries of one key head as rows, and numbers per row."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import relative as relatives
from t5x_lite.kernels.block_sight import BlockSight

# Ancestors are kept as the bits of two 32-bit words.
TREE = 64


class Facts(NamedTuple):
    """Scalars that decide what is fetched and hidden; [b c] flat for c chunks of each row's tokens.

    Slots from first to before end may be seen; those from clear to before unclear are seen by
    every query of the chunk, so far away that the bias no longer changes.
    """

    first: Int[Array, " b*c"]
    end: Int[Array, " b*c"]
    clear: Int[Array, " b*c"]
    unclear: Int[Array, " b*c"]
    index: Int[Array, " b"] | None = None
    prefix: Int[Array, " b"] | None = None
    reach: Int[Array, " 2"] | None = None


def facts_of(facts: Facts, row, chunk, chunks: int) -> Facts:
    """The facts of one chunk, as scalars."""
    own = [bound[row * chunks + chunk] for bound in facts[:4]]
    index, prefix = (None if x is None else x[row] for x in (facts.index, facts.prefix))
    reach = None if facts.reach is None else (facts.reach[0], facts.reach[1])
    return Facts(*own, index, prefix, reach)


class Columns(NamedTuple):
    """One number per row [r 1]: the token's place in the block, its depth, its ancestors' bits."""

    order: Int[Array, "r 1"]
    depth: Int[Array, "r 1"]
    low: Int[Array, "r 1"] | None = None
    high: Int[Array, "r 1"] | None = None


def facts_of_block(block: BlockSight, farthest: int | None, span: int) -> Facts:
    """The facts of a block over its own cache, for chunks of span tokens.

    farthest is that of the bias, None without one.
    """
    chunked = lambda x: jnp.pad(x, (0, -block.width % span), mode="edge").reshape(1, -1, span)
    tokens, depths = chunked(jnp.arange(block.width)), chunked(block.depths())
    tree = block.ancestors is not None
    index = block.index[:, None]
    shallow, deep = index + jnp.min(depths, axis=2), index + jnp.max(depths, axis=2)
    first, clear = jnp.zeros_like(deep), jnp.zeros_like(deep)
    # The past alone is seen by every token of a tree; of a chain, what its first token sees.
    end = index + (block.width if tree else jnp.max(tokens, axis=2) + 1)
    unclear = index + (0 if tree else jnp.min(tokens, axis=2) + 1)
    if farthest is not None:
        unclear = jnp.minimum(unclear, shallow - farthest + 1)
    if block.prefix is not None:
        prefix = block.prefix[:, None]
        end = jnp.maximum(end, jnp.where(shallow < prefix, prefix, 0))
    if block.reach is not None:
        behind, ahead = block.reach
        first, last = jnp.maximum(shallow - behind, 0), deep + ahead + 1
        if tree:
            # A tree's slots are not its positions, so they are in reach until looked at.
            first, last = jnp.minimum(first, index), jnp.maximum(last, index + block.width)
        end, clear = jnp.minimum(end, last), deep - behind
        unclear = jnp.minimum(unclear, shallow + ahead + 1)
    flat = lambda x: jnp.broadcast_to(jnp.clip(x, 0, block.slots), deep.shape).reshape(-1)
    bounds = (flat(x) for x in (first, end, clear, unclear))
    return Facts(*bounds, block.index, block.prefix, block.reach)


def facts_of_inputs(seen: Bool[Array, "b s"], chunks: int) -> Facts:
    """The facts of inputs of which every query of a row sees the same ones."""
    slots = jnp.arange(seen.shape[1])
    end = jnp.max(jnp.where(seen, slots + 1, 0), axis=1)
    first = jnp.min(jnp.where(seen, slots, end[:, None]), axis=1)
    hole = jnp.min(jnp.where(~seen & (slots >= first[:, None]), slots, end[:, None]), axis=1)
    return Facts(*(jnp.repeat(x, chunks) for x in (first, end, first, hole)))


def to_rows(q: Float[Array, "b w k g h"], rows: int) -> Float[Array, "b k r h"]:
    """The w g queries of each key head as rows, the group innermost, padded with zeros."""
    b, w, k, g, h = q.shape
    q = jnp.moveaxis(q, 2, 1).reshape(b, k, w * g, h)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - w * g), (0, 0)))


def from_rows(x: Float[Array, "b k r h"], w: int, g: int) -> Float[Array, "b w k g h"]:
    """What `to_rows` has made of q, undone."""
    b, k, _, h = x.shape
    return jnp.moveaxis(x[:, :, : w * g].reshape(b, k, w, g, h), 1, 2)


def words_of(ancestors: Bool[Array, "w w"]) -> Int[Array, "2 w"]:
    """Every token's ancestors as bits, those of the first 32 tokens and those of the others.

    Raises:
      ValueError: more tokens than there are bits.
    """
    width = ancestors.shape[0]
    if width > TREE:
        raise ValueError(f"a tree has at most {TREE} tokens; got {width}")
    bits = jnp.pad(ancestors, ((0, 0), (0, TREE - width))).astype(jnp.uint32)
    words = jnp.sum(bits.reshape(-1, 2, 32) << jnp.arange(32, dtype=jnp.uint32), axis=-1)
    return words.astype(jnp.uint32).view(jnp.int32).T


def columns_of(block: BlockSight, group: int, rows: int) -> Columns:
    """The columns of a block whose tokens take `group` rows each."""
    spread = lambda x: jnp.pad(jnp.repeat(x, group), (0, rows - block.width * group))[:, None]
    order, depth = spread(jnp.arange(block.width)), spread(block.depths().astype(jnp.int32))
    if block.ancestors is None:
        return Columns(order, depth)
    return Columns(order, depth, *(spread(word) for word in words_of(block.ancestors)))


def table_of(
    relative: relatives.Relative, heads: tuple[int, int], rows: int
) -> Float[Array, "k r n"]:
    """The bias of every bucket for the rows of a chunk of every key head; heads is (k, g)."""
    k, g = heads
    table = relative.table.astype(jnp.float32).T.reshape(k, g, -1)
    return jnp.tile(table, (1, -(-rows // g), 1))[:, :rows]


def visible(
    slot: Int[Array, "1 c"],
    stand: Int[Array, "1 c"],
    columns: Columns,
    facts: Facts,
    width: int,
) -> Bool[Array, "r c"]:
    """Which slots each row sees; stand: the slots' positions. facts are those of one row of b."""
    offset = slot - facts.index
    if columns.low is None:
        seen = offset <= columns.order
    else:
        word = jnp.where(offset < 32, columns.low, columns.high)
        bit = jnp.right_shift(word, offset & 31) & 1
        seen = (offset < 0) | ((bit == 1) & (offset < width))
    where = facts.index + columns.depth
    if facts.prefix is not None:
        seen = seen | ((slot < facts.prefix) & (where < facts.prefix))
    if facts.reach is not None:
        behind, ahead = facts.reach
        seen = seen & (stand >= where - behind) & (stand <= where + ahead)
    return seen


def bias_of(
    distance: Int[Array, "r c"],
    table: Float[Array, "k r n"],
    steps: tuple[int, ...],
    both_sides: bool,
) -> Float[Array, "k r c"]:
    """The bias of distances (key position minus query position), bucket by bucket.

    A selection for each step: table holds the numbers of the rows, and none is rounded.
    """
    column = lambda bucket: table[..., bucket : bucket + 1]
    bias = jnp.broadcast_to(column(0), (*table.shape[:-1], distance.shape[-1]))
    for bucket, step in enumerate(steps, start=1):
        bias = jnp.where(distance <= -step, column(bucket), bias)
    for bucket, step in enumerate(steps if both_sides else (), start=len(steps) + 2):
        bias = jnp.where(distance >= step, column(bucket), bias)
    return bias
