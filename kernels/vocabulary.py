# SPDX-License-Identifier: Apache-2.0
"""How hidden states become logits over a vocabulary, and what is known of a row without them.

A vocabulary may be split over mesh axes: then every device holds its rows of the table in the
order of `jax.lax.axis_index`, and what it knows of its part is merged by collectives.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class VocabularyRule:
    """Logits are cap * tanh(scale * hidden . table / cap), in float32; without softcap, scale *
    hidden . table.

    tied says that the table is [v d], an embedding; otherwise it is a head, [d v]. axes are the
    mesh axes over which v is split, inside a shard_map. smoothing and z_loss are the loss's.
    """

    tied: bool
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    axes: tuple[str, ...] = ()

    def local(self, table: jax.Array) -> int:
        """How many ids this device holds."""
        return table.shape[0 if self.tied else 1]

    def size(self, table: jax.Array) -> int:
        """How many ids there are on all devices together."""
        return self.local(table) * math.prod(jax.lax.axis_size(axis) for axis in self.axes)

    def first(self, table: jax.Array) -> Int[Array, ""]:
        """The first id that this device holds."""
        if not self.axes:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(self.axes).astype(jnp.int32) * self.local(table)

    def within(self, ids: Int[Array, "..."], table: jax.Array) -> Int[Array, "..."]:
        """ids counted from the first that this device holds, -1 for those it does not hold."""
        ids = ids - self.first(table)
        return jnp.where((ids >= 0) & (ids < self.local(table)), ids, -1)

    def capped(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """Logits of products hidden . table."""
        logits = products * self.scale if self.scale != 1 else products
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def uncapped(
        self, slope: Float[Array, "..."], logits: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """The gradient to the products, of the gradient to the logits."""
        if self.softcap is not None:
            slope = slope * (1 - jnp.square(logits / self.softcap))
        return slope * self.scale if self.scale != 1 else slope


class Part(NamedTuple):
    """What a part of the vocabulary tells of each row: the largest logit, the sum of exp(logit -
    peak), the target's logit (0 where it is not of this part), and the sum of the logits."""

    peak: Float[Array, " r"]
    total: Float[Array, " r"]
    chosen: Float[Array, " r"]
    sum: Float[Array, " r"]

    @property
    def log_z(self) -> Float[Array, " r"]:
        return self.peak + jnp.log(self.total)

    def merged(self, axes: tuple[str, ...]) -> "Part":
        """What all devices along axes tell together."""
        if not axes:
            return self
        peak = jax.lax.pmax(self.peak, axes)
        total = self.total * jnp.exp(self.peak - peak)
        return Part(peak, *jax.lax.psum((total, self.chosen, self.sum), axes))


class Rows(NamedTuple):
    """What the gradient to the logits of a row depends on; rows and ids broadcast together.

    heat and weight are what the softmax and the smoothed target are multiplied by.
    """

    target: Int[Array, "..."]
    log_z: Float[Array, "..."]
    heat: Float[Array, "..."]
    weight: Float[Array, "..."]

    def slope(
        self,
        logits: Float[Array, "..."],
        ids: Int[Array, "..."],
        shares: tuple[float, float],
        rule: VocabularyRule,
    ) -> Float[Array, "..."]:
        """The objective's gradient to the products hidden . table of some rows and ids.

        shares are the smoothed target's probabilities, of the target and of every other id.
        """
        soft = jnp.where(ids == self.target, *shares)
        slope = self.heat * jnp.exp(logits - self.log_z) - self.weight * soft
        return rule.uncapped(slope, logits)


def precision(operand: jax.Array) -> jax.lax.Precision | None:
    """Products of float32 keep its 24 bits; without this TPUs round them to bfloat16's 8."""
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


def alike(*operands: jax.Array) -> list[jax.Array]:
    """Operands that all vary over every mesh axis over which one of them does.

    The gradient of an operand that did not is then summed over that axis.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*varying)
    cast = lambda x, has: jax.lax.pcast(x, tuple(union - has), to="varying") if union - has else x
    return [cast(operand, has) for operand, has in zip(operands, varying, strict=True)]


def varies(operand: jax.Array, axes: tuple[str, ...]) -> bool:
    """Whether operand is known to differ over all mesh axes."""
    return set(axes) <= jax.typeof(operand).manual_axis_type.varying
