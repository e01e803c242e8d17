# SPDX-License-Identifier: Apache-2.0
"""Mask and bias materialized as arrays over all pairs of query and key, for plain XLA."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.backend import mesh_axes, partition_spec
from t5x_lite.kernels.block_diffusion import BlockDiffusionMask
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.relative import PositionBias, RelativePositionBias


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["visible", "distance", "index"],
    meta_fields=["of_rows", "causal", "copies"],
)
@dataclass(frozen=True)
class DenseMask:
    """A mask over all pairs, with the distance of each pair.

    Attributes:
      visible: [b t s] or [b 1 s], True where a query attends to a key.
      distance: query minus key: [t s] of indexes, the same in every row, or [b t s] of positions.
      index: [b], where it is known that the distances of row b are index[b] + i - j; else None.
      of_rows: queries are whole rows of tokens, not a few new ones over a cache.
      causal: queries and keys are the same rows, and no query attends to a later key.
      copies: times that rows hold the same places; the distances repeat.
    """

    visible: Bool[Array, " b #t s"]
    distance: Int[Array, "t s"] | Int[Array, "b t s"]
    index: Int[Array, " b"] | None = None
    of_rows: bool = False
    causal: bool = False
    copies: int = 1

    def with_window(self, window_size: Int[Array, " 2"] | None) -> "DenseMask":
        """Returns the mask without the pairs outside window_size = (left, right)."""
        if window_size is None:
            return self
        left, right = window_size
        near = (self.distance <= left) & (self.distance >= -right)
        return replace(self, visible=self.visible & near)


def materialize_mask(mask: Mask | CacheMask | BlockDiffusionMask) -> DenseMask:
    """Returns the pairs of a mask, computed once for all layers that share it."""
    if isinstance(mask, BlockDiffusionMask):
        pairs, copies = mask.materialize(), 2 if mask.doubled else 1
        return DenseMask(pairs, mask.distance(), of_rows=True, copies=copies)
    if isinstance(mask, Mask):
        aligned = mask.offset is None and mask.query_prefix is None
        causal = mask.causal and aligned and mesh_axes(mask.query_segments)[1] is None
        return DenseMask(mask.materialize(), mask.distance(), None, True, causal)
    distance = mask.query_positions()[:, :, None] - mask.key_positions()[:, None, :]
    is_chain = mask.depth is None and mask.ancestors is None
    return DenseMask(mask.materialize(), distance, mask.index if is_chain else None)


def materialize_bias(bias: PositionBias, mask: DenseMask) -> Float[Array, "#b n t s"]:
    """Returns the bias of every pair, float32.

    Of indexes, and of a chain: one value per head and distance, laid along the diagonals by
    reshaping, since a gather of every pair costs more and its gradient is a scatter. Of the
    positions of a tree: that gather.
    """
    t, s = (size // mask.copies for size in mask.distance.shape[-2:])
    if mask.distance.ndim == 2:
        values = toeplitz_matrix(bias.by_distance(1 - t, t + s), t, s)[None]
        for axis in (2, 3):
            values = jnp.concatenate([values] * mask.copies, axis=axis)
        return values
    if mask.index is not None:
        return toeplitz_matrix(bias_by_row(bias, mask.index, t, s), t, s)
    rows, heads = mesh_axes(mask.distance)[0], mesh_axes(bias.heads)[-1]
    values = bias.at(-mask.distance, partition_spec(rows, None, None, heads))
    return jnp.moveaxis(values, -1, 1)


def bias_by_row(
    bias: PositionBias, index: Int[Array, " b"], t: int, s: int
) -> Float[Array, "b n t+s"]:
    """Returns for each row the bias of distances 1 - t - index[b] and on, which its chain needs.

    A slice of those of all distances, which the decoding loop does not change.

    Args:
      bias: the bias by bucket.
      index: [b], slot of the first new token of a row, from 0 to s.
      t: number of new tokens.
      s: number of slots.
    """
    values = bias.by_distance(1 - t - s, t + 2 * s)
    columns = s - index[:, None] + jnp.arange(t + s)
    sharding = partition_spec(mesh_axes(index)[0], None, mesh_axes(bias.heads)[-1])
    rows = values.T.at[columns].get(mode="clip", out_sharding=sharding)
    return jnp.moveaxis(rows, -1, 1)


def toeplitz_matrix(values: Float[Array, "*b n t+s"], t: int, s: int) -> Float[Array, "*b n t s"]:
    """Returns matrices with one value per diagonal: that of distance j - i at row i, column j.

    Args:
      values: [... t+s], the values of distances 1 - t and on.
      t: number of rows.
      s: number of columns.
    """
    *outer, size = values.shape
    # Row i of [t, size - 1] begins i places earlier than row i - 1.
    rows = jnp.broadcast_to(values[..., None, :], (*outer, t, size))
    rows = rows.reshape(*outer, t * size)[..., t - 1 : t - 1 + t * (size - 1)]
    return rows.reshape(*outer, t, size - 1)[..., :s]


class AttentionSource(NamedTuple):
    """Keys and values, which of them a query attends to, and the bias of their distances.

    Attributes:
      keys: [b k s h], k key heads of size h.
      values: [b k s h].
      mask: a Mask for whole rows, a CacheMask for new tokens over a cache, Bool [b s] for keys
        that every query of a row attends to, a DenseMask for plain XLA.
      bias: the relative position bias; for plain XLA the array of all pairs; None without one.
    """

    keys: Float[Array, "b k s h"]
    values: Float[Array, "b k s h"]
    mask: Mask | CacheMask | DenseMask | Bool[Array, "b s"]
    bias: RelativePositionBias | Float[Array, "#b n t s"] | None = None

    @property
    def row_mask(self) -> Mask:
        """The mask, where whole rows attend."""
        assert isinstance(self.mask, Mask)
        return self.mask

    @property
    def dense_mask(self) -> DenseMask:
        """The mask, for plain XLA."""
        assert isinstance(self.mask, DenseMask)
        return self.mask

    @property
    def relative_bias(self) -> RelativePositionBias | None:
        """The bias, where it is not an array of all pairs."""
        assert self.bias is None or isinstance(self.bias, RelativePositionBias)
        return self.bias
