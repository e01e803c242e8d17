# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA within a span of tokens, in blocks of it: linear in the length of rows.

A block of queries needs the keys of its own block and of both neighbors, if no query attends to a
key that is a span or more places away.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import dense_mask
from t5x_lite.kernels.backend import mesh_axes, partition_spec
from t5x_lite.kernels.dense_mask import AttentionSource, DenseMask
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.relative import PositionBias


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["span", "length"]
)
@dataclass(frozen=True)
class LocalMask:
    """A mask over the pairs of each block of queries and its three blocks of keys.

    Attributes:
      blocks: mask of rows [b*m], m blocks of each row; t is span, s three times that.
      span: tokens of a block.
      length: tokens of a row.
    """

    blocks: DenseMask
    span: int
    length: int

    def with_window(self, window_size: Int[Array, " 2"] | None) -> "LocalMask":
        """Returns the mask without the pairs outside window_size = (left, right)."""
        return replace(self, blocks=self.blocks.with_window(window_size))


def saves_work(mask: Mask) -> bool:
    """True if a mask has a span and its blocks have fewer pairs than whole rows.

    Rows that are split over devices along their length are left whole.
    """
    whole = mesh_axes(mask.query_segments)[1] is None and mask.query_prefix is None
    return mask.span is not None and whole and 3 * mask.span < mask.query_segments.shape[1]


def make_local_mask(mask: Mask) -> LocalMask:
    """Returns the pairs of a mask that has a span, by blocks."""
    assert mask.span is not None
    span, length = mask.span, mask.query_segments.shape[1]
    blocks = Mask(
        split_rows(mask.query_segments, 1, span),
        with_neighbors(mask.key_segments, 1, span),
        causal=mask.causal,
        offset=jnp.asarray(span),
    )
    return LocalMask(dense_mask.materialize_mask(blocks), span, length)


def make_local_bias(bias: PositionBias, mask: LocalMask) -> Float[Array, "1 n t s"]:
    """Returns the bias of the pairs of every block, float32: the same in all blocks."""
    span = mask.span
    return dense_mask.toeplitz_matrix(bias.by_distance(1 - 2 * span, 4 * span), span, 3 * span)[
        None
    ]


def split_source(
    q: Float[Array, "b t k g h"], source: AttentionSource
) -> tuple[Float[Array, "b t k g h"], AttentionSource]:
    """Returns queries and keys with a row for each block, and the mask of those rows."""
    mask = source.mask
    assert isinstance(mask, LocalMask)
    keys, values = (with_neighbors(each, 2, mask.span) for each in source[:2])
    blocks = AttentionSource(keys, values, mask.blocks, source.bias)
    return split_rows(q, 1, mask.span), blocks


def join_rows(y: Float[Array, "b t k g h"], mask: LocalMask) -> Float[Array, "b t k g h"]:
    """Returns rows of which split_rows made blocks, without the padding of their last one."""
    count = -(-mask.length // mask.span)
    rows, *axes = mesh_axes(y)
    shape = (y.shape[0] // count, count * mask.span, *y.shape[2:])
    return jnp.reshape(y, shape, out_sharding=partition_spec(rows, *axes))[:, : mask.length]


def split_rows(x: jax.Array, axis: int, span: int) -> jax.Array:
    """Returns x [b ... t ...] as blocks [b*m ... span ...], the last one padded with zeros.

    Args:
      x: array, rows first.
      axis: of the tokens.
      span: tokens of a block.
    """
    return merge_blocks(make_blocks(x, axis, span))


def with_neighbors(x: jax.Array, axis: int, span: int) -> jax.Array:
    """Returns x [b ... s ...] as blocks with those beside them [b*m ... 3*span ...].

    Args:
      x: array, rows first.
      axis: of the tokens.
      span: tokens of a block.
    """
    blocks = make_blocks(x, axis, span)
    padded = jnp.pad(blocks, [(0, 0), (1, 1)] + [(0, 0)] * (blocks.ndim - 2))
    count = blocks.shape[1]
    three = [padded[:, start : start + count] for start in range(3)]
    return merge_blocks(jnp.concatenate(three, axis=axis + 1))


def make_blocks(x: jax.Array, axis: int, span: int) -> jax.Array:
    """Returns x [b ... t ...] as [b m ... span ...].

    Args:
      x: rows.
      axis: axis of the positions.
      span: positions of a block.
    """
    length = x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % span)
    x = jnp.pad(x, widths)
    names = list(mesh_axes(x))
    shape = (*x.shape[:axis], x.shape[axis] // span, span, *x.shape[axis + 1 :])
    placed = partition_spec(*names[:axis], None, *names[axis:])
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=placed), axis, 1)


def merge_blocks(x: jax.Array) -> jax.Array:
    """Returns x [b m ...] as [b*m ...]."""
    rows, _, *rest = mesh_axes(x)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.reshape(x, shape, out_sharding=partition_spec(rows, *rest))
