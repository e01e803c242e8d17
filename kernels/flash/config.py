# SPDX-License-Identifier: Apache-2.0
"""Static configuration of the TPU flash kernels, and how heads are packed in lanes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.flash.block_mask import BlockMask, BlockSizes
from t5x_lite.kernels.tile_math import LANES


class SourceSpec(NamedTuple):
    """Static features of a source, which select the arithmetic of its tiles.

    Attributes:
      causal: the mask is causal.
      prefix: it has a prefix inside which all attend to all.
      window: it has a sliding window.
      biased: there is a relative position bias.
      length: keys in a row.
    """

    causal: bool
    prefix: bool
    window: bool
    biased: bool
    length: int


@dataclass(frozen=True)
class FlashBaseConfig:
    """Sizes of a kernel call that the TPU and the Triton kernels share, known before they run.

    Attributes:
      group: query heads of a key head.
      queries: queries in a row.
      block_sizes: queries and keys of a block.
      sources: static features of every source.
      softcap: cap of the scores, or None.
      backend: what runs the kernels.
    """

    group: int
    queries: int
    block_sizes: BlockSizes
    sources: tuple[SourceSpec, ...]
    softcap: float | None
    backend: Backend

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries in a row."""
        return pl.cdiv(self.queries, self.block_sizes.query)

    def key_blocks(self, source: int) -> int:
        """Returns the number of blocks of keys in a row of a source."""
        return pl.cdiv(self.sources[source].length, self.block_sizes.key)


@dataclass(frozen=True)
class FlashConfig(FlashBaseConfig):
    """Sizes of a kernel call on TPU; small heads share 128 lanes, so none is padded in memory.

    Attributes:
      heads: query heads.
      head_lanes: lanes of a head.
    """

    heads: int
    head_lanes: int

    @property
    def block_lanes(self) -> int:
        """Lanes of a block of heads."""
        return max(LANES, self.head_lanes)

    @property
    def block_heads(self) -> int:
        """Heads of a block, a power of two."""
        return self.block_lanes // self.head_lanes

    @property
    def head_blocks(self) -> int:
        """Number of blocks of query heads."""
        return pl.cdiv(self.heads, self.block_heads)


@dataclass(frozen=True)
class VmemLimits:
    """Vector memory of a kernel on a chip, and the largest blocks that it holds.

    Attributes:
      memory: bytes.
      block_sizes: for rows of 256, 512 and 1024 bytes (128 lanes of bfloat16 are 256).
    """

    memory: int
    block_sizes: tuple[BlockSizes, BlockSizes, BlockSizes]


# v4 has 16 MB of vector memory, v5p 64, v5e and v6e 128. Not timed: no TPU was at hand.
VMEM_LIMITS = {
    4: VmemLimits(16 * 2**20, (BlockSizes(512, 512), BlockSizes(512, 512), BlockSizes(256, 256))),
    5: VmemLimits(32 * 2**20, (BlockSizes(512, 512), BlockSizes(512, 512), BlockSizes(512, 512))),
}


def vmem_limits(backend: Backend) -> VmemLimits:
    """Returns the limits of the backend's TPU generation."""
    return VMEM_LIMITS[min(backend.generation, 5)]


def largest_blocks(backend: Backend, row_bytes: int) -> BlockSizes:
    """Returns the largest blocks for rows of so many bytes (a block of heads of one token)."""
    sizes = vmem_limits(backend).block_sizes
    return sizes[0 if row_bytes <= 256 else 1 if row_bytes <= 512 else 2]


def estimate_cost(config: FlashConfig, rows: int, products: int, accessed: int) -> pl.CostEstimate:
    """Returns the cost of a kernel at most: as if only causality emptied blocks.

    Args:
      config: sizes.
      rows: rows of the batch.
      products: matrix products per tile.
      accessed: bytes read and written.
    """
    pairs = [config.queries * spec.length // (2 if spec.causal else 1) for spec in config.sources]
    scores = rows * config.heads * sum(pairs)
    flops = 2 * products * scores * config.head_lanes
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=accessed)


def num_bytes(*arrays) -> int:
    """Returns the bytes of arrays."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


class FlashScalars(NamedTuple):
    """Scalars of one source that a kernel reads ahead.

    Attributes:
      offsets: [4], index of the first query among the keys, window to the left and to the right,
        and the distance at which the vector of the bias begins.
      block_mask: blocks to visit.
    """

    offsets: Int[Array, " 4"]
    block_mask: BlockMask


def padded_lanes(size: int) -> int:
    """Returns the lanes of a head of this size: a share of 128, or a multiple of it."""
    if size > LANES:
        return -(-size // LANES) * LANES
    return 1 << (size - 1).bit_length()


def pack_heads(x: Float[Array, "b t n h"]) -> Float[Array, "b t w"]:
    """Returns heads side by side in w lanes, padded where a head or the last block of heads is not
    full."""
    b, t, n, h = x.shape
    lanes = padded_lanes(h)
    spare_heads = -n % max(1, LANES // lanes)
    return jnp.pad(x, ((0, 0), (0, 0), (0, spare_heads), (0, lanes - h))).reshape(b, t, -1)


def unpack_heads(x: Float[Array, "b t w"], heads: int, size: int) -> Float[Array, "b t n h"]:
    """Inverse of `pack_heads`.

    Args:
      x: [b t w], packed.
      heads: number of heads.
      size: head size.
    """
    b, t, _ = x.shape
    return x.reshape(b, t, -1, padded_lanes(size))[:, :, :heads, :size]
