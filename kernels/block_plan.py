# SPDX-License-Identifier: Apache-2.0
"""What a block of new tokens attends to, and in which tiles."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from t5x_lite.kernels import relative as relatives
from t5x_lite.kernels.source import Source

# Rows of one key head at a time: with 1024 of size 256 in float32 the TPU's kernel no longer fits
# in 16 MB. More queries than that are taken in chunks.
MOST_ROWS = 512
# What one grid step may fetch: with the next one under way, half of a v4's 16 MB.
STEP_BYTES = 2 << 20
SCORE_BYTES = 1 << 18


@dataclass(frozen=True)
class Plan:
    """What is known before a kernel runs: its tiles, and what its source asks for.

    The queries of a key head are chunks of `rows` rows, which hold `span` tokens each; a grid step
    takes `block` slots of `heads` key heads. turned: keys and values come as [b k h s].
    """

    slots: int
    width: int
    span: int
    rows: int
    block: int
    heads: int
    softcap: float | None
    steps: tuple[int, ...] | None
    both_sides: bool
    turned: bool

    @property
    def chunks(self) -> int:
        return -(-self.width // self.span)


def planned(q: Float[Array, "b w k g h"], source: Source, softcap: float | None) -> Plan:
    """The tiles for these shapes.

    256 slots at a time in caches up to 1024, where a row uses half a block in vain on average, 512
    in longer ones; as many key heads as fit, because one head of 64 is fetched in less time than a
    grid step takes to begin (0.35 us; 256 slots of one head are 64 KB, 0.08 us on v5e).
    """
    _, w, k, g, h = q.shape
    slots, size = source.keys.shape[2], source.keys.dtype.itemsize
    span, rows = spread(w, g, 32 // size)
    block = min(-(-slots // 128) * 128, 256 if slots <= 1024 else 512)
    fits = lambda heads, block: (
        heads * block * 2 * h * size <= STEP_BYTES and heads * block * rows * 4 <= SCORE_BYTES
    )
    while block > 128 and not fits(1, block):
        block = max(128, block // 2)
    heads = max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or fits(n, block)))
    # A head of 64 fills half of 128 lanes, in memory too; slots fill them. XLA lays such a cache
    # out with its slots innermost by itself, so turning it moves nothing.
    turned = h % 128 != 0
    steps, both_sides = steps_of(source.relative)
    return Plan(slots, w, span, rows, block, heads, softcap, steps, both_sides, turned)


def spread(w: int, g: int, tile: int) -> tuple[int, int]:
    """How many tokens, of g queries each, share a chunk, and its rows, a multiple of tile."""
    if w * g <= MOST_ROWS:
        return w, -(-w * g // tile) * tile
    span = max(16, MOST_ROWS // g // 16 * 16)
    return span, span * g


def steps_of(relative: relatives.Relative | None) -> tuple[tuple[int, ...] | None, bool]:
    """The first distances of the buckets of one side, and whether there are two sides."""
    if relative is None:
        return None, False
    return relatives.steps(relative.side, relative.max_distance), relative.both_sides
