# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of attention over a cache, for GPUs: the slots of a row are split over programs.

Lowered and interpreted in tests, never run on a GPU. Axes: r rows (the queries of a chunk of
tokens of one key head), c slots of a block, h head size, d distances; r, c and h are powers of two,
as Triton requires, and what is past an array's end is masked.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import tile_math
from t5x_lite.kernels.backend import Backend, output_shape
from t5x_lite.kernels.decode import rows as packed_rows
from t5x_lite.kernels.decode.api import PartialAttention, merge_partials
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.decode.rows import DecodeScalars, RowInfo
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.tile_math import MASK_VALUE

# Triton's products take at least 16 rows.
MIN_ROWS = 16
# Rows, slots of a block and stages of fetching, by the bytes of an element. In float32, multiplied
# exactly outside of tensor cores, 64 by 64 spilled 20 to 36 KB of registers (Triton 3.9, ptxas) and
# heads of 256 took more shared memory than an A100 has.
TILES = {2: (64, 64, 2), 4: (32, 16, 1)}
# Two programs for each of an H100's 132 processors.
PROGRAMS = 264


class TritonDecodeOperands(NamedTuple):
    """Arrays that the kernel reads besides scalars; None where the source lacks them.

    Attributes:
      q: [b w k g h], queries.
      keys: [b k s h].
      values: [b k s h].
      depths: [w], positions of the new tokens minus index.
      ancestors: [2 w], each token's ancestors as bits.
      bias: [n d], by distance from -last_boundary to last_boundary.
      visible: [b s], 1 for inputs that every query of a row attends to.
    """

    q: Any
    keys: Any
    values: Any
    depths: Any = None
    ancestors: Any = None
    bias: Any = None
    visible: Any = None


@dataclass(frozen=True)
class TritonDecodeConfig:
    """Sizes of a kernel call, known before the kernel runs.

    Attributes:
      chunk_tokens: tokens of a chunk.
      rows: rows of a chunk, padded to a power of two.
      block: slots of a block.
      stages: stages of fetching.
      size: head size, padded to a power of two.
      chunks: chunks of a row's tokens.
      splits: programs that share the slots of a chunk.
      softcap: cap of the scores, or None.
      last_boundary: distance from which on the bias no longer changes; 0 without a bias.
    """

    chunk_tokens: int
    rows: int
    block: int
    stages: int
    size: int
    chunks: int
    splits: int
    softcap: float | None
    last_boundary: int


