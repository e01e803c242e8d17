# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the TPU kernels of cross entropy: rows by ids of the vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.tile_math import LANES

# Rows of a tile: at 1024 each byte of the table that is fetched serves 1024 products in bfloat16,
# where a v5e balances at 240 and a v6e at 560.
ROWS, IDS = 1024, 512
# Bytes of fast memory that tiles may count. A v4 core has 16 MB, a v5p 64, v5e and v6e 128; what
# the compiler spills comes on top, up to half as much as was counted.
SMALL, LARGE = 12 << 20, 32 << 20


@dataclass(frozen=True)
class VocabularyTiles:
    """Sizes of a tile, and the vector memory that a kernel gets.

    Attributes:
      rows: rows of a tile.
      ids: ids of a tile.
      memory: bytes.
    """

    rows: int
    ids: int
    memory: int

    def grid(self, rows: int, ids: int) -> tuple[int, int]:
        """Returns the number of tiles along rows and along ids."""
        return pl.cdiv(rows, self.rows), pl.cdiv(ids, self.ids)


def even_block(length: int, most: int) -> int:
    """Returns a multiple of 128 of at most length and most that cuts length evenly."""
    count = pl.cdiv(length, most)
    return min(pl.cdiv(pl.cdiv(length, count), LANES) * LANES, length // LANES * LANES)


def choose_tiles(
    hidden: jax.Array, vocab: int, backend: Backend, summed: str = ""
) -> VocabularyTiles:
    """Returns the largest tiles that fit.

    Counted are operands and results twice (one is fetched while the other is used), their sum in
    float32, four tiles of float32 logits, and of float32 operands the three bfloat16 parts that
    make an exact product.

    Args:
      hidden: [r d], hidden states.
      vocab: number of ids.
      backend: with the TPU's generation.
      summed: "rows" or "ids" where a gradient as wide as the model is summed for each of these.

    Raises:
      ValueError: hidden states are so wide that no tile fits.
    """
    width, size = hidden.shape[1], hidden.dtype.itemsize
    limit = SMALL if backend.generation < 5 else LARGE
    rows, ids = (IDS, ROWS) if summed == "ids" else (ROWS, IDS)
    if size == 4:
        # An exact product is six: fetching does not limit, and larger tiles compile for a minute.
        rows, ids = rows // 2, ids // 2

    def counted_bytes():
        sums = {"rows": rows, "ids": ids}.get(summed, 0) * (4 + 2 * size)
        parts = 6 if size == 4 else 0
        return width * ((2 * size + parts) * (rows + ids) + sums) + 16 * rows * ids

    while counted_bytes() > limit and max(rows, ids) > LANES:
        rows, ids = (rows // 2, ids) if rows >= ids else (rows, ids // 2)
    if counted_bytes() > limit:
        raise ValueError(
            f"{hidden.dtype} hidden states of width {width} do not fit the fast memory of a TPU "
            f'v{backend.generation}: bind Train.cross_entropy = "full", or use bfloat16'
        )
    memory = max(counted_bytes() * 3 // 2, 16 << 20)
    return VocabularyTiles(even_block(hidden.shape[0], rows), even_block(vocab, ids), memory)


def pad_to_lanes(x: jax.Array, axis: int) -> jax.Array:
    """Returns x with at least 128 along axis, zeros at the end: no tile is smaller."""
    missing = LANES - x.shape[axis]
    if missing <= 0:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
