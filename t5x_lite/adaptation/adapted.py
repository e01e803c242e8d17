# SPDX-License-Identifier: Apache-2.0
"""The weights of an adapted model, made one at a time from those of other checkpoints."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.adaptation.mapping import Piece, Plan
from t5x_lite.conversion import matching
from t5x_lite.conversion.sources import SourceError
from t5x_lite.conversion.weights import Weights, blocks, same
from t5x_lite.model import positions

# How far new rows lie from the mean of the old ones, in standard deviations of each feature.
SPREAD = 0.1


class Adapted:
    """Weights as conversions read them (`conversion.weights.Weights`), one layer at a time.

    New weights, and with rows "random" those of new ids, are what `model.initialize` draws by
    `seed`. With rows "mean" a new row of an embedding is the mean m of the checkpoint's rows plus
    0.1 s n, s the standard deviation of each feature over the rows and n normal noise. The noise
    is a function of seed and the checkpoint's weight: two tables that grow from one stay equal.
    """

    def __init__(self, plan: Plan, givens: dict[str, Weights], rows: str, seed: int):
        self.plan, self.givens, self.rows, self.seed = plan, givens, rows, seed
        self.leaves = plan.leaves
        self.names = {path: (leaf.shape, self.dtype(path)) for path, leaf in self.leaves.items()}
        self.drawn: dict[str, np.ndarray] = {}

    def dtype(self, path: str) -> np.dtype:
        piece = self.plan.pieces[path]
        if piece.how == "new":
            return np.dtype(np.float32)
        return np.dtype(self.givens[piece.source].names[piece.path][1])

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """The weight, or one layer of a stacked one.

        Raises:
          SourceError: the checkpoint has two weights that differ where the model has one.
        """
        piece, values = self.plan.pieces[path], self.made(path, layer)
        if piece.scale == 1:
            return values
        one, scale = values.dtype.type(piece.plus_one), values.dtype.type(piece.scale)
        return scale * (values + one) - one

    def made(self, path: str, layer: int | None) -> np.ndarray:
        """The weight before it is scaled."""
        piece, dtype = self.plan.pieces[path], self.names[path][1]
        if piece.how == "new":
            return self.new(path, layer)
        if piece.how == "bias":
            return self.by_distance(path, piece, layer).astype(dtype)
        values = self.givens[piece.source].read(piece.path, layer)
        self.check_twins(path, piece, values)
        if piece.how == "row":
            return self.of_one_id(piece, values).astype(dtype)
        if piece.how == "grown":
            grown = self.grown(path, piece, values)
            return grown.T if piece.turned else grown
        values = values.T if piece.turned else values
        return values[: self.leaves[path].shape[0]] if path.endswith("/positions") else values

    def grown(self, path: str, piece: Piece, values: np.ndarray) -> np.ndarray:
        """values [v d] with a row for every id of the model; a head [d v] alike."""
        head = piece.path == "head"
        values = values.T if head else values
        count = self.plan.model.vocab - len(values)
        if self.rows == "random":
            drawn = self.new(path, None)
            more = (drawn.T if (path == "head") else drawn)[-count:]
        else:
            number = zlib.crc32(piece.path.encode())
            noise = np.random.default_rng([self.seed, number]).standard_normal(
                (count, values.shape[1]), np.float32
            )
            mean, deviation = moments(values)
            more = mean + SPREAD * deviation * noise
        made = np.concatenate([values, more.astype(values.dtype)])
        return made.T if head else made

    def of_one_id(self, piece: Piece, table: np.ndarray) -> np.ndarray:
        """The embedding [d] of `Model.eoi` as layers read it: that row is not scaled any more."""
        side = self.plan.side("eoi_embedding")
        row = table[self.plan.model.eoi].astype(np.float32)
        return row * np.float32(len(row) ** 0.5) if side.model.scale_embedding else row

    def by_distance(self, path: str, piece: Piece, layer: int | None) -> np.ndarray:
        """A table of relative positions [k n] from one with other buckets or of another direction.

        Every bucket becomes the mean over its distances (0 to max_distance) of what the
        checkpoint has for them; a causal table gives both sides alike, an encoder's gives a
        causal one its side of the past.
        """
        side, part = self.plan.side(path), path.partition("/")[0]
        table = self.givens[piece.source].read(piece.path, layer).astype(np.float32)
        wanted = getattr(self.plan.model, part)
        here, there = buckets(wanted, part == "encoder"), buckets(side.stack, side.both_sides)
        furthest = wanted.max_distance if part == "encoder" else 0
        distances = np.arange(-wanted.max_distance, furthest + 1)
        by_bucket = here(distances)
        known = table[there(distances if side.both_sides else -np.abs(distances))]
        made = [
            known[by_bucket == bucket].mean(axis=0)
            if (by_bucket == bucket).any()
            # Never read: a key after the query stands at distance 1 or more.
            else table[0]
            for bucket in range(wanted.buckets)
        ]
        return np.stack(made)

    def check_twins(self, path: str, piece: Piece, values: np.ndarray) -> None:
        for source, name, turned in piece.twins:
            twin = self.givens[source].read(name)
            if not same(twin.T if turned else twin, values):
                raise SourceError(
                    f"The model has one weight, {path}, for {piece.path} of Adaptation."
                    f"{piece.source} and {name} of Adaptation.{source}, but they differ. Bind "
                    f"Model.{'tied = False' if turned else 'separate_embeddings = True'}"
                )

    def new(self, path: str, layer: int | None) -> np.ndarray:
        """What training from nothing would begin with."""
        if not self.drawn:
            grown = self.rows == "random"
            hows = ("new", "grown") if grown else ("new",)
            pieces = self.plan.pieces.items()
            self.drawn = draw(
                self.plan.model, [path for path, piece in pieces if piece.how in hows], self.seed
            )
        return self.drawn[path] if layer is None else self.drawn[path][layer]


def draw(cfg: config.Model, paths: list[str], seed: int) -> dict[str, np.ndarray]:
    """Some of the weights of `model.initialize`; the others are never computed."""
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.local_devices()[:1])
    with jax.set_mesh(mesh):

        def pick(key):
            whole = matching.flat(model.initialize(cfg, key))
            return {path: whole[path] for path in paths}

        return jax.tree.map(np.asarray, jax.jit(pick)(jax.random.key(seed)))


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [d] of rows [v d], summed in float64."""
    sums = squares = np.zeros(rows.shape[1])
    for block in blocks(rows):
        wide = block.astype(np.float64)
        sums, squares = sums + wide.sum(axis=0), squares + np.square(wide).sum(axis=0)
    mean = sums / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0))


def buckets(stack: config.Stack, both_sides: bool):
    """The bucket of each distance (key minus query)."""
    table = np.zeros((stack.buckets, stack.heads), np.float32)
    relative = positions.relative(table, stack, both_sides)
    return lambda distance: np.asarray(relative.bucket(jnp.asarray(distance)))
