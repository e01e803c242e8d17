# SPDX-License-Identifier: Apache-2.0
"""A tile of scores in a kernel: products, mask, bias; and the walk over the tiles to visit."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import diagonals
from t5x_lite.kernels.flash_plan import LANES, Numbers, Plan, Rule

# Far below any score, and finite: a row that sees nothing stays a number.
HIDDEN = -1e30


class Place(NamedTuple):
    """A tile: the first query (its index among the keys) and key of it.

    step is 1 where keys stand along columns, -1 where queries do.
    """

    query: Int[Array, ""]
    key: Int[Array, ""]
    step: int

    def start(self, origin: Int[Array, ""]) -> Int[Array, ""]:
        """Where it begins in a vector of differences (column minus row)."""
        return self.step * (self.key - self.query) - origin


def product(x, y, sides: tuple[int, int]) -> Float[Array, "r c"]:
    """x times y over these axes of theirs, accumulated in float32 (and multiplied, if they are)."""
    highest = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((sides[0],), (sides[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if highest else None,
        preferred_element_type=jnp.float32,
    )


def column(row: Float[Array, "1 r"]) -> Float[Array, "r 128"]:
    """A row stood upright, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Float[Array, "r 128"]) -> Float[Array, "1 r"]:
    """An upright row laid down again."""
    return column.T[:1]


def capped(scores: Float[Array, "r c"], softcap: float | None) -> Float[Array, "r c"]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def seen(rule: Rule, place: Place, numbers: Numbers, upright, level) -> Bool[Array, "r c"]:
    """The pairs that may see each other, from codes of rows [r 1] and columns [1 c]."""
    near = (upright ^ level) & -2 == 0 if rule.prefix else upright == level
    if not (rule.causal or rule.reach):
        return near
    offset, behind, ahead = (numbers.place[index] for index in range(3))
    # Key index minus query index, less what the tile adds to it.
    axis = lambda dimension: jax.lax.broadcasted_iota(jnp.int32, near.shape, dimension)
    gap = axis(1) - axis(0) if place.step > 0 else axis(0) - axis(1)
    same = place.query + offset - place.key
    if rule.causal:
        past = gap <= same
        near = near & (past | (upright & level & 1 != 0) if rule.prefix else past)
    if rule.reach:
        near = near & (gap >= same - behind) & (gap <= same + ahead)
    return near


def wholly_seen(rule: Rule, place: Place, numbers: Numbers, sizes) -> Bool[Array, ""]:
    """Whether causality and reach hide nothing of the tile."""
    offset, behind, ahead = (numbers.place[index] for index in range(3))
    most = place.key + sizes.key - 1 - (place.query + offset)
    least = place.key - (place.query + offset + sizes.query - 1)
    whole = most <= (0 if rule.causal else most)
    return whole & (least >= -behind) & (most <= ahead) if rule.reach else whole


def quotient(x, divisor: int):
    """x // divisor for x from 0 on: Mosaic has no division that rounds down."""
    return x if divisor == 1 else jax.lax.div(x, jnp.int32(divisor))


def head_of_lane(plan: Plan, x) -> Int[Array, "r w"]:
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return lane >> (plan.head.bit_length() - 1)


def shift(plan: Plan, block, head: int) -> Int[Array, ""]:
    """Lanes from where a query head stands to where its key head does."""
    last = plan.packed - 1  # packed is a power of two
    place = quotient(block * plan.packed + head, plan.group) & last
    return ((place - head) & last) * plan.head


def only(plan: Plan, x, block, head: int):
    """One query head of x [r w], in the lanes of its key head, with 0 in the others."""
    if plan.packed == 1:
        return x
    alone = jnp.where(head_of_lane(plan, x) == head, x.astype(jnp.float32), 0)
    if plan.group > 1:
        alone = pltpu.roll(alone, shift(plan, block, head), 1)
    return alone.astype(x.dtype)


def home(plan: Plan, x: Float[Array, "r w"], block, head: int) -> Float[Array, "r w"]:
    """The lanes of x that `only` filled, back at the query head's, with 0 in the others."""
    if plan.packed == 1:
        return x
    if plan.group > 1:
        x = pltpu.roll(x, -shift(plan, block, head) & (plan.width - 1), 1)
    return jnp.where(head_of_lane(plan, x) == head, x, 0)


def inside(x, first, length: int, block: int):
    """x [r w] with 0 in rows beyond length, where memory holds anything; first: its first row."""
    if length % block == 0:
        return x
    index = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(index < length, x.astype(jnp.float32), 0).astype(x.dtype)


def bias_tile(x, head: int, place: Place, numbers: Numbers, shape):
    return diagonals.tile(x, head, place.start(numbers.place[3]), shape)


def expand(vectors, scratch) -> None:
    """Lays every head's vector [1 p d] along diagonals, into scratch [p 128 d]."""
    for head in range(scratch.shape[0]):
        scratch[head] = diagonals.expanded(vectors[0, head : head + 1])


def key_block(plan: Plan, numbers: tuple[Numbers, ...], source: int, at) -> Int[Array, ""]:
    """The block of keys of a source at grid step `at` (block of heads, row, block, step).

    Blocks of the sources come one after the other. Before its first and after its last one the
    nearest is named, so that nothing is fetched.
    """
    _, row, block, step = at
    index = row * plan.query_blocks + block
    counts = [own.visits.count[index] for own in numbers[: source + 1]]
    turn = jnp.clip(step - sum(counts[:-1]), 0, jnp.maximum(counts[-1] - 1, 0))
    return numbers[source].visits.first[index] + turn


def walk(plan: Plan, numbers: tuple[Numbers, ...], visit: Callable) -> None:
    """Calls visit(source, place, masked) if this step has a tile; masked: some of it is hidden."""
    at = tuple(pl.program_id(axis) for axis in range(4))
    _, row, block, step = at
    index = row * plan.query_blocks + block
    before = 0
    for source, (rule, own) in enumerate(zip(plan.rules, numbers, strict=True)):
        count = own.visits.count[index]
        active = (step >= before) & (step < before + count)
        key = key_block(plan, numbers, source, at)
        place = Place(block * plan.sizes.query, key * plan.sizes.key, 1)
        whole = own.visits.own[index] == own.visits.other[row * plan.key_blocks(source) + key]
        whole = whole & wholly_seen(rule, place, own, plan.sizes)
        pl.when(active & whole)(functools.partial(visit, source, place, False))
        pl.when(active & ~whole)(functools.partial(visit, source, place, True))
        before = before + count
