# SPDX-License-Identifier: Apache-2.0
"""Weights from where they are to where they go, one layer or one tensor at a time.

In any format, one tensor of the output at most lies in memory, and some blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import (
    matching,
    run_folder,
    safetensors_writer,
    transforms,
    weights,
    zarr_arrays,
)
from t5x_lite.checkpoints.formats import t5x_files
from t5x_lite.checkpoints.matching import WeightMapping
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.checkpoints.weights import Weights

# Called with the number of bytes written so far.
ProgressCallback = Callable[[int], None]


def output_dtypes(source: Weights, dtype: np.dtype | None) -> dict[str, tuple]:
    """Shape and dtype of every weight in the output: as they are, or all in `dtype`."""
    return {path: (shape, dtype or own_dtype) for path, (shape, own_dtype) in source.names.items()}


def write_run_folder(
    source: Weights,
    run: config.Run,
    folder: Path,
    dtype: np.dtype | None,
    on_progress: ProgressCallback,
    base: Mapping[str, int] | None = None,
) -> None:
    """Writes config.gin and checkpoints/0.

    Args:
      source: the weights.
      run: config to write.
      folder: the run folder.
      dtype: of all weights; None for their own.
      on_progress: called after each layer.
      base: digests of the weights that these are adapters of; None for whole weights.
    """
    names = output_dtypes(source, dtype)
    writer = run_folder.RunFolderWriter(folder, run, names, source.leaves, base)
    done = 0
    for path, leaf in source.leaves.items():
        for layer in weights.layer_numbers(leaf):
            values = source.read(path, layer)
            writer.write(path, layer, values)
            done += values.size * np.dtype(names[path][1]).itemsize
            on_progress(done)
    writer.finish()


# Weights that no vector is computed with, which other formats leave out: the temperature and the
# classifier of contrastive training.
OF_TRAINING = {f"readout/{name}" for name in ("log_temperature", "matching", "matching_bias")}


def group_by_tensor(
    source: Weights, cfg: config.Model, entries: Iterable[Entry]
) -> dict[str, list[WeightMapping]]:
    """The weights of which each tensor of the output consists.

    Args:
      source: the weights.
      cfg: config of the model.
      entries: the table of the output's format.

    Raises:
      MatchError: a weight has no place in the format and would be lost.
    """
    tensors: dict[str, list[WeightMapping]] = defaultdict(list)
    for mapping in matching.map_weights(cfg, entries, source.leaves):
        tensors[mapping.theirs].append(mapping)
    placed = {mapping.entry.ours for mappings in tensors.values() for mapping in mappings}
    lost = sorted(source.leaves.keys() - placed - OF_TRAINING)
    if lost:
        raise matching.MatchError(
            f"{', '.join(lost)}: these weights have no place in the requested format"
        )
    return tensors


def describe_tensors(
    source: Weights, tensors: Mapping[str, list[WeightMapping]], dtype: np.dtype | None
) -> dict[str, tuple]:
    """Shape and dtype of every tensor of the output.

    Args:
      source: the weights.
      tensors: the weights of which each tensor consists.
      dtype: of all tensors; None for the widest dtype of their weights.
    """
    names = {}
    for name, mappings in tensors.items():
        widest = np.result_type(*{source.names[each.entry.ours][1] for each in mappings})
        names[name] = mappings[0].tensor_shape, np.dtype(dtype or widest)
    return names


def assemble_tensor(
    source: Weights, mappings: list[WeightMapping], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """One tensor of the output, from parts of one layer or from all layers.

    Args:
      source: the weights.
      mappings: the weights of which the tensor consists.
      shape: shape of the tensor.
      dtype: its dtype.
    """
    tensor = np.empty(shape, dtype)
    for mapping in mappings:
        path = mapping.entry.ours
        values = weights.cast_weight(source.read(path, mapping.layer), dtype, path)
        position = mapping.stack_position
        layer = tensor if position is None else tensor[zarr_arrays.layer_index(position)]
        transforms.write_weight(layer, mapping.layer_entry, mapping.axes, mapping.sizes, values)
    return tensor


def write_safetensors(
    source: Weights,
    tensors: Mapping[str, list[WeightMapping]],
    folder: Path,
    names: Mapping[str, tuple],
    limit: int,
    on_progress: ProgressCallback,
) -> None:
    """Writes model.safetensors or its shards.

    Args:
      source: the weights.
      tensors: the weights of which each tensor consists.
      folder: where the files go.
      names: shape and dtype of every tensor, in the order of the files.
      limit: most bytes of a file.
      on_progress: called after each tensor.
    """
    writer = safetensors_writer.ShardWriter(folder, names, limit)
    done = 0
    for name, mappings in tensors.items():
        array = assemble_tensor(source, mappings, *names[name])
        writer.write(name, array)
        done += array.nbytes
        on_progress(done)
    writer.finish()


def write_t5x(
    source: Weights,
    tensors: Mapping[str, list[WeightMapping]],
    folder: Path,
    names: Mapping[str, tuple],
    step: int,
    on_progress: ProgressCallback,
) -> None:
    """Writes a T5X checkpoint; of a stack one layer at a time.

    Args:
      source: the weights.
      tensors: the weights of which each tensor consists.
      folder: the checkpoint to write.
      names: shape and dtype of every tensor.
      step: training step to write.
      on_progress: called after each tensor or layer.
    """
    writer = t5x_files.T5XWriter(folder, names, step)
    done = 0
    for name, mappings in tensors.items():
        shape, dtype = names[name]
        for mapping in mappings:
            position = mapping.stack_position
            layer = shape if position is None else shape[: position[0]] + shape[position[0] + 1 :]
            array = assemble_tensor(source, [mapping._replace(stack_position=None)], layer, dtype)
            writer.write(name, array, position)
            done += array.nbytes
            on_progress(done)
    writer.finish()
