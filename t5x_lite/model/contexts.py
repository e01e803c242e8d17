# SPDX-License-Identifier: Apache-2.0
"""Contexts of a transformer's layers: rows of tokens, and decoded blocks."""

from typing import NamedTuple

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


class Chunks(NamedTuple):
    """Parts of texts, which an encoder reads in place of whole ones.

    Attributes:
      segments: [b s] segment ids, another one for each chunk.
      where: [b s] positions, from 0 in each chunk.
      span: tokens of a chunk, for the mask; None where texts are whole.
    """

    segments: jax.Array
    where: jax.Array
    span: int | None = None


def split_chunks(stack: config.Stack, segments: jax.Array, where: jax.Array) -> Chunks:
    """Segments and positions of an encoder's chunks; those of texts if rows have but one.

    Args:
      stack: architecture of the encoder.
      segments: [b s] segment ids, which rise along a row; 0 is padding.
      where: [b s] positions within each segment.
    """
    chunk, length = stack.chunk, segments.shape[1]
    if chunk is None or chunk >= length:
        return Chunks(segments, where)
    count = -(-length // chunk)
    numbered = jnp.where(segments > 0, segments * count + where // chunk, 0)
    # The vectors of a bias are looked up for all pairs.
    return Chunks(numbered, where % chunk, None if stack.bias_vectors else chunk)


def rotate_cross(
    context: AttentionContext,
    stack: config.Stack,
    targets: tuple[jax.Array, jax.Array],
    inputs: tuple[jax.Array, jax.Array],
) -> AttentionContext:
    """Context with the positions by which cross-attention rotates, if it does: those of targets are
    counted on from the inputs of their segment.

    Args:
      context: of the decoder's layers.
      stack: architecture of the decoder.
      targets: segment ids [b t] of the targets, and their positions.
      inputs: segment ids [b s] of the inputs, and their positions.
    """
    if not stack.cross_rotary or context.encoded is None:
        return context
    (segments, where), (input_segments, encoded_where) = map(on_rows, targets), map(on_rows, inputs)
    same = segments[:, :, None] == input_segments[:, None, :]
    cross_where = where + jnp.sum(same, axis=-1)
    return context._replace(cross_where=cross_where, encoded_where=encoded_where)


def block_context(
    block: TokenBlock,
    input_mask: jax.Array | None,
    backend: kernels.Backend | None,
    cross_rotary: bool = False,
) -> AttentionContext:
    """Context of a decoded block: positions, and the mask over the inputs.

    That over the cache, which depends on its store, is added by the stack.

    Args:
      block: tokens, their place in the cache, and their tree if they are one.
      input_mask: [b s] mask of the inputs; None for a lone decoder.
      backend: of attention.
      cross_rotary: cross-attention rotates its queries.
    """
    depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
    where = block.index[:, None] + depth
    context = AttentionContext(where, None, block=block, backend=backend)
    if input_mask is None:
        return context
    if cross_rotary:
        context = context._replace(cross_where=where + jnp.sum(input_mask, axis=1)[:, None])
    return context._replace(input_mask=kernels.prepare_mask(input_mask, backend))


class DecoderRows(NamedTuple):
    """Rows as a decoder reads them.

    Attributes:
      tokens: [b t] token ids; [b 2t] where masked rows are followed by the same ones without masks.
      segments: segment ids of the tokens.
      where: positions of the tokens in their segments.
      mask: which tokens attend to which.
    """

    tokens: jax.Array
    segments: jax.Array
    where: jax.Array
    mask: kernels.Mask | kernels.BlockDiffusionMask


def decoder_rows(cfg: config.Model, batch: Batch) -> DecoderRows:
    """Decoder inputs for the targets of a batch."""
    segments, where = on_rows(batch.target_segments), on_rows(batch.target_positions)
    start = cfg.decoder_start_token_id
    if batch.canvas is not None:
        return canvas_rows(cfg, batch, segments, where)
    of_encoder = cfg.layout == "decoder_only" and not cfg.causal_decoder
    read = batch.inputs if of_encoder else batch.targets
    tokens = shift_right(read, batch.target_positions, start)
    inside = inside_prefix(batch) if cfg.prefix_lm else None
    mask = kernels.Mask(segments, segments, cfg.causal_decoder, inside, inside)
    return DecoderRows(on_rows(tokens), segments, where, mask)


def canvas_rows(
    cfg: config.Model, batch: Batch, segments: jax.Array, where: jax.Array
) -> DecoderRows:
    """Decoder inputs for targets in masked blocks, and the same without masks behind them where a
    row has several blocks.

    Args:
      cfg: config of the model.
      batch: its `canvas` and targets.
      segments: [b t] segment ids of the targets.
      where: [b t] positions of the targets.
    """
    assert cfg.canvas is not None and batch.canvas is not None
    start, blocks = cfg.decoder_start_token_id, on_rows(batch.canvas.blocks)
    clean = shift_right(on_rows(batch.targets), where, start)
    masked = shift_right(on_rows(batch.canvas.tokens), where, start)
    # The first input of a block is the last token of the block before it, which is written.
    masked = jnp.where(shift_right(blocks, where, 0) == blocks, masked, clean)
    doubled = cfg.canvas.doubles_rows(blocks.shape[1])
    mask = kernels.BlockDiffusionMask(segments, blocks, doubled)
    if not doubled:
        return DecoderRows(masked, segments, where, mask)
    tokens = jnp.concatenate([masked, clean], axis=1)
    segments, where = (jnp.concatenate([x, x], axis=1) for x in (segments, where))
    return DecoderRows(tokens, segments, where, mask)


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
