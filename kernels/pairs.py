# SPDX-License-Identifier: Apache-2.0
"""Sight and bias drawn as arrays over all pairs of query and key: what plain XLA reads."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.relative import Relative
from t5x_lite.kernels.sight import Sight


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["seen", "distance", "index"], meta_fields=[]
)
@dataclass(frozen=True)
class Pairs:
    """Which keys each query sees, and how far behind the query they are.

    distance is query minus key: [t s] of indexes, the same in every row, or [b t s] of positions.
    index, where it is known, says that those of row b are index[b] + i - j.
    """

    seen: Bool[Array, " b #t s"]
    distance: Int[Array, "t s"] | Int[Array, "b t s"]
    index: Int[Array, " b"] | None = None

    def within(self, reach: Int[Array, " 2"] | None) -> "Pairs":
        """The pairs among these that are within reach = (behind, ahead)."""
        if reach is None:
            return self
        behind, ahead = reach
        near = (self.distance <= behind) & (self.distance >= -ahead)
        return replace(self, seen=self.seen & near)


def pairs(sight: Sight | BlockSight) -> Pairs:
    """The pairs of a sight, drawn once for all layers that share it."""
    if isinstance(sight, Sight):
        return Pairs(sight.mask(), sight.distance())
    distance = sight.query_positions()[:, :, None] - sight.key_positions()[:, None, :]
    chain = sight.depth is None and sight.ancestors is None
    return Pairs(sight.mask(), distance, sight.index if chain else None)


def bias(relative: Relative, over: Pairs) -> Float[Array, "#b n t s"]:
    """The bias of every pair, float32.

    Of indexes, and of a chain: one value per head and distance, laid along the diagonals by
    reshaping, since a gather of every pair costs more and its gradient is a scatter. Of the
    positions of a tree: that gather.
    """
    t, s = over.distance.shape[-2:]
    if over.distance.ndim == 2:
        return along_diagonals(relative.by_distance(1 - t, t + s), t, s)[None]
    if over.index is not None:
        return along_diagonals(by_row(relative, over.index, t, s), t, s)
    bucket = relative.bucket(-over.distance)
    rows, heads = placement(bucket)[0], placement(relative.table)[1]
    placed = spread(rows, None, None, heads)
    found = relative.table.astype(jnp.float32).at[bucket].get(out_sharding=placed)
    return jnp.moveaxis(found, -1, 1)


def by_row(relative: Relative, index: Int[Array, " b"], t: int, s: int) -> Float[Array, "b n t+s"]:
    """For each row the t + s biases that its chain needs: of distances 1 - t - index[b] and on.

    Cut out of those of all distances, which the loop of decoding does not change; index is 0 to s.
    """
    values = relative.by_distance(1 - t - s, t + 2 * s)
    place = s - index[:, None] + jnp.arange(t + s)
    placed = spread(placement(index)[0], None, placement(relative.table)[1])
    found = values.T.at[place].get(mode="clip", out_sharding=placed)
    return jnp.moveaxis(found, -1, 1)


def along_diagonals(values: Float[Array, "*b n t+s"], t: int, s: int) -> Float[Array, "*b n t s"]:
    """Row i of [t s] is values from place t - 1 - i on: what belongs to distance j - i, where the
    first value is that of distance 1 - t."""
    *outer, size = values.shape
    # Row i of [t, size - 1] begins i places earlier than row i - 1.
    rows = jnp.broadcast_to(values[..., None, :], (*outer, t, size))
    rows = rows.reshape(*outer, t * size)[..., t - 1 : t - 1 + t * (size - 1)]
    return rows.reshape(*outer, t, size - 1)[..., :s]


def placement(x: jax.Array) -> tuple:
    """The mesh axes over which each axis of x is split."""
    spec = jax.typeof(x).sharding.spec.partitions
    return spec + (None,) * (x.ndim - len(spec))


def spread(*axes) -> jax.sharding.PartitionSpec | None:
    """Over which mesh axes a result is to be split, axis by axis; None where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.sharding.PartitionSpec(*axes)
