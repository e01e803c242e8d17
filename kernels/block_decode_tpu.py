# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of attention over a cache.

In it: b batch, k key heads, r rows (w g queries of a key head), c slots of one block, h head size,
n buckets of the relative bias.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import block_rows, tiles
from t5x_lite.kernels.block_plan import Plan, planned
from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.reference import HIDDEN
from t5x_lite.kernels.source import Source


class Operands(NamedTuple):
    """What a kernel reads as arrays, in blocks; None where the source has no such thing."""

    q: Float[Array, "b k r h"]
    keys: Float[Array, "b k s h"] | Float[Array, "b k h s"]
    values: Float[Array, "b k s h"] | Float[Array, "b k h s"]
    columns: block_rows.Columns | None
    depths: Int[Array, "1 c"] | None
    table: Float[Array, "k r n"] | None
    seen: Int[Array, "b 1 s"] | None


def operands_of(q, source: Source, plan: Plan) -> tuple[block_rows.Facts, Operands]:
    """Everything a kernel reads."""
    turn = lambda x: jnp.swapaxes(x, 2, 3) if plan.turned else x
    queries = block_rows.to_rows(q, plan.chunks * plan.rows)
    arrays = (queries, turn(source.keys), turn(source.values))
    sight, relative = source.sight, source.relative
    if not isinstance(sight, BlockSight):
        facts = block_rows.facts_of_inputs(sight, plan.chunks)
        return facts, Operands(*arrays, None, None, None, sight.astype(jnp.int32)[:, None, :])
    facts = block_rows.facts_of_block(sight, relative and relative.farthest, plan.span)
    columns = block_rows.columns_of(sight, q.shape[3], plan.chunks * plan.rows)
    depths, table = None, None
    if sight.ancestors is not None:
        # Turned to where the block stands in a kernel's slots; at least 128, so it cannot wrap.
        depths = jnp.pad(sight.depths().astype(jnp.int32), (0, plan.block - plan.width))[None]
    if relative is not None:
        table = block_rows.table_of(relative, q.shape[2:4], plan.rows)
    return facts, Operands(*arrays, columns, depths, table, None)


def call(q, source: Source, softcap: float | None, how: tiles.How, parts: bool):
    """The context [b k r h] and, with parts, log_z [b k r 1]."""
    plan = planned(q, source, softcap)
    facts, operands = operands_of(q, source, plan)
    shape = operands.q.shape
    like = lambda size, kind: tiles.like(
        (*shape[:3], size), kind, *jax.tree.leaves((facts, operands))
    )
    results = [like(shape[3], jnp.float32 if parts else source.values.dtype)]
    if parts:
        results.append(like(1, jnp.float32))
    steps = most_blocks(facts, plan)
    made = pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape[0], shape[1] // plan.heads, plan.chunks, steps),
            in_specs=(block_specs(operands, plan),),
            out_specs=[row_spec(plan, result.shape[3]) for result in results],
            scratch_shapes=[
                pltpu.VMEM((plan.heads, plan.rows, size), jnp.float32) for size in (shape[3], 1, 1)
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost(operands),
        interpret=how.interpret,
        name="block_decode_attention",
    )(facts, operands)
    return made if parts else (*made, None)


def most_blocks(facts: block_rows.Facts, plan: Plan) -> Int[Array, ""]:
    """How many blocks the chunk that visits most of them does; at least one, which ends it."""
    blocks = pl.cdiv(facts.end, plan.block) - facts.first // plan.block
    return jnp.maximum(jnp.max(blocks), 1)


def cost(operands: Operands) -> pl.CostEstimate:
    """Of caches that are full: their lengths are not known before the kernel runs."""
    r, h = operands.q.shape[2:]
    pairs = operands.keys.size // h * r
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
    written = operands.q.size * operands.q.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * pairs * h, transcendentals=pairs, bytes_accessed=read + written
    )


def row_spec(plan: Plan, size: int) -> pl.BlockSpec:
    """One chunk of rows of a few key heads of one row of the batch."""
    return pl.BlockSpec(
        (None, plan.heads, plan.rows, size),
        lambda row, head, chunk, step, facts: (row, head, chunk, 0),
    )


def block_specs(operands: Operands, plan: Plan) -> Operands:
    """Which blocks of the operands a grid step reads: of the slots none that nobody sees."""

    def block(row, chunk, step, facts):
        # Past the last one the same block again: what is there already is not fetched.
        at = row * plan.chunks + chunk
        wanted = jax.lax.div(facts.first[at], plan.block) + step
        return jnp.maximum(jnp.minimum(wanted, pl.cdiv(facts.end[at], plan.block) - 1), 0)

    def slots(row, head, chunk, step, facts):
        at = block(row, chunk, step, facts)
        return (row, head, 0, at) if plan.turned else (row, head, at, 0)

    tile = (plan.block, operands.q.shape[3])
    cache = pl.BlockSpec((None, plan.heads, *(tile[::-1] if plan.turned else tile)), slots)
    by_chunk = pl.BlockSpec((plan.rows, 1), lambda row, head, chunk, *_: (chunk, 0))
    of_heads = lambda x: pl.BlockSpec(
        (plan.heads, *x.shape[1:]), lambda row, head, *_: (head, 0, 0)
    )
    inputs = pl.BlockSpec(
        (None, 1, plan.block),
        lambda row, head, chunk, step, facts: (row, 0, block(row, chunk, step, facts)),
    )
    return Operands(
        q=row_spec(plan, operands.q.shape[3]),
        keys=cache,
        values=cache,
        columns=jax.tree.map(lambda _: by_chunk, operands.columns),
        depths=jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0, 0)), operands.depths),
        table=jax.tree.map(of_heads, operands.table),
        seen=jax.tree.map(lambda _: inputs, operands.seen),
    )


