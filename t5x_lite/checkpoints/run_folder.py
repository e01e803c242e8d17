# SPDX-License-Identifier: Apache-2.0
"""Run folders of ours as a source and as an output of conversions, layer by layer.

A converted checkpoint is laid out as orbax lays out one that training saved, with a file for each
layer, and with metadata whose digests are summed up while it is written.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import (
    checkpoint_io,
    manager,
    matching,
    selection,
    step_folders,
    zarr_arrays,
)
from t5x_lite.checkpoints.checkpoint_io import CheckpointMetadata, DamagedCheckpointError
from t5x_lite.checkpoints.digests import MIXED, combine_digests, row_digests, stored_digest
from t5x_lite.checkpoints.matching import Leaf
from t5x_lite.checkpoints.weights import cast_weight, row_blocks
from t5x_lite.config import gin_file
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils import bounded_files
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path

STEP = 0
# Begins the names of the averaged copy in the item "rest".
AVERAGE = "average."
# Fields of a model on which no trained weight depends: an edit of config.gin may change them.
EDITABLE = ("dtype", "attention", "dropout")


def read_run_config(folder: str | Path) -> config.Run:
    """The config that a run was saved with.

    Raises:
      ValueError: the folder has none, or it cannot be read.
    """
    path = parse_path(folder) / "config.gin"
    if not path.exists():
        raise ValueError(
            f"{folder} is not the MODEL_DIR of a run: it has no {path.name}. Train one first, for "
            "example: python -m t5x_lite.train --gin_file=configs/runs/g2p.gin "
            f"--gin.MODEL_DIR={folder}"
        )
    try:
        bounded_files.check_regular(path, gin_file.MOST_BYTES)
        return gin_file.from_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def with_saved_model(run: config.Run, folder: Path) -> config.Run:
    """The run with the model that a checkpoint was saved with, where config.gin was changed since.

    A warning names the fields. What no trained weight depends on is as config.gin has it.

    Args:
      run: config of the run folder.
      folder: the checkpoint, named by its step.
    """
    saved = (read_saved_run(folder) or run).model
    if changes := list_changes(saved, run.model):
        warnings.warn(
            f"config.gin of {folder.parent.parent} was changed after step {folder.name} was saved "
            f"and is not followed: {changes}. To train on with another model, name the folder in "
            "INITIAL_CHECKPOINT_PATH of a new run",
            stacklevel=3,
        )
    kept = {name: getattr(run.model, name) for name in EDITABLE}
    return dataclasses.replace(run, model=dataclasses.replace(saved, **kept))


def warn_of_vocabulary(folder: Path, checkpoint: Path) -> None:
    """Warns where a run folder has other vocabularies than a checkpoint was saved with.

    Args:
      folder: the run folder.
      checkpoint: the checkpoint, named by its step.
    """
    try:
        saved = checkpoint_io.read_metadata(checkpoint).vocabulary
    except checkpoint_io.CheckpointError:  # its reader reports it
        return
    if saved is not None and saved != step_folders.vocabulary_digest(folder):
        warnings.warn(
            f"The files in {folder / step_folders.VOCABULARY_FOLDER} are not those that step "
            f"{checkpoint.name} was trained with: its texts may be read and written wrongly. Copy "
            "the folder again from where the run was trained",
            stacklevel=3,
        )


def read_saved_run(folder: Path) -> config.Run | None:
    """The config that a checkpoint was saved with.

    None for a damaged one, which its reader reports, and for a config that this version cannot
    read: config.gin may have been edited for that.
    """
    try:
        return gin_file.from_text(checkpoint_io.read_metadata(folder).config)
    except ValueError:
        return None


def list_changes(saved: config.Model, edited: config.Model) -> str:
    """Fields that an edit must not change and that two models differ in, with both values."""
    changes = []
    for part in (None, "encoder", "decoder"):
        pair = [getattr(model, part) if part else model for model in (saved, edited)]
        if None in pair:
            changes += [f"Model.{part} is there in one of them"] if any(pair) else []
            continue
        before, after = pair
        owner = f"{part}'s Stack" if part else "Model"
        for name, value in vars(before).items():
            other = getattr(after, name)
            if name not in ("encoder", "decoder", *EDITABLE) and value != other:
                changes.append(f"{owner}.{name} = {other!r}, saved as {value!r}")
    return ", ".join(changes)


def model_only_run(folder: str | Path, cfg: config.Model) -> config.Run:
    """A run that has a model and nothing to train it with."""
    return config.Run(model_dir=str(folder), model=cfg)


class SavedWeights:
    """Weights of a checkpoint in a run folder: of the newest one, or that of `step`.

    Every weight's digest is compared when its last layer was read.
    """

    def __init__(
        self,
        folder: str | Path,
        step: int | None = None,
        leaves: dict[str, Leaf] | None = None,
        averaged: bool = False,
    ):
        """Reads the metadata of the checkpoint.

        Args:
          folder: the run folder.
          step: which checkpoint; None for the newest.
          leaves: axis names and shape of what trained; None for all weights of the model.
          averaged: read the averaged copy that Train.average keeps, where a weight has one.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or it is not of the model of its
            config.
        """
        run = read_run_config(folder)
        self.step = selection.select_steps(folder, step)[0]
        self.folder = parse_path(folder) / manager.FOLDER / str(self.step)
        self.run = with_saved_model(run, self.folder)
        metadata = checkpoint_io.read_metadata(self.folder)
        self.leaves = matching.model_leaves(self.run.model) if leaves is None else leaves
        shapes = {path: leaf.shape for path, leaf in self.leaves.items()}
        # Metadata of each weight by our path, as `checkpoint_io.describe_arrays` has them.
        self.described = {
            name.replace(".", "/"): array for name, array in metadata.arrays["params"].items()
        }
        # Item and name of each weight that is not read from "params".
        self.places: dict[str, tuple[str, str]] = {}
        if averaged:
            self.read_averaged(metadata)
        if shapes != {path: tuple(each["shape"]) for path, each in self.described.items()}:
            raise SourceError(f"{self.folder} is not of the model in {folder}/config.gin")
        self.names = {
            path: (shape, np.dtype(self.described[path]["dtype"])) for path, shape in shapes.items()
        }
        self.readers: dict[str, zarr_arrays.ArrayReader] = {}
        self.digests: dict[str, dict[int | None, int]] = {}

    def read_averaged(self, metadata: CheckpointMetadata) -> None:
        """From now on the averaged copy is read in place of the weights that it is of.

        Raises:
          CheckpointError: the checkpoint has none.
        """
        rest = metadata.arrays["rest"] if "rest" in metadata.arrays else {}
        copies = {n.removeprefix(AVERAGE): n for n in rest if n.startswith(AVERAGE)}
        if not copies:
            raise checkpoint_io.CheckpointError(
                f"{self.folder} has no averaged copy of its weights: a run keeps one with "
                "config.Train.average = @config.WeightAverage()"
            )
        for name, stored in copies.items():
            path = name.replace(".", "/")
            self.places[path] = "rest", stored
            self.described[path] = rest[stored]

    def leave_out(self, part: str) -> None:
        """From now on the weights of this part are not among those that are read."""
        paths = [path for path in self.leaves if path.partition("/")[0] != part]
        self.leaves = {path: self.leaves[path] for path in paths}
        self.names = {path: self.names[path] for path in paths}

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        try:
            values = self.read_values(path, layer)
        except SourceError as error:
            problem = checkpoint_io.reading_error(self.folder, self.folder / "params", error)
            damaged = isinstance(problem, DamagedCheckpointError)
            raise (error if damaged else problem) from error
        self.check_digest(path, layer, values)
        return values

    def read_values(self, path: str, layer: int | None) -> np.ndarray:
        """Values of a weight, or of one layer of it."""
        if path not in self.readers:
            item, name = self.places.get(path, ("params", path.replace("/", ".")))
            ocdbt = (self.folder / item / "manifest.ocdbt").exists()
            self.readers[path] = zarr_arrays.ArrayReader(self.folder / item, name, ocdbt)
        reader = self.readers[path]
        if (reader.shape, reader.dtype) != self.names[path]:
            raise DamagedCheckpointError(
                f"{reader.location} is not of the shape or dtype that was saved"
            )
        return reader.read(None if layer is None else (0, layer))

    def check_digest(self, path: str, layer: int | None, values: np.ndarray) -> None:
        """Compares the digest of a weight after its last layer.

        Args:
          path: path of the weight.
          layer: the layer that was read; None for a weight that is not stacked.
          values: its values.

        Raises:
          DamagedCheckpointError: all of the weight was read and is not what was saved.
        """
        digests = self.digests.setdefault(path, {})
        if layer in digests:
            return
        stored, mixed = stored_digest(self.described[path])
        rows = [row_digests(block, mixed) for block in row_blocks(np.atleast_1d(values))]
        digests[layer] = combine_digests(dict(enumerate(np.concatenate(rows).tolist())), mixed)
        if layer is not None and len(digests) < not_none(self.leaves[path].layers):
            return
        del self.readers[path]
        if combine_digests(digests, mixed) != stored:
            raise DamagedCheckpointError(
                f"{self.folder}: the bits of {path} are not those that were saved"
            )


class RunFolderWriter:
    """Writes a run folder: config, weights and metadata. Vocabularies are written beside them."""

    def __init__(
        self,
        folder: Path,
        run: config.Run,
        names: dict[str, tuple],
        leaves: dict[str, Leaf],
        base: Mapping[str, int] | None = None,
    ):
        """Creates the folder of the weights.

        Args:
          folder: the run folder to write.
          run: config to write.
          names: shape and dtype of every weight as it is stored.
          leaves: axis names and shape of every weight.
          base: digests of the weights that these are adapters of; None for whole weights.
        """
        self.base = dict(base or {})
        self.params = folder / manager.FOLDER / str(STEP) / "params"
        self.params.mkdir(parents=True)
        self.folder, self.run, self.names, self.leaves = folder, run, names, leaves
        self.digests: dict[str, dict[int | None, int]] = {path: {} for path in names}
        self.writers: dict[str, zarr_arrays.ArrayWriter] = {}

    def write(self, path: str, layer: int | None, values: np.ndarray) -> None:
        """Writes one weight, or one layer of it.

        Args:
          path: path of the weight.
          layer: the layer; None for a weight that is not stacked.
          values: its values, in any dtype.
        """
        shape, dtype = self.names[path]
        if path not in self.writers:
            stacked = None if self.leaves[path].layers is None else 0
            self.writers[path] = zarr_arrays.ArrayWriter(
                self.params, path.replace("/", "."), shape, dtype, stacked=stacked
            )
        rows: dict[int | None, int] = {}

        def add_digests(first_row: int, block: np.ndarray) -> None:
            for offset, value in enumerate(row_digests(block)):
                rows[first_row + offset] = int(value)

        self.writers[path].write(cast_weight(values, dtype, path), layer, add_digests)
        self.digests[path][layer] = combine_digests(rows)

    def finish(self) -> None:
        """Writes what makes the arrays a checkpoint, the config last."""
        stored = {path.replace("/", "."): tensor for path, tensor in self.names.items()}
        (self.params / "_METADATA").write_text(json.dumps(orbax_metadata(stored)))
        metadata = CheckpointMetadata(
            step=STEP,
            config=gin_file.to_text(self.run),
            base=self.base,
            arrays={
                "params": {
                    path.replace("/", "."): {
                        "shape": list(shape),
                        "dtype": np.dtype(dtype).name,
                        MIXED: combine_digests(self.digests[path]),
                    }
                    for path, (shape, dtype) in self.names.items()
                }
            },
        )
        folder = self.params.parent / "note"
        folder.mkdir()
        content = json.dumps(checkpoint_io.metadata_json(metadata))
        (folder / "metadata").write_text(content)
        (folder.parent / step_folders.COMMITTED).write_text("")
        (self.folder / "config.gin").write_text(metadata.config, encoding="utf-8")


def orbax_metadata(stored: dict[str, tuple]) -> dict[str, Any]:
    """The file that orbax reads first: the tree of arrays, each of them in a folder of its own."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
        for name, (shape, _) in stored.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