def triton_decode_attention(
    q: Float[Array, "b w k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None,
    backend: Backend,
) -> Float[Array, "b w k g h"]:
    """Softmax attention of new tokens over all sources in one softmax, as on TPU.

    Args:
      q: [b w k g h], queries, already scaled.
      sources: caches, with a CacheMask, and inputs, with Bool [b s].
      softcap: cap of the scores, or None.
      backend: what runs the kernel.

    Raises:
      ValueError: a tree has more than 64 tokens.
    """
    partials = [
        partial for source in sources for partial in split_attention(q, source, softcap, backend)
    ]
    return merge_partials(partials).astype(sources[0].values.dtype)


def split_attention(
    q, source: AttentionSource, softcap: float | None, backend: Backend
) -> list[PartialAttention]:
    """Attention to every split of a source's slots.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
    """
    config = make_config(q, source, softcap)
    scalars, operands = make_operands(q, source, config)
    b, _, k, _, h = q.shape
    leaves = jax.tree.leaves((scalars, operands))
    shape = (config.splits, b, k, config.chunks, config.rows, config.size)
    context, log_z = pl.pallas_call(
        functools.partial(decode_kernel, config),
        grid=(b, k, config.chunks * config.splits),
        out_shape=[
            output_shape(shape, jnp.float32, *leaves),
            output_shape(shape[:-1], jnp.float32, *leaves),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=4 if h <= 128 else 8, num_stages=config.stages
        ),
        interpret=backend.interpret,
        name="block_decode_attention",
    )(scalars, operands)
    log_z = log_z[..., None]
    unpack = functools.partial(unpack_chunks, config=config, shape=q.shape)
    return [
        PartialAttention(unpack(context[i]), unpack(log_z[i])[..., 0]) for i in range(config.splits)
    ]


def unpack_chunks(
    x: Float[Array, "b k c r h"], config: TritonDecodeConfig, shape
) -> Float[Array, "b w k g h"]:
    """Returns rows as queries again, without the padding of chunks and of the head size.

    Args:
      x: [b k c r h], rows of all chunks.
      config: sizes.
      shape: that of the queries.
    """
    b, w, k, g, h = shape
    x = x[:, :, :, : config.chunk_tokens * g, :h]
    return jnp.moveaxis(x.reshape(b, k, -1, g, x.shape[-1])[:, :, :w], 1, 2)


def make_config(q, source: AttentionSource, softcap: float | None) -> TritonDecodeConfig:
    """Returns chunks of rows, and as many splits as keep the card busy.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      softcap: cap of the scores, or None.
    """
    b, w, k, g, h = q.shape
    bias = source.relative_bias
    max_rows, block, stages = TILES[q.dtype.itemsize]
    chunk_tokens = max(1, min(w, max_rows // g))
    chunks = pl.cdiv(w, chunk_tokens)
    blocks = pl.cdiv(source.keys.shape[2], block)
    return TritonDecodeConfig(
        chunk_tokens=chunk_tokens,
        rows=max(MIN_ROWS, pl.next_power_of_2(chunk_tokens * g)),
        block=block,
        stages=stages,
        size=pl.next_power_of_2(h),
        chunks=chunks,
        splits=max(1, min(blocks, PROGRAMS // (b * k * chunks))),
        softcap=softcap,
        last_boundary=0 if bias is None else bias.last_boundary,
    )


def make_operands(
    q, source: AttentionSource, config: TritonDecodeConfig
) -> tuple[DecodeScalars, TritonDecodeOperands]:
    """Returns everything the kernel reads; keys, values and queries as they lie.

    Args:
      q: [b w k g h], queries.
      source: the cache, or inputs.
      config: sizes.
    """
    mask, bias = source.mask, source.relative_bias
    operands = TritonDecodeOperands(q, source.keys, source.values)
    if not isinstance(mask, CacheMask):
        assert isinstance(mask, jax.Array)
        visible = mask.astype(jnp.int32)
        return packed_rows.input_scalars(mask, config.chunks), operands._replace(visible=visible)
    operands = operands._replace(depths=mask.depths().astype(jnp.int32))
    if mask.ancestors is not None:
        operands = operands._replace(ancestors=packed_rows.pack_ancestors(mask.ancestors))
    if bias is not None:
        last = config.last_boundary
        operands = operands._replace(bias=bias.by_distance(-last, 2 * last + 1))
    return packed_rows.cache_scalars(mask, None, config.chunk_tokens), operands


class ProgramRows(NamedTuple):
    """Rows of a program: a chunk of tokens of one key head.

    Attributes:
      batch: row of the batch.
      key_head: key head.
      token: [r], the new token of each row.
      head: [r], the query head of each row among those of the key head.
      exists: [r], False for padding.
      scalars: of the chunk.
    """

    batch: Int[Array, ""]
    key_head: Int[Array, ""]
    token: Int[Array, " r"]
    head: Int[Array, " r"]
    exists: Bool[Array, " r"]
    scalars: DecodeScalars


def decode_kernel(
    config: TritonDecodeConfig,
    scalars: DecodeScalars,
    operands: TritonDecodeOperands,
    context_ref,
    log_z_ref,
):
    """One split of the slots that a chunk of tokens attends to, for one key head of one row of b.

    Args:
      config: sizes.
      scalars: references, of all chunks.
      operands: references to whole arrays.
      context_ref: output, [splits b k c r h].
      log_z_ref: output, [splits b k c r].
    """
    program = pl.program_id(2)
    chunk, split = jax.lax.div(program, config.splits), jax.lax.rem(program, config.splits)
    rows = program_rows(config, operands, scalars, chunk)
    column = jnp.arange(config.size)
    exists = rows.exists[:, None] & (column < operands.q.shape[4])[None, :]
    at = (rows.batch, rows.token[:, None], rows.key_head, rows.head[:, None], column[None, :])
    q = plgpu.load(operands.q.at[at], mask=exists, other=0.0)
    first = jax.lax.div(rows.scalars.first, config.block)
    end = pl.cdiv(rows.scalars.end, config.block)
    split_blocks = pl.cdiv(jnp.maximum(end - first, 0), config.splits)
    begin = first + split * split_blocks
    acc, m, l = jax.lax.fori_loop(
        begin,
        jnp.minimum(begin + split_blocks, end),
        functools.partial(visit_block, config, operands, rows, q),
        (
            jnp.zeros((config.rows, config.size), jnp.float32),
            jnp.full((config.rows,), MASK_VALUE, jnp.float32),
            jnp.zeros((config.rows,), jnp.float32),
        ),
    )
    divisor, log_z = tile_math.finish_softmax(m, l)
    out = (split, rows.batch, rows.key_head, chunk)
    context_ref[out] = acc / divisor[:, None]
    log_z_ref[out] = log_z


def program_rows(
    config: TritonDecodeConfig, operands: TritonDecodeOperands, scalars: DecodeScalars, chunk
) -> ProgramRows:
    """Returns the rows of a chunk: its tokens' queries, the group innermost.

    Args:
      config: sizes.
      operands: for their shapes.
      scalars: references, of all chunks.
      chunk: index of the chunk.
    """
    _, width, _, group, _ = operands.q.shape
    place = jnp.arange(config.rows)
    token = chunk * config.chunk_tokens + jax.lax.div(place, jnp.full_like(place, group))
    exists = (place < config.chunk_tokens * group) & (token < width)
    head = jax.lax.rem(place, jnp.full_like(place, group))
    batch, key_head = pl.program_id(0), pl.program_id(1)
    token = jnp.where(exists, token, 0)
    chunk_scalars = scalars.of_chunk(batch, chunk, config.chunks)
    return ProgramRows(batch, key_head, token, head, exists, chunk_scalars)


def visit_block(
    config: TritonDecodeConfig,
    operands: TritonDecodeOperands,
    rows: ProgramRows,
    q,
    block,
    carry,
):
    """Returns the online softmax (acc, m, l) after one more block of slots.

    Args:
      config: sizes.
      operands: references to whole arrays.
      rows: of this program.
      q: [r h], their queries.
      block: index of the block of slots.
      carry: acc [r h], m [r] and l [r] before it.
    """
    acc, m, l = carry
    slot, column = block * config.block + jnp.arange(config.block), jnp.arange(config.size)
    slots, size = operands.keys.shape[2:]
    exists = (slot < slots)[:, None] & (column < size)[None, :]
    at = (rows.batch, rows.key_head, slot[:, None], column[None, :])
    keys = plgpu.load(operands.keys.at[at], mask=exists, other=0.0)
    scores = tile_math.apply_softcap(tile_math.dot_f32(q, keys.T, (1, 0)), config.softcap)
    visible, bias = visible_and_bias(config, operands, rows, slot)
    scores = jnp.where(visible, scores if bias is None else scores + bias, MASK_VALUE)
    p, alpha, m, l = tile_math.update_softmax(m, l, scores, visible)
    values = plgpu.load(operands.values.at[at], mask=exists, other=0.0)
    acc = acc * alpha[:, None] + tile_math.dot_f32(p.astype(values.dtype), values, (1, 0))
    return acc, m, l


def visible_and_bias(
    config: TritonDecodeConfig, operands: TritonDecodeOperands, rows: ProgramRows, slot
):
    """Returns which slots each row attends to [r c], and their bias [r c] or None.

    Args:
      config: sizes.
      operands: references to whole arrays.
      rows: of this program.
      slot: [c], slots of the block.
    """
    slots, group, scalars = operands.keys.shape[2], operands.q.shape[3], rows.scalars
    exists = (slot < slots)[None, :] & rows.exists[:, None]
    if operands.visible is not None:
        at = operands.visible.at[rows.batch, slot]
        return exists & (plgpu.load(at, mask=slot < slots, other=0) > 0)[None, :], None

    def load_depth(token, inside):
        return plgpu.load(operands.depths.at[token], mask=inside, other=0)

    def load_ancestors(half: int):
        at = operands.ancestors.at[half, rows.token]
        return plgpu.load(at, mask=rows.exists, other=0)[:, None]

    info = RowInfo(rows.token[:, None], load_depth(rows.token, rows.exists)[:, None])
    position, width = slot, operands.q.shape[1]
    if operands.ancestors is not None:
        info = info._replace(ancestors_low=load_ancestors(0), ancestors_high=load_ancestors(1))
        token = slot - scalars.index
        is_token = (token >= 0) & (token < width)
        depth = load_depth(jnp.where(is_token, token, 0), is_token)
        position = jnp.where(is_token, scalars.index + depth, slot)
    visible = exists & packed_rows.visible_slots(
        slot[None, :], position[None, :], info, scalars, width
    )
    if operands.bias is None:
        return visible, None
    distance = position[None, :] - scalars.index - info.depth
    last = config.last_boundary
    column = jnp.clip(distance, -last, last) + last
    head = jnp.broadcast_to((rows.key_head * group + rows.head)[:, None], column.shape)
    return visible, plgpu.load(operands.bias.at[head, column], mask=visible, other=0.0)