class State(NamedTuple):
    """What is carried from block to block of slots: the online softmax (float32, in VMEM)."""

    context: Float[Array, "k r h"]
    peak: Float[Array, "k r 1"]
    total: Float[Array, "k r 1"]


def kernel(plan: Plan, facts: block_rows.Facts, operands: Operands, *refs):
    """One block of slots for one chunk of rows of a few key heads of one row of the batch."""
    outputs, state = refs[:-3], State(*refs[-3:])
    step = pl.program_id(3)
    here = block_rows.facts_of(facts, pl.program_id(0), pl.program_id(2), plan.chunks)
    block = jax.lax.div(here.first, plan.block) + step
    begin = block * plan.block
    visited = block < pl.cdiv(here.end, plan.block)
    clear = (begin >= here.clear) & (begin + plan.block <= here.unclear)

    @pl.when(step == 0)
    def _():
        state.context[...] = jnp.zeros_like(state.context)
        state.peak[...] = jnp.full_like(state.peak, HIDDEN)
        state.total[...] = jnp.zeros_like(state.total)

    @pl.when(visited & clear)
    def _():
        scores = scores_of(operands, plan)
        if plan.steps is not None:
            far = len(plan.steps)
            scores = scores + operands.table[...][..., far : far + 1]
        add(state, scores, None, operands.values[...], plan)

    @pl.when(visited & ~clear)
    def _():
        seen, bias = seen_and_bias(plan, operands, here, begin)
        scores = scores_of(operands, plan)
        scores = jnp.where(seen[None], scores if bias is None else scores + bias, HIDDEN)
        add(state, scores, seen[None], existing(operands.values[...], begin, plan), plan)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        finish(state, outputs)


def product(x, y, axis: int):
    """The products of every key head along x's last axis and y's `axis`, float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    over = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, over, precision=exact, preferred_element_type=jnp.float32)


def scores_of(operands: Operands, plan: Plan) -> Float[Array, "k r c"]:
    """The scores of a block, before bias and mask."""
    scores = product(operands.q[...], operands.keys[...], 1 if plan.turned else 2)
    return scores if plan.softcap is None else plan.softcap * jnp.tanh(scores / plan.softcap)


def seen_and_bias(plan: Plan, operands: Operands, here: block_rows.Facts, begin):
    """Which of the slots from begin on each row sees [r c], and their bias [k r c] or None."""
    slot = begin + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.block), 1)
    if operands.seen is not None:
        seen = jnp.broadcast_to(operands.seen[...], slot.shape) > 0
        return seen & (slot < plan.slots), None
    stand = slot
    if operands.depths is not None:
        # begin is a multiple of block, and a roll takes no negative shift.
        shift = jax.lax.rem(here.index, plan.block)
        deep = jnp.broadcast_to(pltpu.roll(operands.depths[...], shift, 1), slot.shape)
        offset = slot - here.index
        stand = jnp.where((offset >= 0) & (offset < plan.width), here.index + deep, slot)
    columns = jax.tree.map(lambda ref: ref[...], operands.columns)
    seen = block_rows.visible(slot, stand, columns, here, plan.width) & (slot < plan.slots)
    if plan.steps is None:
        return seen, None
    distance = stand - here.index - columns.depth
    return seen, block_rows.bias_of(distance, operands.table[...], plan.steps, plan.both_sides)


def existing(values, begin, plan: Plan):
    """values with 0 in the slots of the last block that do not exist: what is there may be NaN."""
    if plan.slots % plan.block == 0:
        return values
    slot = begin + jax.lax.broadcasted_iota(jnp.int32, values.shape, 2 if plan.turned else 1)
    return jnp.where(slot < plan.slots, values.astype(jnp.float32), 0).astype(values.dtype)


def add(state: State, scores, seen, values, plan: Plan):
    """state after one more block; seen None: every row sees all of it."""
    before = state.peak[...]
    peak = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
    shares = jnp.exp(scores - peak)
    if seen is not None:
        # Where a row sees nothing its peak is HIDDEN too, and its shares would be 1.
        shares = jnp.where(seen, shares, 0)
    shrink = jnp.exp(before - peak)
    state.peak[...] = peak
    state.total[...] = shrink * state.total[...] + jnp.sum(shares, axis=-1, keepdims=True)
    context = product(shares.astype(values.dtype), values, 2 if plan.turned else 1)
    state.context[...] = shrink * state.context[...] + context


def finish(state: State, outputs):
    """The context, and log_z where it is wanted, of the blocks added so far."""
    total = state.total[...]
    # At least the peak's own share, 1, where anything was seen.
    whole = jnp.where(total > 0, total, 1)
    outputs[0][...] = (state.context[...] / whole).astype(outputs[0].dtype)
    if len(outputs) > 1:
        outputs[1][...] = jnp.where(total > 0, state.peak[...] + jnp.log(whole), HIDDEN)
