# SPDX-License-Identifier: Apache-2.0
"""Cross entropy as TPU kernels: a tile of rows by a tile of the vocabulary at a time.

The numbers of each row lie along lanes ([k r]), so that they take no more memory than they have.
Tiles past the end of the rows or of the vocabulary hold anything at all; what is summed over them
is masked.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import tiles, vocabulary_plan
from t5x_lite.kernels.vocabulary import Part, Rows, VocabularyRule
from t5x_lite.kernels.vocabulary_plan import Plan, product


@dataclass(frozen=True)
class Asked:
    """What the backward kernels are asked for: shares are the smoothed target's probabilities, of
    the target and of every other id."""

    rule: VocabularyRule
    shares: tuple[float, float]
    how: tiles.How


@dataclass(frozen=True)
class Sizes:
    """How many rows and ids there are, and how they are cut."""

    rows: int
    ids: int
    plan: Plan

    def specs(self, width: int, tied: bool, rows_first: bool):
        """Blocks of hidden, of the table and of k numbers per row, for a grid of (rows, ids) or
        (ids, rows)."""
        order = (lambda i, j: (i, j)) if rows_first else (lambda j, i: (i, j))
        rows, ids = self.plan.rows, self.plan.ids
        hidden = pl.BlockSpec((rows, width), lambda *at: (order(*at)[0], 0))
        table = pl.BlockSpec((ids, width), lambda *at: (order(*at)[1], 0))
        if not tied:
            table = pl.BlockSpec((width, ids), lambda *at: (0, order(*at)[1]))
        per_row = lambda k: pl.BlockSpec((k, rows), lambda *at: (0, order(*at)[0]))
        return hidden, table, per_row

    def cut(self, ids: bool) -> bool:
        """Whether the last tile of ids (or of rows) goes past the end."""
        return self.ids % self.plan.ids > 0 if ids else self.rows % self.plan.rows > 0


def sizes_of(hidden, table, rule: VocabularyRule, how, summed: str = ""):
    """Hidden states and table with at least one tile's rows and ids, and the true sizes."""
    ids = rule.local(table)
    padded = vocabulary_plan.filled(hidden, 0)
    table = vocabulary_plan.filled(table, 0 if rule.tied else 1)
    plan = vocabulary_plan.plan(padded, rule.local(table), how, summed)
    return padded, table, Sizes(hidden.shape[0], ids, plan)


def call(kernel, operands, sizes: Sizes, how: tiles.How, summed: str = "", **blocks):
    """Runs kernel over tiles of rows by tiles of ids, the inner walked in order: rows where the
    gradient of "ids" is summed."""
    hidden, table, _ = operands
    ids = table.size // hidden.shape[1]
    grid = sizes.plan.grid(hidden.shape[0], ids)
    # What is outside is fetched once, what is inside as often as there are tiles outside.
    fetched = hidden.nbytes + grid[0] * table.nbytes
    if summed == "ids":
        fetched, grid = grid[1] * hidden.nbytes + table.nbytes, grid[::-1]
    products = 2 if summed else 1
    result = blocks["out_shape"]
    return pl.pallas_call(
        kernel,
        grid=grid,
        interpret=how.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.plan.memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * hidden.size * ids,
            bytes_accessed=fetched + result.size * result.dtype.itemsize,
            transcendentals=hidden.shape[0] * ids,
        ),
        **blocks,
    )(*operands)


def forward(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    rule: VocabularyRule,
    how: tiles.How,
) -> Part:
    """What this device's part of the vocabulary tells of each row; targets count within it.

    The sum of logits is 0 where there is no smoothing.
    """
    hidden, table, sizes = sizes_of(hidden, table, rule, how)
    targets = vocabulary_plan.filled(targets[None], 1)
    of_hidden, of_table, per_row = sizes.specs(hidden.shape[1], rule.tied, rows_first=True)
    told = call(
        functools.partial(forward_kernel, sizes=sizes, rule=rule),
        (hidden, table, targets),
        sizes,
        how,
        in_specs=[of_hidden, of_table, per_row(1)],
        out_specs=per_row(4),
        out_shape=tiles.like((4, hidden.shape[0]), jnp.float32, hidden, table, targets),
    )
    return Part(*told[:, : sizes.rows])


def forward_kernel(hidden, table, targets, told, *, sizes: Sizes, rule: VocabularyRule):
    number = pl.program_id(1)

    @pl.when(number == 0)
    def begin():
        told[0:1] = jnp.full_like(told[0:1], -jnp.inf)
        told[1:4] = jnp.zeros_like(told[1:4])

    logits = rule.capped(product(table[...], hidden[...], (1 if rule.tied else 0, 1)))
    ids = number * sizes.plan.ids + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    present = logits
    if sizes.cut(ids=True):
        present = jnp.where(ids < sizes.ids, logits, -jnp.inf)
    peak = jnp.maximum(told[0:1], jnp.max(present, axis=0, keepdims=True))
    total = jnp.sum(jnp.exp(present - peak), axis=0, keepdims=True)
    told[1:2] = told[1:2] * jnp.exp(told[0:1] - peak) + total
    told[0:1] = peak
    hit = jnp.where(ids == targets[...], logits, 0)
    told[2:3] += jnp.sum(hit, axis=0, keepdims=True)
    if rule.smoothing > 0:
        if sizes.cut(ids=True):
            present = jnp.where(ids < sizes.ids, logits, 0)
        told[3:4] += jnp.sum(present, axis=0, keepdims=True)


