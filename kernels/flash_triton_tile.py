# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of flash attention share: their operands, tiles, masks and biases.

A tile has queries on one side and keys on the other, either way round: indices and codes of tokens
come as [r 1] or [1 c], so that the same lines say who sees whom. Rows are r, columns c; the head
size is padded to a power of two inside, as Triton wants it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import visits
from t5x_lite.kernels.flash_plan import Rule
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.tiles import How
from t5x_lite.kernels.visits import NOBODY, Sizes

# Triton's products take at least 16 numbers on every side.
FEWEST = 16


@dataclass(frozen=True)
class Plan:
    """What is known before the kernels run. head: its size, size: that as a power of two."""

    group: int
    head: int
    queries: int
    sizes: Sizes
    rules: tuple[Rule, ...]
    softcap: float | None
    how: How

    @property
    def size(self) -> int:
        return max(FEWEST, pl.next_power_of_2(self.head))

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.sizes.query)

    def key_blocks(self, source: int) -> int:
        return pl.cdiv(self.rules[source].length, self.sizes.key)

    def parameters(self, dtype) -> plgpu.CompilerParams:
        """Two stages hold two blocks of each operand; of float32 that is too much memory."""
        stages = 2 if dtype.itemsize < 4 else 1
        return plgpu.CompilerParams(num_warps=4 if self.size <= 128 else 8, num_stages=stages)


# For heads up to 64, 128 and more, by the bytes of a number. Triton 3.9 and ptxas make of these,
# with all parts of one source, programs for compute capability 8.0, 9.0, 10.0 that spill at most 8
# bytes of registers and take up to 74 KB of shared memory (the bias's gradient, on 9.0: 106).
# Float32 is multiplied exactly, outside of tensor cores: tiles of 64 by 64 spill 33 KB. Not timed.
LARGEST = {
    2: (Sizes(64, 64), Sizes(64, 32), Sizes(32, 32)),
    4: (Sizes(32, 32), Sizes(32, 16), Sizes(16, 16)),
}


def largest_sizes(size: int, dtype) -> Sizes:
    return LARGEST[dtype.itemsize][0 if size <= 64 else 1 if size <= 128 else 2]


class Operand(NamedTuple):
    """A source, or the references to its arrays.

    bias: by key index minus query index, from the farthest distance behind to the same ahead;
    place: the offset of queries, and the reach behind and ahead; first and count: the run of blocks
    of the other side, for every block of one side.
    """

    k: Float[Array, "b k s h"]
    v: Float[Array, "b k s h"]
    query_codes: Int[Array, "b t2"]
    key_codes: Int[Array, "b s2"]
    bias: Float[Array, "n d"] | None
    place: Int[Array, " 3"]
    first: Int[Array, " m"]
    count: Int[Array, " m"]

    @property
    def farthest(self) -> int:
        return self.bias.shape[1] // 2


def operands_of(k, v, bias, sight: Sight, sizes: Sizes) -> tuple[Operand, Operand]:
    """A source for kernels whose programs have a block of queries, and for those of keys."""
    codes = visits.codes(sight, sizes)
    needed = visits.needed(sight, codes, sizes)
    reach = (0, 0) if sight.reach is None else sight.reach
    offset = 0 if sight.offset is None else sight.offset
    place = jnp.stack([jnp.int32(x) for x in (offset, *reach)])
    arrays = (k, v, codes.query[:, 0], codes.key[:, 0], bias, place)
    other = jnp.swapaxes(needed, 1, 2)
    return Operand(*arrays, *visits.runs(needed)), Operand(*arrays, *visits.runs(other))


class Head(NamedTuple):
    """A query head of one row of the batch; member: which one of its key head's group."""

    batch: Int[Array, ""]
    key_head: Int[Array, ""]
    member: Int[Array, ""]


def head_of(plan: Plan, batch, head) -> Head:
    group = jnp.int32(plan.group)
    return Head(batch, jax.lax.div(head, group), jax.lax.rem(head, group))


