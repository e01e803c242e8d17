# SPDX-License-Identifier: Apache-2.0
"""The weights of an adapted model, computed one at a time from those of other checkpoints."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config, sharding
from t5x_lite.adaptation.mapping import AdaptationPlan, WeightOrigin
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.checkpoints.weights import Weights, equal_bits, new_weights, row_blocks
from t5x_lite.model import positions
from t5x_lite.tokenizers.errors import SourceError

# Noise of new rows about the mean of the old ones, in standard deviations of each feature.
SPREAD = 0.1
# Distances that are taken one by one when a table of relative positions is resampled.
NEAR = 2**16


class AdaptedWeights:
    """Weights as conversions read them (`checkpoints.weights.Weights`), one layer at a time.

    New weights, and with rows "random" those of new ids, are what `model.initialize` draws by
    `seed`. With rows "mean" a new row of an embedding is the mean m of the checkpoint's rows plus
    0.1 s n, s the standard deviation of each feature over the rows and n normal noise. The noise
    is a function of seed and of the name of the checkpoint's weight: two tables that are extended
    from the same weight stay equal.

    Attributes:
      plan: origin of every weight.
      checkpoints: weights of the sources, by field of Adaptation ("source", "encoder_source").
      rows: embeddings of new ids: "mean" or "random".
      seed: seed of new weights and of the noise.
    """

    def __init__(self, plan: AdaptationPlan, checkpoints: dict[str, Weights], rows: str, seed: int):
        self.plan, self.checkpoints, self.rows, self.seed = plan, checkpoints, rows, seed
        self.leaves = plan.leaves
        self.names = {path: (leaf.shape, self.dtype(path)) for path, leaf in self.leaves.items()}
        self.drawn: dict[str, np.ndarray] = {}

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a weight: that of its checkpoint, float32 for a new one."""
        origin = self.plan.origins[path]
        if origin.kind == "new":
            return np.dtype(np.float32)
        return np.dtype(self.checkpoints[origin.source].names[origin.path][1])

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """Returns the weight, or one layer of a stacked one.

        Raises:
          SourceError: two weights of the checkpoints differ where the model has a single one.
        """
        origin, values = self.plan.origins[path], self.read_unscaled(path, layer)
        if origin.scale == 1:
            return values
        one, scale = values.dtype.type(origin.plus_one), values.dtype.type(origin.scale)
        return scale * (values + one) - one

    def read_unscaled(self, path: str, layer: int | None) -> np.ndarray:
        """The weight before it is scaled."""
        origin, dtype = self.plan.origins[path], self.names[path][1]
        if origin.kind == "new":
            return self.draw_new(path, layer)
        if origin.kind == "bias":
            return self.resample_bias(path, origin, layer).astype(dtype)
        values = self.checkpoints[origin.source].read(origin.path, layer)
        self.check_tied(path, origin, values)
        if origin.kind == "row":
            return self.embedding_row(origin, values).astype(dtype)
        if origin.kind == "grown":
            extended = self.extend_rows(path, origin, values)
            return extended.T if origin.turned else extended
        values = values.T if origin.turned else values
        return values[: self.leaves[path].shape[0]] if path.endswith("/positions") else values

    def extend_rows(self, path: str, origin: WeightOrigin, values: np.ndarray) -> np.ndarray:
        """Adds a row for every new id of the model.

        Args:
          path: path of the model's weight.
          origin: its origin.
          values: [v d] the checkpoint's embedding, or [d v] its head.

        Returns:
          [Model.vocab d], or [d Model.vocab] for a head.
        """
        head = origin.path == "head"
        values = values.T if head else values
        count = self.plan.model.vocab - len(values)
        if self.rows == "random":
            drawn = self.draw_new(path, None)
            more = (drawn.T if (path == "head") else drawn)[-count:]
        else:
            number = zlib.crc32(origin.path.encode())
            noise = np.random.default_rng([self.seed, number]).standard_normal(
                (count, values.shape[1]), np.float32
            )
            mean, deviation = mean_and_deviation(values)
            more = mean + SPREAD * deviation * noise
        extended = np.concatenate([values, more.astype(values.dtype)])
        return extended.T if head else extended

    def embedding_row(self, origin: WeightOrigin, table: np.ndarray) -> np.ndarray:
        """The embedding [d] of `Model.eoi`, with the source's scale folded in.

        The model does not scale that row itself.
        """
        side = self.plan.side("eoi_embedding")
        row = table[self.plan.model.eoi].astype(np.float32)
        return row * np.float32(len(row) ** 0.5) if side.model.scale_embedding else row

    def resample_bias(self, path: str, origin: WeightOrigin, layer: int | None) -> np.ndarray:
        """A table of relative positions from one with other buckets or of another direction.

        Every bucket becomes the mean, over its distances (0 to max_distance), of the checkpoint's
        bias at these distances. A bidirectional table takes both sides from a causal one; a causal
        table takes the past side of an encoder's.

        Args:
          path: path of the model's table.
          origin: its origin.
          layer: layer of a stacked table; None otherwise.

        Returns:
          [buckets heads] float32.
        """
        side, part = self.plan.side(path), path.partition("/")[0]
        table = self.checkpoints[origin.source].read(origin.path, layer).astype(np.float32)
        wanted = getattr(self.plan.model, part)
        both_sides = part == "encoder" or not self.plan.model.causal_decoder
        new_buckets, old_buckets = (
            bucket_function(wanted, both_sides),
            bucket_function(side.stack, side.both_sides),
        )
        backward = -distances_up_to(wanted.max_distance)[::-1]
        forward = -backward[-2::-1] if both_sides else []
        distances = np.concatenate([backward, forward]).astype(np.int64)
        by_bucket = new_buckets(distances)
        known = table[old_buckets(distances if side.both_sides else -np.abs(distances))]
        means = [
            known[by_bucket == bucket].mean(axis=0)
            if (by_bucket == bucket).any()
            # Unused bucket: a key after the query is at distance 1 or more.
            else table[0]
            for bucket in range(wanted.buckets)
        ]
        return np.stack(means)

    def check_tied(self, path: str, origin: WeightOrigin, values: np.ndarray) -> None:
        """Checks that the checkpoints' weights that become one weight are equal.

        Args:
          path: path of the model's weight.
          origin: its origin, with the weights tied to it.
          values: the weight that is used.

        Raises:
          SourceError: one of the tied weights has other values.
        """
        for source, name, turned in origin.tied:
            other = self.checkpoints[source].read(name)
            if not equal_bits(other.T if turned else other, values):
                raise SourceError(
                    f"The model has one weight, {path}, for {origin.path} of Adaptation."
                    f"{origin.source} and {name} of Adaptation.{source}, but they differ. Bind "
                    f"Model.{'tied = False' if turned else 'separate_embeddings = True'}"
                )

    def draw_new(self, path: str, layer: int | None) -> np.ndarray:
        """The weight as pretraining would initialize it; all new weights are drawn at once."""
        if not self.drawn:
            kinds = ("new", "grown") if self.rows == "random" else ("new",)
            origins = self.plan.origins.items()
            self.drawn = draw_weights(
                self.plan.model,
                [path for path, origin in origins if origin.kind in kinds],
                self.seed,
            )
        return self.drawn[path] if layer is None else self.drawn[path][layer]


