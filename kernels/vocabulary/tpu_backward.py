# SPDX-License-Identifier: Apache-2.0
"""Cross entropy backward on TPU: the logits of a tile are recomputed from log(Z).

Layout and axes as in `tpu`.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import Backend, output_shape
from t5x_lite.kernels.tile_math import dot_f32
from t5x_lite.kernels.vocabulary.config import pad_to_lanes
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig, RowGradients, SmoothedTarget
from t5x_lite.kernels.vocabulary.tpu import VocabularySizes, call_kernel, pad_operands
from t5x_lite.utils.not_none import not_none


@dataclass(frozen=True)
class BackwardConfig:
    """Static arguments of the backward kernels.

    Attributes:
      config: of logits and loss.
      smoothed: the smoothed target.
      backend: what runs the kernels.
    """

    config: CrossEntropyConfig
    smoothed: SmoothedTarget
    backend: Backend


def stack_rows(rows: RowGradients) -> Float[Array, "8 r"]:
    """Returns the numbers of each row along lanes: a tile of 8 sublanes, so that it can be
    transposed. Ids are exact in float32 below 2**24."""
    stack = jnp.stack([row.astype(jnp.float32) for row in rows])
    return pad_to_lanes(jnp.pad(stack, ((0, 4), (0, 0))), 1)


def tile_gradient(hidden, table, rows, first_id, backward: BackwardConfig, ids_first: bool):
    """Returns the objective's gradient to the products of a tile, [ids rows] or [rows ids].

    Args:
      hidden: reference, [r d].
      table: reference, [v d] or [d v].
      rows: reference, [8 r], what `stack_rows` returned.
      first_id: first id of the tile.
      backward: static arguments.
      ids_first: ids are along rows of the tile.
    """
    axis = 1 if backward.config.tied else 0
    rows = rows[...]
    if ids_first:
        products = dot_f32(table[...], hidden[...], (axis, 1))
        fields = [rows[k : k + 1] for k in range(4)]
    else:
        products = dot_f32(hidden[...], table[...], (1, axis))
        columns = rows.T
        fields = [columns[:, k : k + 1] for k in range(4)]
    ids = jax.lax.broadcasted_iota(jnp.int32, products.shape, 0 if ids_first else 1)
    row_gradients = RowGradients(fields[0].astype(jnp.int32), *fields[1:])
    logits = backward.config.scale_and_cap(products)
    gradient = row_gradients.product_gradient(
        logits, first_id + ids, backward.smoothed, backward.config
    )
    return gradient.astype(hidden.dtype)


def accumulate_dot(
    result, total, factors, axes: tuple[int, int], step, count: int | jax.Array | None
) -> None:
    """Adds the product of factors to total, which begins at zero in step 0 and is the result of the
    last step.

    Args:
      result: reference, the output.
      total: reference, the sum.
      factors: two arrays or references.
      axes: the contracted axis of each.
      step: index of the step.
      count: in the last step, how many along those axes count, the rest being anything: both
        factors are masked there, apart from the other steps, which need not pay for it. None
        where all count.
    """
    is_last = step == pl.num_programs(1) - 1

    @pl.when(step == 0)
    def begin():
        total[...] = jnp.zeros_like(total)

    def add():
        total[...] += dot_f32(*(factor[...] for factor in factors), axes)

    def zero_past_end(x, axis: int):
        index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(index < not_none(count), x, 0).astype(factors[0].dtype)

    def add_last():
        # Selected in float32: a v5e has no 16-bit lanes.
        wide = [factor[...].astype(jnp.float32) for factor in factors]
        total[...] += dot_f32(*map(zero_past_end, wide, axes), axes)

    if count is None:
        add()
    else:
        pl.when(~is_last)(add)
        pl.when(is_last)(add_last)

    @pl.when(is_last)
    def write():
        result[...] = total[...].astype(result.dtype)


def summed_gradient(
    kernel, operands, rows: RowGradients, backward: BackwardConfig, summed: str
) -> Float[Array, "..."]:
    """Runs a kernel that sums a gradient tile by tile; returns it with padding.

    Args:
      kernel: `hidden_gradient_kernel` or `table_gradient_kernel`.
      operands: hidden [r d], and the table, [v d] where tied, else [d v].
      rows: [r] each.
      backward: static arguments.
      summed: "rows" for the gradient of hidden, "ids" for that of the table.
    """
    config, by_rows = backward.config, summed == "rows"
    hidden, table, sizes = pad_operands(*operands, config, backward.backend, summed)
    width, stack = hidden.shape[1], stack_rows(rows)
    specs = sizes.specs(width, config.tied, rows_first=by_rows)
    result, spec = (hidden, specs.hidden) if by_rows else (table, specs.table)
    length = sizes.tiles.rows if by_rows else sizes.tiles.ids
    shape = (length, width) if by_rows or config.tied else (width, length)
    return call_kernel(
        functools.partial(kernel, sizes=sizes, backward=backward),
        (hidden, table, stack),
        sizes,
        backward.backend,
        summed,
        in_specs=[specs.hidden, specs.table, specs.per_row(8)],
        out_specs=spec,
        out_shape=output_shape(result.shape, result.dtype, hidden, table, stack),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32)],
    )


def hidden_gradient(
    hidden, table, rows: RowGradients, backward: BackwardConfig
) -> Float[Array, "r d"]:
    """Returns the gradient of hidden, of this device's part of the vocabulary.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      rows: [r] each.
      backward: static arguments.
    """
    gradient = summed_gradient(hidden_gradient_kernel, (hidden, table), rows, backward, "rows")
    return gradient[: len(hidden)]


def hidden_gradient_kernel(
    hidden, table, rows, gradient, total, *, sizes: VocabularySizes, backward: BackwardConfig
):
    """Adds one tile of ids to the gradient of a tile of rows.

    Args:
      hidden: reference, [r d].
      table: reference, [v d] or [d v].
      rows: reference, [8 r].
      gradient: output, [r d].
      total: the sum, [r d], float32.
      sizes: sizes of a tile.
      backward: static arguments.
    """
    step = pl.program_id(1)
    first = step * sizes.tiles.ids
    products = tile_gradient(hidden, table, rows, first, backward, ids_first=False)
    axes = (1, 0 if backward.config.tied else 1)
    count = sizes.ids - first if sizes.cuts_ids else None
    accumulate_dot(gradient, total, (products, table), axes, step, count)


def table_gradient(
    hidden, table, rows: RowGradients, backward: BackwardConfig
) -> Float[Array, "..."]:
    """Returns the gradient of the table.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      rows: [r] each.
      backward: static arguments.
    """
    gradient = summed_gradient(table_gradient_kernel, (hidden, table), rows, backward, "ids")
    return gradient[: len(table)] if backward.config.tied else gradient[:, : table.shape[1]]


def table_gradient_kernel(
    hidden, table, rows, gradient, total, *, sizes: VocabularySizes, backward: BackwardConfig
):
    """Adds one tile of rows to the gradient of a tile of ids.

    Args:
      hidden: reference, [r d].
      table: reference, [v d] or [d v].
      rows: reference, [8 r].
      gradient: output, like table.
      total: the sum, like table, float32.
      sizes: sizes of a tile.
      backward: static arguments.
    """
    tied, step = backward.config.tied, pl.program_id(1)
    first = pl.program_id(0) * sizes.tiles.ids
    products = tile_gradient(hidden, table, rows, first, backward, ids_first=tied)
    factors, axes = ((products, hidden), (1, 0)) if tied else ((hidden, products), (0, 0))
    count = sizes.rows - step * sizes.tiles.rows if sizes.cuts_rows else None
    accumulate_dot(gradient, total, factors, axes, step, count)
