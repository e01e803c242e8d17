# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache for GPUs, as a Triton kernel: the slots of a row split over programs.

Lowered and interpreted in tests; it has not run on a GPU. In the kernel: r rows (the queries of a
chunk of tokens of one key head), c slots of a block, h head size; r, c and h are powers of two, as
Triton wants them, and what is past an array's end is masked.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import block_rows, tiles
from t5x_lite.kernels.block_decode_attention import Part, merged
from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.reference import HIDDEN
from t5x_lite.kernels.source import Source

# Triton's products take at least 16 rows.
FEWEST_ROWS = 16
# Rows, slots of a block and stages of fetching, by the bytes of a number. In float32, multiplied
# exactly outside of tensor cores, 64 by 64 spilled 20 to 36 KB of registers (Triton 3.9, ptxas) and
# heads of 256 took more shared memory than an A100 has.
TILES = {2: (64, 64, 2), 4: (32, 16, 1)}
# Two programs for each of an H100's 132 processors.
PROGRAMS = 264


class Operands(NamedTuple):
    """What the kernel reads beside facts; None where the source has no such thing."""

    q: Float[Array, "b w k g h"]
    keys: Float[Array, "b k s h"]
    values: Float[Array, "b k s h"]
    depths: Int[Array, " w"] | None = None
    words: Int[Array, "2 w"] | None = None
    bias: Float[Array, "n d"] | None = None
    seen: Int[Array, "b s"] | None = None


@dataclass(frozen=True)
class Plan:
    """What is known before the kernel runs."""

    span: int
    rows: int
    block: int
    stages: int
    size: int
    chunks: int
    splits: int
    softcap: float | None
    farthest: int


def attend(
    q: Float[Array, "b w k g h"], sources: tuple[Source, ...], softcap: float | None, how: tiles.How
) -> Float[Array, "b w k g h"]:
    """Softmax attention of a block over all sources in one softmax, as on TPU.

    Raises:
      ValueError: a tree has more than 64 tokens.
    """
    parts = [part for source in sources for part in parts_of(q, source, softcap, how)]
    return merged(parts).astype(sources[0].values.dtype)


def parts_of(q, source: Source, softcap: float | None, how: tiles.How) -> list[Part]:
    """Attention to every split of a source's slots."""
    plan = planned(q, source, softcap)
    facts, operands = operands_of(q, source, plan)
    b, _, k, _, h = q.shape
    leaves = jax.tree.leaves((facts, operands))
    shape = (plan.splits, b, k, plan.chunks, plan.rows, plan.size)
    context, log_z = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(b, k, plan.chunks * plan.splits),
        out_shape=[
            tiles.like(shape, jnp.float32, *leaves),
            tiles.like(shape[:-1], jnp.float32, *leaves),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=4 if h <= 128 else 8, num_stages=plan.stages
        ),
        interpret=how.interpret,
        name="block_decode_attention",
    )(facts, operands)
    log_z = log_z[..., None]
    unfold = lambda x: unfolded(x, plan, q.shape)
    return [Part(unfold(context[i]), unfold(log_z[i])[..., 0]) for i in range(plan.splits)]


def unfolded(x: Float[Array, "b k c r h"], plan: Plan, shape) -> Float[Array, "b w k g h"]:
    """The queries' numbers among rows that are padded in every chunk, and to a power of two."""
    b, w, k, g, h = shape
    x = x[:, :, :, : plan.span * g, :h]
    return jnp.moveaxis(x.reshape(b, k, -1, g, x.shape[-1])[:, :, :w], 1, 2)


