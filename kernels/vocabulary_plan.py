# SPDX-License-Identifier: Apache-2.0
"""Tiles of rows by vocabulary, and the products inside them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from t5x_lite.kernels import tiles, vocabulary

LANES = 128
# Rows of a tile: at 1024 each byte of the table that is fetched serves 1024 products in bfloat16,
# where a v5e balances at 240 and a v6e at 560.
ROWS, IDS = 1024, 512
# Bytes of fast memory that a plan may count. A v4 core has 16 MB, a v5p 64, v5e and v6e 128; what
# the compiler spills comes on top, up to half as much as was counted.
SMALL, LARGE = 12 << 20, 32 << 20


@dataclass(frozen=True)
class Plan:
    """How many rows and ids a tile has, and the fast memory that is asked for, in bytes."""

    rows: int
    ids: int
    memory: int

    def grid(self, rows: int, ids: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-ids // self.ids)


def even(length: int, most: int) -> int:
    """A multiple of 128 of at most length and most that cuts length evenly."""
    count = -(-length // most)
    share = -(-length // count)
    return min(-(-share // LANES) * LANES, length // LANES * LANES)


def plan(hidden: jax.Array, vocab: int, how: tiles.How, summed: str = "") -> Plan:
    """The largest tiles that fit; summed is "rows" or "ids" where a gradient as wide as the model
    is summed for each of these.

    Counted are operands and results twice (one is fetched while the other is used), their sum in
    float32, four tiles of float32 logits, and of float32 operands the three bfloat16 parts that
    make an exact product.

    Raises:
      ValueError: hidden states are so wide that no tile fits.
    """
    width, size = hidden.shape[1], hidden.dtype.itemsize
    limit = SMALL if how.generation < 5 else LARGE
    rows, ids = (IDS, ROWS) if summed == "ids" else (ROWS, IDS)
    if size == 4:
        # Exact products are six: fetching is no bottleneck, and larger tiles compile for a minute.
        rows, ids = rows // 2, ids // 2

    def needed():
        sums = {"rows": rows, "ids": ids}.get(summed, 0) * (4 + 2 * size)
        parts = 6 if size == 4 else 0
        return width * ((2 * size + parts) * (rows + ids) + sums) + 16 * rows * ids

    while needed() > limit and max(rows, ids) > LANES:
        rows, ids = (rows // 2, ids) if rows >= ids else (rows, ids // 2)
    if needed() > limit:
        raise ValueError(
            f"{hidden.dtype} hidden states of width {width} do not fit the fast memory of a TPU "
            f'v{how.generation}: bind Train.cross_entropy = "whole", or use bfloat16'
        )
    memory = max(needed() * 3 // 2, 16 << 20)
    return Plan(even(hidden.shape[0], rows), even(vocab, ids), memory)


def filled(x: jax.Array, axis: int) -> jax.Array:
    """x with at least 128 along axis, zeros at the end: no tile is smaller."""
    missing = LANES - x.shape[axis]
    if missing <= 0:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def product(left: jax.Array, right: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """left and right multiplied and summed over one axis of each, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=vocabulary.precision(left),
        preferred_element_type=jnp.float32,
    )
