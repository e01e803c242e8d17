# SPDX-License-Identifier: Apache-2.0
"""Relative position biases: T5's (Raffel et al., 2020, section 2.1), a table and bucket boundaries,
and that of ALiBi (Press et al., 2022), a slope."""

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def bucket_boundaries(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Returns the smallest distance of every bucket of one side after the first: buckets - 1 ints.

    Near distances have a bucket each, far ones share logarithmic ones. The logarithm is taken in
    float32, operation by operation as the published code does it: an integer that falls on a
    boundary goes where it goes there.

    Raises:
      ValueError: max_distance leaves no room for logarithmic buckets.
    """
    exact = buckets // 2
    if max_distance <= exact:
        raise ValueError(
            f"max_distance must be above {exact}, half of the {buckets} buckets; got {max_distance}"
        )
    whole = np.float32(math.log(max_distance / exact))

    def bucket(distance: int) -> int:
        share = np.log(np.float32(distance) / np.float32(exact)) / whole
        return exact + int(share * np.float32(buckets - exact))

    distances = range(exact, max_distance + 2)
    # No array of all distances: there may be billions.
    places = (bisect.bisect_left(distances, b, key=bucket) for b in range(exact + 1, buckets))
    logarithmic = (distances[place] for place in places)
    return (*range(1, exact + 1), *logarithmic)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table"],
    meta_fields=["max_distance", "both_sides"],
)
@dataclass(frozen=True)
class RelativePositionBias:
    """A bias for every head and every bucket of distances (key index minus query index).

    Attributes:
      table: [k n], the bias of bucket k for head n.
      max_distance: distance from which on all keys of a side share its last bucket, about.
      both_sides: half of the buckets are for keys after the query; without, those keys share the
        bucket of distance 0.
    """

    table: Float[Array, "k n"]
    max_distance: int
    both_sides: bool

    @property
    def buckets_per_side(self) -> int:
        """Number of buckets of one side."""
        return self.table.shape[0] // 2 if self.both_sides else self.table.shape[0]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The smallest distance of every bucket of one side after the first."""
        return bucket_boundaries(self.buckets_per_side, self.max_distance)

    @property
    def last_boundary(self) -> int:
        """Distance from which on, on either side, the bias no longer changes."""
        return self.boundaries[-1]

    def bucket(self, distance: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the bucket of key index minus query index: the number of boundaries passed."""
        size = jnp.abs(distance) if self.both_sides else jnp.maximum(-distance, 0)
        passed: Any = sum((size >= boundary).astype(jnp.int32) for boundary in self.boundaries)
        if not self.both_sides:
            return passed
        return passed + jnp.where(distance > 0, self.buckets_per_side, 0)

    @property
    def heads(self) -> jax.Array:
        """An array with the heads as its last axis, for their placement."""
        return self.table

    def at(self, distance: Int[Array, "..."], sharding: Any = None) -> Float[Array, "... n"]:
        """Returns the bias of key index minus query index per head, float32, placed as sharding."""
        values = self.table.astype(jnp.float32)
        return values.at[self.bucket(distance)].get(out_sharding=sharding)

    def by_distance(self, first: int | jax.Array, count: int) -> Float[Array, "n d"]:
        """Returns the bias of distances first, first + 1, ... per head, float32.

        A product with one-hot rows, not a gather: its gradient in the table is a product too.
        """
        bucket = self.bucket(first + jnp.arange(count))
        one_hot = jax.nn.one_hot(bucket, self.table.shape[0], dtype=jnp.float32)
        return jnp.einsum(
            "dk,kn->nd",
            one_hot,
            self.table.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclass(frozen=True)
class LinearPositionBias:
    """A bias that falls with distance, on either side: -slopes[n] * |distance| (ALiBi).

    slopes: [n], of each head. No kernel takes it.
    """

    slopes: Float[Array, " n"]

    @property
    def heads(self) -> jax.Array:
        """An array with the heads as its last axis, for their placement."""
        return self.slopes

    def at(self, distance: Int[Array, "..."], sharding: Any = None) -> Float[Array, "... n"]:
        """Returns the bias of key index minus query index per head, float32, placed as sharding."""
        values = -jnp.abs(distance)[..., None].astype(jnp.float32) * self.slopes
        return values if sharding is None else jax.reshard(values, sharding)

    def by_distance(self, first: int | jax.Array, count: int) -> Float[Array, "n d"]:
        """Returns the bias of distances first, first + 1, ... per head, float32."""
        return self.at(first + jnp.arange(count)).T


PositionBias = RelativePositionBias | LinearPositionBias


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns the published slopes [heads], float32: 2 ** (-8 * i / heads) for i from 1 where heads
    is a power of two, else those of the power below it and every second one of that above it."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, below + 1) / below)
    above = 2.0 ** (-4 * np.arange(1, 2 * below + 1, 2) / below)
    return np.concatenate([slopes, above[: heads - below]]).astype(np.float32)