def planned(q, source: Source, softcap: float | None) -> Plan:
    """Chunks of rows, and as many splits as keep the card busy."""
    b, w, k, g, h = q.shape
    most, block, stages = TILES[q.dtype.itemsize]
    span = max(1, min(w, most // g))
    chunks = pl.cdiv(w, span)
    rows = max(FEWEST_ROWS, pl.next_power_of_2(span * g))
    blocks = pl.cdiv(source.keys.shape[2], block)
    splits = max(1, min(blocks, PROGRAMS // (b * k * chunks)))
    farthest = 0 if source.relative is None else source.relative.farthest
    size = pl.next_power_of_2(h)
    return Plan(span, rows, block, stages, size, chunks, splits, softcap, farthest)


def operands_of(q, source: Source, plan: Plan) -> tuple[block_rows.Facts, Operands]:
    """Everything the kernel reads; keys, values and queries as they lie."""
    sight, relative = source.sight, source.relative
    arrays = (q, source.keys, source.values)
    if not isinstance(sight, BlockSight):
        seen = sight.astype(jnp.int32)
        return block_rows.facts_of_inputs(sight, plan.chunks), Operands(*arrays, seen=seen)
    tree = sight.ancestors is not None
    return block_rows.facts_of_block(sight, None, plan.span), Operands(
        *arrays,
        depths=sight.depths().astype(jnp.int32),
        words=block_rows.words_of(sight.ancestors) if tree else None,
        bias=relative and relative.by_distance(-plan.farthest, 2 * plan.farthest + 1),
    )


class Rows(NamedTuple):
    """Which row of the batch and key head a program has, and which query each of its rows is."""

    batch: Int[Array, ""]
    key_head: Int[Array, ""]
    token: Int[Array, " r"]
    head: Int[Array, " r"]
    real: Bool[Array, " r"]


def kernel(plan: Plan, facts: block_rows.Facts, operands: Operands, context_ref, log_z_ref):
    """One split of the slots that a chunk of tokens sees, for one key head of one row of b."""
    program = pl.program_id(2)
    chunk, split = jax.lax.div(program, plan.splits), jax.lax.rem(program, plan.splits)
    rows = rows_of(plan, operands, chunk)
    here = block_rows.facts_of(facts, rows.batch, chunk, plan.chunks)
    column = jnp.arange(plan.size)
    exists = rows.real[:, None] & (column < operands.q.shape[4])[None, :]
    at = (rows.batch, rows.token[:, None], rows.key_head, rows.head[:, None], column[None, :])
    q = plgpu.load(operands.q.at[at], mask=exists, other=0.0)
    first, last = jax.lax.div(here.first, plan.block), pl.cdiv(here.end, plan.block)
    each = pl.cdiv(jnp.maximum(last - first, 0), plan.splits)
    begin = first + split * each
    look = functools.partial(step, plan, operands, here, rows, q)
    context, peak, total = jax.lax.fori_loop(
        begin,
        jnp.minimum(begin + each, last),
        look,
        (
            jnp.zeros((plan.rows, plan.size), jnp.float32),
            jnp.full((plan.rows,), HIDDEN, jnp.float32),
            jnp.zeros((plan.rows,), jnp.float32),
        ),
    )
    whole = jnp.where(total > 0, total, 1.0)
    to = (split, rows.batch, rows.key_head, chunk)
    context_ref[to] = context / whole[:, None]
    log_z_ref[to] = jnp.where(total > 0, peak + jnp.log(whole), HIDDEN)


def rows_of(plan: Plan, operands: Operands, chunk) -> Rows:
    """The rows of a chunk: its tokens' queries, the group innermost."""
    _, width, _, group, _ = operands.q.shape
    place = jnp.arange(plan.rows)
    token = chunk * plan.span + jax.lax.div(place, jnp.full_like(place, group))
    real = (place < plan.span * group) & (token < width)
    head = jax.lax.rem(place, jnp.full_like(place, group))
    return Rows(pl.program_id(0), pl.program_id(1), jnp.where(real, token, 0), head, real)


def step(plan: Plan, operands: Operands, here, rows: Rows, q, block, carry):
    """The online softmax after one more block of slots."""
    context, peak, total = carry
    slot, column = block * plan.block + jnp.arange(plan.block), jnp.arange(plan.size)
    slots, size = operands.keys.shape[2:]
    exists = (slot < slots)[:, None] & (column < size)[None, :]
    at = (rows.batch, rows.key_head, slot[:, None], column[None, :])
    keys = plgpu.load(operands.keys.at[at], mask=exists, other=0.0)
    scores = product(q, keys.T)
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores / plan.softcap)
    seen, bias = seen_and_bias(plan, operands, here, rows, slot)
    scores = jnp.where(seen, scores if bias is None else scores + bias, HIDDEN)
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    shares = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
    shrink = jnp.exp(peak - higher)
    values = plgpu.load(operands.values.at[at], mask=exists, other=0.0)
    context = context * shrink[:, None] + product(shares.astype(values.dtype), values)
    return context, higher, total * shrink + jnp.sum(shares, axis=1)


def product(x, y):
    """x y, float32; of float32 operands exactly, not as TF32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    over = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, y, over, precision=exact, preferred_element_type=jnp.float32)


def seen_and_bias(plan: Plan, operands: Operands, here, rows: Rows, slot):
    """Which slots each row sees [r c], and their bias [r c] or None."""
    slots, group = operands.keys.shape[2], operands.q.shape[3]
    exists = (slot < slots)[None, :] & rows.real[:, None]
    if operands.seen is not None:
        at = operands.seen.at[rows.batch, slot]
        return exists & (plgpu.load(at, mask=slot < slots, other=0) > 0)[None, :], None
    depth = lambda token, real: plgpu.load(operands.depths.at[token], mask=real, other=0)
    columns = block_rows.Columns(rows.token[:, None], depth(rows.token, rows.real)[:, None])
    stand, width = slot, operands.q.shape[1]
    if operands.words is not None:
        word = lambda half: plgpu.load(operands.words.at[half, rows.token], mask=rows.real, other=0)
        columns = columns._replace(low=word(0)[:, None], high=word(1)[:, None])
        token = slot - here.index
        inside = (token >= 0) & (token < width)
        deep = depth(jnp.where(inside, token, 0), inside)
        stand = jnp.where(inside, here.index + deep, slot)
    seen = exists & block_rows.visible(slot[None, :], stand[None, :], columns, here, width)
    if operands.bias is None:
        return seen, None
    distance = stand[None, :] - here.index - columns.depth
    near = jnp.clip(distance, -plan.farthest, plan.farthest) + plan.farthest
    head = jnp.broadcast_to((rows.key_head * group + rows.head)[:, None], near.shape)
    return seen, plgpu.load(operands.bias.at[head, near], mask=seen, other=0.0)
