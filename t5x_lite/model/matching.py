# SPDX-License-Identifier: Apache-2.0
"""Matching: a classifier that reads two texts as one row, and tells whether they belong together.

b batch    s position of the first text    t of the second    j = s + t of the row of both
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.model.contexts import on_rows
from t5x_lite.model.layers import split
from t5x_lite.sharding import by_rows


class TextRows(NamedTuple):
    """Texts, one in a row.

    Attributes:
      ids: [b s] int32 token ids.
      segments: [b s] int32, 1 for tokens and 0 for padding.
      positions: [b s] int32 positions.
    """

    ids: Any
    segments: Any
    positions: Any

    @property
    def exists(self) -> Bool[Array, " b"]:
        """True for rows that have a text."""
        return jnp.any(self.segments > 0, axis=1)


def make_rows(ids: Int[Array, "b s"], length: Int[Array, " b"]) -> TextRows:
    """Returns rows of ids that are padded at the end.

    Args:
      ids: token ids.
      length: number of ids of each row that exist.
    """
    position = jnp.arange(ids.shape[1])
    exists = position < length[:, None]
    return TextRows(ids, exists.astype(jnp.int32), jnp.where(exists, position, 0))


def join_texts(first: TextRows, second: TextRows) -> TextRows:
    """Rows of one text after the other, without padding between them."""
    first, second = by_rows((first, second))
    lengths = [jnp.sum(rows.segments > 0, axis=1)[:, None] for rows in (first, second)]
    place = jnp.arange(first.ids.shape[1] + second.ids.shape[1])[None]
    ids = jnp.concatenate([first.ids, second.ids], axis=1)
    after = place - lengths[0] + first.ids.shape[1]
    index = jnp.where(place < lengths[0], place, jnp.minimum(after, ids.shape[1] - 1))
    exists = place < lengths[0] + lengths[1]
    ids = jnp.where(exists, jnp.take_along_axis(ids, index, axis=1), 0)
    return TextRows(ids, exists.astype(jnp.int32), jnp.where(exists, place, 0))


def match_logits(
    transformer, first: TextRows, second: TextRows, key: jax.Array | None = None
) -> Float[Array, "b 2"]:
    """Logits of "apart" and "together" for pairs of texts, float32.

    Args:
      transformer: a bound `Transformer`.
      first: texts, such as queries.
      second: as many texts, such as documents.
      key: dropout key; None for no dropout.
    """
    return match_rows(transformer, join_texts(first, second), key)


def match_rows(transformer, rows: TextRows, key: jax.Array | None = None) -> Float[Array, "b 2"]:
    """Logits of "apart" and "together" for rows of two texts each, float32.

    A row is pooled as the vectors are (Readout.pooling); `Readout.matching` has the weights of the
    classifier.

    Args:
      transformer: a bound `Transformer`.
      rows: the second text of each row follows its first.
      key: dropout key; None for no dropout.
    """
    state_key, head_key = split(key, 2)
    states = transformer.input_states(*rows, state_key)
    segments: Int[Array, "b j"] = on_rows(rows.segments)
    return transformer.readout_head.match(states, segments, head_key)
