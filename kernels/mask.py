# SPDX-License-Identifier: Apache-2.0
"""Attention masks as a few integers per token: linear in length, never an array of pairs."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_lite.utils.not_none import not_none


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_segments",
        "key_segments",
        "query_prefix",
        "key_prefix",
        "window_size",
        "offset",
    ],
    meta_fields=["causal", "span"],
)
@dataclass(frozen=True)
class Mask:
    """Mask of whole rows: queries attend to keys of their segment, causally and in a window.

    Causality and windows are meant for queries and keys of one row; over another text
    (cross-attention) only segments count. With t = s = 4 and no padding (x: attends):

        causal=True      causal, prefix of 2    window_size=(1, 1)    segments 1 1 2 2
        x . . .          x x . .                x x . .               x x . .
        x x . .          x x . .                x x x .               x x . .
        x x x .          x x x .                . x x x               . . x x
        x x x x          x x x x                . . x x               . . x x

    Attributes:
      query_segments: [b t], the text of each query, numbered from 1 on along a row; 0 is padding,
        which attends to nothing.
      key_segments: [b s], the text of each key; 0 is padding, to which nothing attends.
      causal: no query attends to a later key, unless both are in the prefix.
      query_prefix: [b t], True for queries inside the prefix; None without a prefix.
      key_prefix: [b s], True for keys inside the prefix; None without a prefix.
      window_size: (left, right): a query attends to a key only if
        -right <= query index - key index <= left, inside a prefix too; None is no window.
      offset: index among the keys of the first query; None is 0. Key j has index j.
      span: of queries and keys of one row: segments are such that no query attends to a key so
        many places away, or more; plain XLA then computes fewer pairs. None promises nothing.
    """

    query_segments: Int[Array, "b t"]
    key_segments: Int[Array, "b s"]
    causal: bool = False
    query_prefix: Bool[Array, "b t"] | None = None
    key_prefix: Bool[Array, "b s"] | None = None
    window_size: Int[Array, " 2"] | None = None
    offset: Int[Array, ""] | None = None
    span: int | None = None

    def materialize(self) -> Bool[Array, "b t s"]:
        """Returns the mask as an array over all pairs, True where a query attends to a key."""
        keys = self.key_segments[:, None, :]
        visible = (self.query_segments[:, :, None] == keys) & (keys > 0)
        distance = self.distance()
        if self.causal:
            past = distance >= 0
            if self.query_prefix is not None:
                past = past | (
                    self.query_prefix[:, :, None] & not_none(self.key_prefix)[:, None, :]
                )
            visible = visible & past
        if self.window_size is not None:
            left, right = self.window_size
            visible = visible & (distance <= left) & (distance >= -right)
        return visible

    def distance(self) -> Int[Array, "t s"]:
        """Returns query index minus key index of every pair."""
        queries = jnp.arange(self.query_segments.shape[1])
        if self.offset is not None:
            queries = queries + self.offset
        return queries[:, None] - jnp.arange(self.key_segments.shape[1])[None, :]

    def index_scalars(self) -> tuple:
        """Returns offset, window to the left and to the right, as kernels take them: 0 for None."""
        window = (0, 0) if self.window_size is None else self.window_size
        return (0 if self.offset is None else self.offset, *window)

    def with_window(self, window_size: Int[Array, " 2"] | None) -> "Mask":
        """Returns the same mask with another window."""
        return replace(self, window_size=window_size)

    def with_offset(self, count: Int[Array, ""]) -> "Mask":
        """Returns the same mask for queries that are `count` places later among the keys."""
        return replace(self, offset=count if self.offset is None else self.offset + count)