class Tokens(NamedTuple):
    """The indices and codes of a block of queries or keys, along rows or along columns."""

    index: Int[Array, " #r #c"]
    code: Int[Array, " #r #c"]

    @property
    def upright(self) -> "Tokens":
        return Tokens(self.index[:, None], self.code[:, None])

    @property
    def flat(self) -> "Tokens":
        return Tokens(self.index[None, :], self.code[None, :])


def span(first, length: int) -> Int[Array, " r"]:
    return first + jnp.arange(length)


def tokens(codes, batch, index) -> Tokens:
    """Tokens by their indices, which may be beyond either end: nobody is there."""
    inside = (index >= 0) & (index < codes.shape[1])
    return Tokens(index, plgpu.load(codes.at[batch, index], mask=inside, other=NOBODY))


def corner(plan: Plan, x, index, axis: int) -> tuple[tuple, Bool[Array, "r h"]]:
    """Columns of a block of x, and where rows `index` of this axis and columns exist."""
    column = jnp.arange(plan.size)[None, :]
    exists = (index >= 0) & (index < x.shape[axis])
    return column, exists[:, None] & (column < plan.head)


def load_queries(plan: Plan, x, head: Head, index):
    """Rows of x [b t k g h], with 0 for those there are not."""
    column, exists = corner(plan, x, index, 1)
    at = x.at[head.batch, index[:, None], head.key_head, head.member, column]
    return plgpu.load(at, mask=exists, other=0.0)


def store_queries(plan: Plan, x, head: Head, index, value) -> None:
    column, exists = corner(plan, x, index, 1)
    at = x.at[head.batch, index[:, None], head.key_head, head.member, column]
    plgpu.store(at, value.astype(x.dtype), mask=exists)


def load_keys(plan: Plan, x, head: Head, index):
    """Rows of x [b k s h], with 0 for those there are not."""
    column, exists = corner(plan, x, index, 2)
    at = x.at[head.batch, head.key_head, index[:, None], column]
    return plgpu.load(at, mask=exists, other=0.0)


def store_keys(plan: Plan, x, head: Head, index, value) -> None:
    column, exists = corner(plan, x, index, 2)
    at = x.at[head.batch, head.key_head, index[:, None], column]
    plgpu.store(at, value.astype(x.dtype), mask=exists)


def statistics_at(plan: Plan, x, head: Head, index):
    """Where numbers per query lie in x [b n t], and which of them exist."""
    inside = (index >= 0) & (index < x.shape[2])
    return x.at[head.batch, head.key_head * plan.group + head.member, index], inside


def load_statistics(plan: Plan, x, head: Head, index) -> Float[Array, " r"]:
    at, inside = statistics_at(plan, x, head, index)
    return plgpu.load(at, mask=inside, other=0.0)


def seen(rule: Rule, source: Operand, queries: Tokens, keys: Tokens) -> Bool[Array, "r c"]:
    """The pairs that may see each other."""
    if rule.prefix:
        near = ((queries.code ^ keys.code) & -2) == 0
    else:
        near = queries.code == keys.code
    if not (rule.causal or rule.reach):
        return near
    distance = distances(source, queries, keys)
    if rule.causal:
        past = distance <= 0
        near &= past | ((queries.code & keys.code & 1) != 0) if rule.prefix else past
    if rule.reach:
        near &= (distance >= -source.place[1]) & (distance <= source.place[2])
    return near


def distances(source: Operand, queries: Tokens, keys: Tokens) -> Int[Array, "r c"]:
    """Key index minus query index, both among the keys."""
    return keys.index - queries.index - source.place[0]


def bias_of(plan: Plan, source: Operand, head: Head, distance) -> Float[Array, "r c"] | None:
    """The bias of every pair; a vector of a few hundred numbers, so it is read from the cache."""
    if source.bias is None:
        return None
    near = jnp.clip(distance, -source.farthest, source.farthest) + source.farthest
    return plgpu.load(source.bias.at[head.key_head * plan.group + head.member, near])
