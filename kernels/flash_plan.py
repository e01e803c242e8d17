# SPDX-License-Identifier: Apache-2.0
"""What the kernels of flash attention know before they run, and how heads lie in lanes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.tiles import How
from t5x_lite.kernels.visits import Sizes, Visits

LANES = 128


class Rule(NamedTuple):
    """Which arithmetic a source needs: its mask, its bias, and the length of its keys."""

    causal: bool
    prefix: bool
    reach: bool
    biased: bool
    length: int


@dataclass(frozen=True)
class Plan:
    """Sizes of a call. head: lanes of a head; group: query heads to a key head."""

    heads: int
    group: int
    head: int
    queries: int
    sizes: Sizes
    rules: tuple[Rule, ...]
    softcap: float | None
    how: How

    @property
    def width(self) -> int:
        """Lanes of a block: small heads share one, so none is padded in memory."""
        return max(LANES, self.head)

    @property
    def packed(self) -> int:
        """Heads of a block."""
        return self.width // self.head

    @property
    def blocks(self) -> int:
        """Blocks of query heads."""
        return -(-self.heads // self.packed)

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.sizes.query)

    def key_blocks(self, source: int) -> int:
        return -(-self.rules[source].length // self.sizes.key)


@dataclass(frozen=True)
class Room:
    """What a chip gives a kernel: bytes of vector memory, and the largest blocks for rows of
    256, 512 and 1024 bytes (128 lanes of bfloat16 are 256)."""

    memory: int
    sizes: tuple[Sizes, Sizes, Sizes]


# v4 has 16 MB of vector memory, v5p 64, v5e and v6e 128. Not timed: no TPU was at hand.
ROOMS = {
    4: Room(16 * 2**20, (Sizes(512, 512), Sizes(512, 512), Sizes(256, 256))),
    5: Room(32 * 2**20, (Sizes(512, 512), Sizes(512, 512), Sizes(512, 512))),
}


def room(how: How) -> Room:
    return ROOMS[min(how.generation, 5)]


def largest_sizes(how: How, row_bytes: int) -> Sizes:
    """The largest blocks for rows of so many bytes (a block of heads of one token)."""
    return room(how).sizes[0 if row_bytes <= 256 else 1 if row_bytes <= 512 else 2]


def cost(plan: Plan, rows: int, products: int, accessed: int) -> pl.CostEstimate:
    """What a kernel takes at most: `products` per pair of a query and a key that may see it."""
    pairs = [plan.queries * rule.length // (2 if rule.causal else 1) for rule in plan.rules]
    scores = rows * plan.heads * sum(pairs)
    flops = 2 * products * scores * plan.head
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=accessed)


def size(*arrays) -> int:
    """Bytes of arrays."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


class Numbers(NamedTuple):
    """Of one source, in scalar memory: place (offset, behind, ahead, origin of the bias) and
    the blocks to visit."""

    place: Int[Array, " 4"]
    visits: Visits


def lanes_of(head: int) -> int:
    """How many lanes a head of this size takes: a share of 128, or a multiple of it."""
    if head > LANES:
        return -(-head // LANES) * LANES
    return 1 << (head - 1).bit_length()


def pack(x: Float[Array, "b t n h"]) -> Float[Array, "b t w"]:
    """Heads side by side in lanes; padded where a head or the last block of heads is not full."""
    b, t, n, h = x.shape
    head = lanes_of(h)
    spare = -n % max(1, LANES // head)
    return jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, head - h))).reshape(b, t, -1)


def unpack(x: Float[Array, "b t w"], heads: int, size: int) -> Float[Array, "b t n h"]:
    b, t, _ = x.shape
    return x.reshape(b, t, -1, lanes_of(size))[:, :, :heads, :size]
