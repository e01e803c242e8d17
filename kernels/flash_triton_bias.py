# SPDX-License-Identifier: Apache-2.0
"""The gradient of the bias for GPUs: sums over pairs at the same distance, without atomics.

Distances of which each has a number of its own lie in a band along the diagonal. All tiles that
stand in the same place relative to their block of queries hold the same distances, so a program
adds such tiles up whole; the few sums are laid along their diagonals outside. What grows with
length is the work alone.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from t5x_lite.kernels import flash_triton_backward as backwards
from t5x_lite.kernels import flash_triton_tile as tiling
from t5x_lite.kernels import tiles
from t5x_lite.kernels.flash_triton_backward import Queries
from t5x_lite.kernels.flash_triton_tile import Operand, Plan

# Two programs for each of an H100's 132 processors.
PROGRAMS = 264


@dataclass(frozen=True)
class Band:
    """Tiles beside each block of queries: so many before its first index and from it on, which
    hold every distance below the farthest."""

    before: int
    after: int
    splits: int

    @property
    def tiles(self) -> int:
        return self.before + self.after


def band_of(plan: Plan, index: int, farthest: int, grid: tuple[int, int]) -> Band:
    """grid: rows of the batch, and heads."""
    rows, columns = plan.sizes
    rule = plan.rules[index]
    b, heads = grid
    past = rule.causal and not rule.prefix
    before = pl.cdiv(farthest - 1, columns)
    after = pl.cdiv(rows if past else farthest - 1 + rows, columns)
    wanted = PROGRAMS // (heads * (before + after))
    return Band(before, after, max(1, min(wanted, b * plan.query_blocks)))


def of_bias(
    plan: Plan, index: int, queries: Queries, source: Operand, far: Float[Array, "b n 2 m"]
) -> Float[Array, "n d"]:
    """The gradient of a source's bias; far: what blocks of queries gave to far distances."""
    farthest = source.farthest
    b, heads, _ = queries.log_z.shape
    band = band_of(plan, index, farthest, (b, heads))
    leaves = jax.tree.leaves((queries, source))
    shape = (heads, band.splits, plan.sizes.query, band.tiles * plan.sizes.key)
    sums = pl.pallas_call(
        functools.partial(kernel, plan, index, band),
        grid=(band.tiles, band.splits, heads),
        out_shape=tiles.like(shape, jnp.float32, *leaves),
        compiler_params=plan.parameters(queries.q.dtype),
        interpret=plan.how.interpret,
        name="flash_attention_backward_bias",
    )(queries, source)
    near = along_diagonals(jnp.sum(sums, axis=1))
    # Of the first row the first column is so many before it, and rows come the last one first.
    origin = plan.sizes.query - 1 + band.before * plan.sizes.key
    near = jnp.pad(near, ((0, 0), (0, farthest)))[:, origin - farthest + 1 : origin + farthest]
    behind, ahead = jnp.split(jnp.sum(far, axis=(0, 3)), 2, axis=1)
    return jnp.concatenate([behind, near, ahead], axis=1)


def along_diagonals(x: Float[Array, "n r c"]) -> Float[Array, "n d"]:
    """Sums along the diagonals: number d is that of column minus row equal to d - (r - 1)."""
    n, r, c = x.shape
    # In rows of r + c - 1 instead of r + c numbers each begins one place later than the one above.
    wide = jnp.pad(x[:, ::-1], ((0, 0), (0, 0), (0, r))).reshape(n, -1)
    return jnp.sum(wide[:, : r * (r + c - 1)].reshape(n, r, r + c - 1), axis=1)


def kernel(plan: Plan, number: int, band: Band, queries, source: Operand, sums) -> None:
    """The sum of the tiles in one place of the band, over a share of all blocks of queries."""
    place, split, heads = (pl.program_id(axis) for axis in range(3))
    rows, columns = plan.sizes
    rule, blocks = plan.rules[number], plan.query_blocks

    def add(turn, total):
        item = split + turn * band.splits
        batch, block = jax.lax.div(item, blocks), jax.lax.rem(item, blocks)
        head = tiling.head_of(plan, batch, heads)
        index = tiling.span(block * rows, rows)
        known = tiling.tokens(source.query_codes, batch, index).upright
        begin = block * rows + source.place[0] + (place - band.before) * columns
        at = tiling.span(begin, columns)
        keys = tiling.tokens(source.key_codes, batch, at).flat
        k, v = (tiling.load_keys(plan, x, head, at) for x in (source.k, source.v))
        own = backwards.load(plan, queries, head, index)
        tile = backwards.tile_of(plan, rule, source, head, (own, known), (k, v, keys))
        return total + tile.of_biased

    turns = jax.lax.div(queries.q.shape[0] * blocks - split + band.splits - 1, band.splits)
    total = jax.lax.fori_loop(0, turns, add, jnp.zeros((rows, columns), jnp.float32))
    row = jnp.arange(rows)[:, None]
    sums[heads, split, row, place * columns + jnp.arange(columns)[None, :]] = total
