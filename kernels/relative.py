# SPDX-License-Identifier: Apache-2.0
"""T5's relative position bias (Raffel et al., 2020, section 2.1) as a table and integer steps."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def steps(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The first distance of every bucket of one side after the first: [buckets - 1] integers.

    Near distances have a bucket each, far ones share logarithmic ones. The logarithm is taken in
    float32, operation by operation as the published code does it: an integer that falls on a
    boundary goes where it goes there.

    Raises:
      ValueError: max_distance leaves no room for logarithmic buckets.
    """
    near = buckets // 2
    if max_distance <= near:
        raise ValueError(
            f"max_distance must be above {near}, half of the {buckets} buckets; got {max_distance}"
        )
    reach = np.arange(near, max_distance + 2)
    share = np.log(reach.astype(np.float32) / np.float32(near))
    share = share / np.float32(math.log(max_distance / near))
    bucket = near + (share * np.float32(buckets - near)).astype(np.int32)
    first = lambda wanted: int(reach[np.argmax(bucket >= wanted)])
    return (*range(1, near + 1), *(first(wanted) for wanted in range(near + 1, buckets)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table"],
    meta_fields=["max_distance", "both_sides"],
)
@dataclass(frozen=True)
class Relative:
    """A bias for every head and every bucket of distances (key index minus query index).

    With both_sides half of the buckets are for keys after the query; without, those keys share
    the bucket of distance 0.
    """

    table: Float[Array, "k n"]
    max_distance: int
    both_sides: bool

    @property
    def side(self) -> int:
        """The buckets of one side."""
        return self.table.shape[0] // 2 if self.both_sides else self.table.shape[0]

    @property
    def farthest(self) -> int:
        """From this distance on, on either side, the bias no longer changes."""
        return steps(self.side, self.max_distance)[-1]

    def bucket(self, distance: Int[Array, "..."]) -> Int[Array, "..."]:
        """The bucket of key index minus query index: a count of the steps it has passed."""
        reach = jnp.abs(distance) if self.both_sides else jnp.maximum(-distance, 0)
        passed = sum(
            (reach >= step).astype(jnp.int32) for step in steps(self.side, self.max_distance)
        )
        return passed + jnp.where(distance > 0, self.side, 0) if self.both_sides else passed

    def by_distance(self, first: int, count: int) -> Float[Array, "n d"]:
        """The bias of distances first, first + 1, ... per head, float32: linear in length.

        A product with one-hot rows, not a gather: its gradient in the table is a product too.
        """
        bucket = self.bucket(first + jnp.arange(count))
        chosen = jax.nn.one_hot(bucket, self.table.shape[0], dtype=jnp.float32)
        return jnp.einsum(
            "dk,kn->nd",
            chosen,
            self.table.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
