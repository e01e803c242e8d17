# SPDX-License-Identifier: Apache-2.0
"""A kernel that walks the vocabulary and remembers of each row its best id and a few more.

Rows lie along sublanes and ids along lanes: a block of eight rows then fills its registers, and
the noise, over a hundred integer operations per id, is not computed for rows that are not there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import random
from jaxtyping import Array, Float, Int, UInt32

from t5x_lite.kernels import vocabulary_plan
from t5x_lite.kernels.vocabulary import VocabularyRule
from t5x_lite.kernels.vocabulary_plan import product

# Columns of what is known of a row: numbers have the best score, its logit, the largest logit and
# the sum of exp(logit - largest); ids have the best id in column SCORE; both have the largest
# logits from column TOP on.
SCORE, LOGIT, PEAK, TOTAL, TOP = 0, 1, 2, 3, 8
MOST_TOP, COLUMNS = 8, 128
# Rows and ids of a tile: rows of a decoded block or two, so that the table is read once.
ROWS, IDS = 256, 1024
# Bytes that two tiles of the table may take; the default of what a kernel gets is 16 MB.
FETCHED = 6 << 20
# Above every id.
NOBODY = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Seen:
    """What is looked for among how many ids, how many of them at a time."""

    rule: VocabularyRule
    ids: int
    tile: int
    top_k: int


def rows_of_tile(rows: int) -> tuple[int, int]:
    """How many tiles the rows have, and rows of each: a multiple of 16, as bfloat16 is packed."""
    count = -(-rows // ROWS)
    return count, -(-rows // (16 * count)) * 16


def ids_of_tile(table: Float[Array, "..."], rule: VocabularyRule) -> int:
    """Ids of a tile, a multiple of 128."""
    width = table.shape[1 if rule.tied else 0]
    most = FETCHED // (2 * width * table.dtype.itemsize) // 128 * 128
    return vocabulary_plan.even(rule.local(table), min(IDS, max(most, 128)))


def kernel(first, hidden, table, *refs, seen: Seen, drawn: bool):
    """Takes a tile of ids into account; refs are temperature and key where drawn, then what is
    known: numbers and ids."""
    *drawing, numbers, ids = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def begin():
        numbers[...] = jnp.full_like(numbers, -jnp.inf)
        numbers[:, TOTAL : TOTAL + 1] = jnp.zeros_like(numbers[:, TOTAL : TOTAL + 1])
        ids[...] = jnp.full_like(ids, NOBODY)

    logits = product(hidden[...], table[...], (1, 1 if seen.rule.tied else 0))
    logits = seen.rule.capped(logits)
    place = step * seen.tile + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if seen.ids % seen.tile > 0:
        logits = jnp.where(place < seen.ids, logits, -jnp.inf)
    of_tile = first[0] + place
    scores = logits
    if drawn:
        temperature, key = (ref[...] for ref in drawing)
        hot = temperature > 0
        noise = gumbel(key, of_tile)
        scores = jnp.where(hot, logits / jnp.where(hot, temperature, 1.0) + noise, logits)
    take_best(scores, logits, of_tile, numbers, ids)
    take_total(logits, numbers)
    if seen.top_k > 0:
        take_top(logits, of_tile, numbers, ids, seen.top_k)


def gumbel(key: UInt32[Array, "r 2"], ids: Int[Array, "r v"]) -> Float[Array, "r v"]:
    """What jax.random.gumbel(key, (vocab,)) has at ids, for the key of each row.

    Threefry's counter of an id is (0, id), its two words are mixed, 23 bits of them become a
    uniform number between the smallest normal one and 1 (jax/_src/random/core.py).
    """
    count = ids.astype(jnp.uint32)
    wide = lambda word: jnp.broadcast_to(word, ids.shape)
    keys = wide(key[:, 0:1]), wide(key[:, 1:2])
    high, low = random.threefry2x32_p.bind(*keys, jnp.zeros_like(count), count)
    one = jnp.uint32(0x3F800000)
    bits = jax.lax.shift_right_logical(high ^ low, jnp.uint32(9)) | one
    tiny = jnp.float32(jnp.finfo(jnp.float32).tiny)
    uniform = jnp.maximum(tiny, jax.lax.bitcast_convert_type(bits, jnp.float32) - 1 + tiny)
    return -jnp.log(-jnp.log(uniform))


def highest(values: Float[Array, "r v"], ids: Int[Array, "r v"]):
    """The highest value of each row and the lowest id that has it, [r 1] each."""
    value = jnp.max(values, axis=1, keepdims=True)
    return value, jnp.min(jnp.where(values == value, ids, NOBODY), axis=1, keepdims=True)


def take_best(scores, logits, of_tile, numbers, ids):
    """Keeps the best score, its id and its logit; of equals those of an earlier tile."""
    score, winner = highest(scores, of_tile)
    logit = jnp.max(jnp.where(of_tile == winner, logits, -jnp.inf), axis=1, keepdims=True)
    better = score > numbers[:, SCORE : SCORE + 1]
    keep = lambda new, old: jnp.where(better, new, old)
    ids[:, SCORE : SCORE + 1] = keep(winner, ids[:, SCORE : SCORE + 1])
    numbers[:, LOGIT : LOGIT + 1] = keep(logit, numbers[:, LOGIT : LOGIT + 1])
    numbers[:, SCORE : SCORE + 1] = keep(score, numbers[:, SCORE : SCORE + 1])


def take_total(logits, numbers):
    """Keeps the largest logit, and the sum of exp(logit - largest)."""
    old = numbers[:, PEAK : PEAK + 1]
    peak = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(jnp.exp(logits - peak), axis=1, keepdims=True)
    numbers[:, TOTAL : TOTAL + 1] = numbers[:, TOTAL : TOTAL + 1] * jnp.exp(old - peak) + total
    numbers[:, PEAK : PEAK + 1] = peak


def take_top(logits, of_tile, numbers, ids, top_k: int):
    """Keeps the largest logits in falling order, where the tile has one above the least of them."""
    least = numbers[:, TOP + top_k - 1 : TOP + top_k]
    newcomers = jnp.max(logits, axis=1, keepdims=True) > least

    @pl.when(jnp.sum(newcomers.astype(jnp.float32)) > 0)
    def merge():
        column = jax.lax.broadcasted_iota(jnp.int32, numbers.shape, 1)
        inside = (column >= TOP) & (column < TOP + top_k)
        values = jnp.where(inside, numbers[...], -jnp.inf)
        names = jnp.where(inside, ids[...], NOBODY)
        rest = logits
        for number in range(top_k):
            value, name = highest(rest, of_tile)
            rest = jnp.where(of_tile == name, -jnp.inf, rest)
            here = column == TOP + top_k + number
            values, names = jnp.where(here, value, values), jnp.where(here, name, names)
        for number in range(top_k):
            value, name = highest(values, names)
            values = jnp.where(names == name, -jnp.inf, values)
            numbers[:, TOP + number : TOP + number + 1] = value
            ids[:, TOP + number : TOP + number + 1] = name