def draw_weights(cfg: config.Model, paths: list[str], seed: int) -> dict[str, np.ndarray]:
    """Some of the weights of `model.initialize`; the others are never computed.

    Args:
      cfg: config of the model.
      paths: paths of the weights to draw.
      seed: seed of the model's weights.

    Returns:
      float32 arrays by path.
    """

    def select(params: dict) -> dict:
        flat = flatten_tree(params, "/")
        return {path: flat[path] for path in paths}

    with sharding.one_device_mesh():
        return jax.tree.map(np.asarray, new_weights(cfg, seed, select))


def distances_up_to(furthest: int) -> np.ndarray:
    """Distances from 0 to the furthest; beyond NEAR, where buckets are wide, as many once more."""
    if furthest <= NEAR:
        return np.arange(furthest + 1)
    wide = np.geomspace(NEAR, furthest, NEAR).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(NEAR), wide]))


def mean_and_deviation(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [d] of rows [v d], summed in float64."""
    sums = squares = np.zeros(rows.shape[1])
    for block in row_blocks(rows):
        wide = block.astype(np.float64)
        sums, squares = sums + wide.sum(axis=0), squares + np.square(wide).sum(axis=0)
    mean = sums / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0))


def bucket_function(stack: config.Stack, both_sides: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A function from distances (key minus query) to their buckets."""
    table = jnp.zeros((stack.buckets, stack.heads))
    relative = positions.relative(table, stack, both_sides)

    def bucket(distances: np.ndarray) -> np.ndarray:
        return np.asarray(relative.bucket(jnp.asarray(distances)))

    return bucket
