# SPDX-License-Identifier: Apache-2.0
"""Contexts of a transformer's layers: rows of tokens, and decoded blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.kernels import api as kernels
from t5x_lite.model import positions
from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.cache import TokenBlock
from t5x_lite.sharding import spec

# Folded into the key of a stack's dropout for the draw of positions.
POSITION_KEY = (1 << 31) + 1


def draw_positions(
    stack: config.Stack, segments: Int[Array, "b t"], where: Int[Array, "b t"], key
) -> Int[Array, "b t"]:
    """Positions that a stack reads: those of `Stack.random_positions` in training, else where.

    Args:
      stack: architecture.
      segments: [b t] segment ids.
      where: [b t] positions within each segment.
      key: dropout key of the stack; None outside training.
    """
    if stack.random_positions is None or key is None:
        return where
    key = jax.random.fold_in(key, POSITION_KEY)
    return positions.draw_positions(segments, where, stack.random_positions, key)


def block_context(
    block: TokenBlock, slots: int, input_mask: jax.Array | None, backend: kernels.Backend | None
) -> AttentionContext:
    """Context of a decoded block: positions, and masks over the cache and the inputs.

    Args:
      block: tokens, their place in the cache, and their tree if they are one.
      slots: tokens that the cache has room for.
      input_mask: [b s] mask of the inputs; None for a lone decoder.
      backend: of attention.
    """
    width = block.tokens.shape[1]
    mask = kernels.CacheMask(
        block.index, width, slots, block.depth, block.ancestors, prefix=block.prefix
    )
    if input_mask is not None:
        input_mask = kernels.prepare_mask(input_mask, backend)
    where, mask = mask.query_positions(), kernels.prepare_mask(mask, backend)
    return AttentionContext(where, mask, input_mask=input_mask, index=block.index, backend=backend)


def inside_prefix(batch: Batch) -> Bool[Array, "b t"] | None:
    """True for the decoder inputs of a prefix, which is read in both directions; None without one.

    Decoder inputs are shifted right: the query of the first target after the prefix is the prefix's
    last token, and the start token belongs to the prefix.
    """
    if batch.prefix is None:
        return None
    begins = batch.target_positions == 0
    return on_rows(begins | jnp.pad(batch.prefix[:, :-1], ((0, 0), (1, 0))))


def shift_right(
    targets: Int[Array, "b t"], where: Int[Array, "b t"], start: int
) -> Int[Array, "b t"]:
    """Shifts targets right to decoder inputs.

    Args:
      targets: [b t] token ids.
      where: [b t] positions; 0 at the beginning of an example.
      start: id of the start token, the input at position 0.
    """
    return jnp.where(where == 0, start, jnp.pad(targets[:, :-1], ((0, 0), (1, 0))))


def on_rows(rows):
    """Places rows [b ...] with the batch axis sharded, or the fields of a TokenBlock.

    depth and ancestors of a block have no batch axis and stay replicated.
    """
    if rows is None:
        return None
    if isinstance(rows, TokenBlock):
        fields = ("tokens", "index", "prefix")
        return rows._replace(**{name: on_rows(getattr(rows, name)) for name in fields})
    return jax.reshard(rows, spec("batch" + " length" * (rows.ndim - 1)))