def stacked(rows: Rows) -> Float[Array, "8 r"]:
    """Numbers of each row along lanes: a tile of 8 sublanes, so that it can be turned. Ids are
    exact in float32 below 2**24."""
    stack = jnp.stack([row.astype(jnp.float32) for row in rows])
    return vocabulary_plan.filled(jnp.pad(stack, ((0, 4), (0, 0))), 1)


def slopes(hidden, table, rows, first_id, asked: Asked, ids_first: bool):
    """The objective's gradient to the products of a tile, [ids rows] or [rows ids]."""
    axis = 1 if asked.rule.tied else 0
    rows = rows[...]
    if ids_first:
        products = product(table[...], hidden[...], (axis, 1))
        numbers = [rows[k : k + 1] for k in range(4)]
    else:
        products = product(hidden[...], table[...], (1, axis))
        turned = rows.T
        numbers = [turned[:, k : k + 1] for k in range(4)]
    ids = jax.lax.broadcasted_iota(jnp.int32, products.shape, 0 if ids_first else 1)
    numbers = Rows(numbers[0].astype(jnp.int32), *numbers[1:])
    slope = numbers.slope(asked.rule.capped(products), first_id + ids, asked.shares, asked.rule)
    return slope.astype(hidden.dtype)


def sum_products(total, factors, axes: tuple[int, int], step, left: int, cut: bool):
    """Adds the product of factors over axes to total, which begins at zero in step 0.

    In the last step only the first `left` along those axes count, where cut says that there are
    more: what lies there may be anything, so both factors are masked. Kept apart from the other
    steps, which need not pay for it.
    """
    last = step == pl.num_programs(1) - 1

    @pl.when(step == 0)
    def begin():
        total[...] = jnp.zeros_like(total)

    def add():
        total[...] += product(*(factor[...] for factor in factors), axes)

    def add_last():
        # Selected in float32: a v5e has no 16-bit lanes.
        wide = [factor[...].astype(jnp.float32) for factor in factors]
        place = map(lambda x, axis: jax.lax.broadcasted_iota(jnp.int32, x.shape, axis), wide, axes)
        kept = map(lambda x, at: jnp.where(at < left, x, 0).astype(factors[0].dtype), wide, place)
        total[...] += product(*kept, axes)

    if cut:
        pl.when(~last)(add)
        pl.when(last)(add_last)
    else:
        add()
    return last


def of_hidden(hidden, table, rows: Rows, asked: Asked) -> Float[Array, "r d"]:
    """The gradient to hidden, of this device's part of the vocabulary."""
    rule = asked.rule
    padded, table, sizes = sizes_of(hidden, table, rule, asked.how, "rows")
    width, stack = hidden.shape[1], stacked(rows)
    of_hidden, of_table, per_row = sizes.specs(width, rule.tied, rows_first=True)
    gradient = call(
        functools.partial(hidden_kernel, sizes=sizes, asked=asked),
        (padded, table, stack),
        sizes,
        asked.how,
        "rows",
        in_specs=[of_hidden, of_table, per_row(8)],
        out_specs=of_hidden,
        out_shape=tiles.like(padded.shape, hidden.dtype, padded, table, stack),
        scratch_shapes=[pltpu.VMEM((sizes.plan.rows, width), jnp.float32)],
    )
    return gradient[: len(hidden)]


def hidden_kernel(hidden, table, rows, gradient, total, *, sizes: Sizes, asked: Asked):
    step = pl.program_id(1)
    first = step * sizes.plan.ids
    slope = slopes(hidden, table, rows, first, asked, ids_first=False)
    axes = (1, 0 if asked.rule.tied else 1)
    left, cut = sizes.ids - first, sizes.cut(ids=True)
    last = sum_products(total, (slope, table), axes, step, left, cut)

    @pl.when(last)
    def end():
        gradient[...] = total[...].astype(gradient.dtype)


def of_table(hidden, table, rows: Rows, asked: Asked) -> Float[Array, "..."]:
    """The gradient to the table."""
    rule = asked.rule
    hidden, padded, sizes = sizes_of(hidden, table, rule, asked.how, "ids")
    width, stack, ids = hidden.shape[1], stacked(rows), sizes.plan.ids
    of_hidden, of_table, per_row = sizes.specs(width, rule.tied, rows_first=False)
    gradient = call(
        functools.partial(table_kernel, sizes=sizes, asked=asked),
        (hidden, padded, stack),
        sizes,
        asked.how,
        "ids",
        in_specs=[of_hidden, of_table, per_row(8)],
        out_specs=of_table,
        out_shape=tiles.like(padded.shape, table.dtype, hidden, padded, stack),
        scratch_shapes=[pltpu.VMEM((ids, width) if rule.tied else (width, ids), jnp.float32)],
    )
    return gradient[: len(table)] if rule.tied else gradient[:, : table.shape[1]]


def table_kernel(hidden, table, rows, gradient, total, *, sizes: Sizes, asked: Asked):
    tied, step = asked.rule.tied, pl.program_id(1)
    first = pl.program_id(0) * sizes.plan.ids
    slope = slopes(hidden, table, rows, first, asked, ids_first=tied)
    factors, axes = ((slope, hidden), (1, 0)) if tied else ((hidden, slope), (0, 0))
    left, cut = sizes.rows - step * sizes.plan.rows, sizes.cut(ids=False)
    last = sum_products(total, factors, axes, step, left, cut)

    @pl.when(last)
    def end():
        gradient[...] = total[...].astype(gradient.dtype)
