# SPDX-License-Identifier: Apache-2.0
"""Static configuration of the TPU decode kernel: its block sizes, and the kind of bias."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from t5x_lite.kernels.dense_mask import AttentionSource

# Rows of one key head at a time: with 1024 of size 256 in float32 the TPU's kernel no longer fits
# in 16 MB. More queries than that are taken in chunks.
MAX_ROWS = 512
# What one grid step may fetch: with the next one under way, half of a v4's 16 MB.
STEP_BYTES = 2 << 20
SCORE_BYTES = 1 << 18


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of a kernel call, known before the kernel runs.

    The queries of a key head are cut into chunks of whole tokens; a grid step takes a block of
    slots of a few key heads.

    Attributes:
      slots: slots of the cache.
      width: new tokens of a row.
      chunk_tokens: tokens of a chunk.
      rows: rows of a chunk: its tokens' queries of one key head, padded.
      block: slots of a block.
      heads: key heads of a grid step.
      softcap: cap of the scores, or None.
      boundaries: bucket boundaries of the relative position bias, or None without one.
      both_sides: True if the bias has buckets for keys after the query.
      transposed: True if keys and values come as [b k h s].
    """

    slots: int
    width: int
    chunk_tokens: int
    rows: int
    block: int
    heads: int
    softcap: float | None
    boundaries: tuple[int, ...] | None
    both_sides: bool
    transposed: bool

    @property
    def chunks(self) -> int:
        """Number of chunks of a row's tokens."""
        return -(-self.width // self.chunk_tokens)


def make_config(
    q: Float[Array, "b w k g h"], source: AttentionSource, softcap: float | None
) -> DecodeConfig:
    """Returns the block sizes for these shapes.

    256 slots at a time in caches up to 1024, where a row uses half a block in vain on average, 512
    in longer ones; as many key heads as fit, because one head of 64 is fetched in less time than a
    grid step takes to begin (0.35 us; 256 slots of one head are 64 KB, 0.08 us on v5e).

    Args:
      q: [b w k g h], queries of the new tokens.
      source: the cache, or the encoder's output.
      softcap: cap of the scores, or None.
    """
    _, w, k, g, h = q.shape
    bias = source.relative_bias
    slots, size = source.keys.shape[2], source.keys.dtype.itemsize
    chunk_tokens, rows = chunk_sizes(w, g, 32 // size)

    def fits(heads: int, block: int) -> bool:
        return (
            heads * block * 2 * h * size <= STEP_BYTES and heads * block * rows * 4 <= SCORE_BYTES
        )

    block = min(-(-slots // 128) * 128, 256 if slots <= 1024 else 512)
    while block > 128 and not fits(1, block):
        block = max(128, block // 2)
    heads = max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or fits(n, block)))
    return DecodeConfig(
        slots=slots,
        width=w,
        chunk_tokens=chunk_tokens,
        rows=rows,
        block=block,
        heads=heads,
        softcap=softcap,
        boundaries=None if bias is None else bias.boundaries,
        both_sides=bias is not None and bias.both_sides,
        # A head of 64 fills half of 128 lanes, in memory too; slots fill them. XLA lays such a
        # cache out with its slots innermost by itself, so transposing it moves nothing.
        transposed=h % 128 != 0,
    )


def chunk_sizes(w: int, g: int, sublanes: int) -> tuple[int, int]:
    """Returns the tokens of a chunk, and its rows, padded to a multiple of sublanes.

    Args:
      w: number of new tokens.
      g: query heads of a key head.
      sublanes: rows of a register tile.
    """
    if w * g <= MAX_ROWS:
        return w, -(-w * g // sublanes) * sublanes
    chunk_tokens = max(16, MAX_ROWS // g // 16 * 16)
    return chunk_tokens, chunk_tokens * g
