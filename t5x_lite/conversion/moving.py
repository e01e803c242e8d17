# SPDX-License-Identifier: Apache-2.0
"""Weights from where they are to where they go, one layer or one tensor at a time.

Whatever the formats, what lies in memory is one tensor of the output at most, and some blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from t5x_lite import config
from t5x_lite.conversion import matching, run_folder, shards, t5x_files, transforms, weights
from t5x_lite.conversion.matching import Piece
from t5x_lite.conversion.tables import Entry
from t5x_lite.conversion.weights import Weights

Told = Callable[[int], None]


def cast_names(source: Weights, dtype: np.dtype | None) -> dict[str, tuple]:
    """What the weights are in the output: as they are, or all in dtype."""
    return {path: (shape, dtype or there) for path, (shape, there) in source.names.items()}


def to_run_folder(
    source: Weights, run: config.Run, folder: Path, dtype: np.dtype | None, told: Told
) -> None:
    """Writes config.gin and checkpoints/0 into folder; `told` hears the bytes written so far."""
    names = cast_names(source, dtype)
    writer = run_folder.RunFolder(folder, run, names, source.leaves)
    done = 0
    for path, leaf in source.leaves.items():
        for layer in weights.layers(leaf):
            values = source.read(path, layer)
            writer.write(path, layer, values)
            done += values.size * np.dtype(names[path][1]).itemsize
            told(done)
    writer.finish()


def by_tensor(
    source: Weights, cfg: config.Model, entries: Iterable[Entry]
) -> dict[str, list[Piece]]:
    """The pieces of every tensor of theirs.

    Raises:
      MatchError: a weight of ours has no place among them and would be lost.
    """
    made: dict[str, list[Piece]] = defaultdict(list)
    for piece in matching.pieces(cfg, entries, source.leaves):
        made[piece.theirs].append(piece)
    placed = {piece.entry.ours for pieces in made.values() for piece in pieces}
    lost = sorted(source.leaves.keys() - placed)
    if lost:
        raise matching.MatchError(
            f"{', '.join(lost)}: these weights have no place in the format asked for"
        )
    return made


def described(
    source: Weights, tensors: Mapping[str, list[Piece]], dtype: np.dtype | None
) -> dict[str, tuple]:
    """Shape and dtype of every tensor of theirs; the widest dtype of its parts."""
    widest = lambda pieces: np.result_type(*{source.names[p.entry.ours][1] for p in pieces})
    return {
        name: (pieces[0].whole, np.dtype(dtype or widest(pieces)))
        for name, pieces in tensors.items()
    }


def assemble(source: Weights, pieces: list[Piece], about: tuple) -> np.ndarray:
    """One tensor of theirs, put together from its pieces: parts of one layer, or all layers."""
    shape, dtype = about
    whole = np.empty(shape, dtype)
    for piece in pieces:
        values = weights.cast(source.read(piece.entry.ours, piece.layer), dtype, piece.entry.ours)
        layer = whole if piece.at is None else whole[(slice(None),) * piece.at[0] + (piece.at[1],)]
        transforms.write(layer, piece.lies, piece.axes, piece.sizes, values)
    return whole


def to_safetensors(
    source: Weights,
    tensors: Mapping[str, list[Piece]],
    folder: Path,
    names: dict[str, tuple],
    limit: int,
    told: Told,
) -> None:
    """Writes model.safetensors or its shards into folder."""
    writer = shards.Shards(folder, names, limit)
    done = 0
    for name, pieces in tensors.items():
        array = assemble(source, pieces, names[name])
        writer.write(name, array)
        done += array.nbytes
        told(done)
    writer.finish()


def to_t5x(
    source: Weights,
    tensors: Mapping[str, list[Piece]],
    folder: Path,
    names: dict[str, tuple],
    step: int,
    told: Told,
) -> None:
    """Writes a T5X checkpoint into folder; of a stack one layer at a time."""
    writer = t5x_files.Writer(folder, names, step)
    done = 0
    for name, pieces in tensors.items():
        shape, dtype = names[name]
        for piece in pieces:
            layer = (
                shape if piece.at is None else (*shape[: piece.at[0]], *shape[piece.at[0] + 1 :])
            )
            array = assemble(source, [piece._replace(at=None)], (layer, dtype))
            writer.write(name, array, piece.at)
            done += array.nbytes
            told(done)
    writer.finish()
