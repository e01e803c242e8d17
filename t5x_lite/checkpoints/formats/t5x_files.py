# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints on disk, read and written without T5X (t5x/checkpoints.py, version 3).

checkpoint_<step>/checkpoint is msgpack: a tree whose leaves are arrays, or say where one lies in a
folder beside it: a TensorStore spec (T5X's own writer) or "PLACEHOLDER://name" (orbax's first). The
newest T5X has no such file but orbax's tree in state/.
"""

import ast
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from t5x_lite.checkpoints import zarr_arrays
from t5x_lite.checkpoints.kinds import T5X_STATE, T5X_TREE
from t5x_lite.checkpoints.weight_paths import nest_tree
from t5x_lite.tokenizers.errors import SourceError, describe_error
from t5x_lite.utils import bounded_files
from t5x_lite.utils.paths import parse_path

PLACEHOLDER = "PLACEHOLDER://"
# As T5X writes them.
GZIP = {"id": "gzip", "level": 1}
VERSION = 3
# Larger ones have all arrays inside; T5X writes those of a model beside the tree.
TREE_LIMIT = 2**33
# Characters of the path of an array; Python's parser takes deeply nested brackets badly.
MOST_KEY = 500
# Names in a warning.
SHOWN = 4


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: the path itself, or the newest if it is a MODEL_DIR; or a tree.

    Raises:
      SourceError: there is none.
    """
    path = parse_path(path)
    if path.is_file() or (path / T5X_TREE).is_file() or (path / T5X_STATE).is_dir():
        return path
    folders = [p for p in path.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", p.name)]
    if folders:
        return max(folders, key=lambda each: int(each.name.rpartition("_")[2]))
    raise SourceError(
        f"{path} is not a T5X checkpoint: it has neither a file checkpoint nor folders checkpoint_*"
    )


class T5XTensors:
    """Weights of a T5X checkpoint by path, "decoder/layers_0/mlp/wo/kernel".

    Raises:
      SourceError: there is no checkpoint, or it is broken or of an old version.
    """

    def __init__(self, path: str | Path):
        self.path = find_checkpoint(path)
        has_tree = self.path.is_file() or self.has_tree()
        leaves = open_tree(self.path) if has_tree else open_orbax(self.path)
        check_places(self.path, leaves)
        self.inline: dict[str, np.ndarray] = {}
        self.stored: dict[str, zarr_arrays.ArrayReader] = {}
        for name, leaf in leaves.items():
            if isinstance(leaf, zarr_arrays.ArrayReader):
                self.stored[name] = leaf
            else:
                self.inline[name] = leaf
        warn_of_gaps(self.path, self.stored)
        self.names = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()
        }

    def has_tree(self) -> bool:
        return (self.path / T5X_TREE).is_file() or (self.path / T5X_STATE / T5X_TREE).is_file()

    def read(self, name: str, position: zarr_arrays.LayerPosition = None) -> np.ndarray:
        if name in self.inline:
            return self.inline[name][zarr_arrays.layer_index(position)]
        return self.stored[name].read(position)


def check_places(path: Path, leaves: Mapping[str, Any]) -> None:
    """Raises SourceError where two weights lie in one folder: each has its own."""
    names: dict[str, str] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, zarr_arrays.ArrayReader):
            first = names.setdefault(leaf.location, name)
            if first != name:
                raise SourceError(f"{path}: {first} and {name} both lie in {leaf.location}")


def warn_of_gaps(path: Path, stored: Mapping[str, zarr_arrays.ArrayReader]) -> None:
    """Warns of weights without all of their files: T5X writes none for zeros, and a copy that was
    cut off has none either."""
    gaps = [name for name, reader in stored.items() if not reader.is_complete()]
    if gaps:
        more = f" and {len(gaps) - SHOWN} more" if len(gaps) > SHOWN else ""
        warnings.warn(
            f"{path}: files of {', '.join(gaps[:SHOWN])}{more} are missing and are read as zeros. "
            "T5X leaves out files of zeros; if these weights were none, copy the checkpoint again",
            stacklevel=3,
        )


def open_tree(path: Path) -> dict[str, Any]:
    """Every weight of a msgpack tree: an array, or the reader of one beside it."""
    file = path if path.is_file() else path / T5X_TREE
    file = file if file.is_file() else path / T5X_STATE / T5X_TREE
    tree = read_msgpack(file)
    arrays = {}
    try:
        leaves = flatten_leaves(find_weights(tree, file))
    except RecursionError as error:
        raise SourceError(f"{file} is not a T5X checkpoint: it nests too deep") from error
    for name, leaf in leaves.items():
        try:
            arrays[name] = open_leaf(leaf, name, file.parent)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{file}: {name} cannot be read: {describe_error(error)}") from error
    return arrays


def read_msgpack(file: Path) -> dict:
    """The tree in a file of msgpack.

    Raises:
      SourceError: it is another kind of file, or broken.
    """
    if file.stat().st_size > TREE_LIMIT:
        raise SourceError(f"{file} is {file.stat().st_size:,} bytes: no T5X tree is so large")
    content = file.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise SourceError(
            f"{file} belongs to a TensorFlow checkpoint (Mesh TensorFlow's T5): save it with T5X "
            "first, or convert it from Hugging Face"
        )
    try:
        tree = serialization.msgpack_restore(content)
        if not isinstance(tree, dict):
            raise ValueError(f"it holds {type(tree).__name__}")
        return tree
    except Exception as error:  # msgpack and numpy raise many kinds for bytes they do not know
        raise SourceError(f"{file} is not a T5X checkpoint: {describe_error(error)}") from error


def find_weights(tree: dict, file: Path) -> dict:
    """The weights in a tree, without optimizer and step."""
    version = tree.get("version", VERSION)
    if not isinstance(version, int) or version not in (2, VERSION):
        raise SourceError(
            f"{file} is of version {str(version)[:80]} of T5X checkpoints; 2 and 3 are read. T5X "
            "itself does not read older ones any more"
        )
    inner = tree.get("optimizer", tree.get("_optimizer", tree))
    weights = inner.get("target", inner.get("params")) if isinstance(inner, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise SourceError(f"{file} has no weights: it lacks a tree optimizer/target")
    return weights.get("params", weights) if set(weights) == {"params"} else weights


def is_spec(value: Any) -> bool:
    """True for TensorStore's spec of an array."""
    return isinstance(value, dict) and {"driver", "kvstore"} <= set(value)


def flatten_leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree by path, in the order of the tree; specs of arrays are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not is_spec(value):
            leaves |= flatten_leaves(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def open_leaf(leaf: Any, name: str, folder: Path) -> Any:
    """Opens a leaf of the tree.

    Args:
      leaf: an array, a spec of one, or its name after PLACEHOLDER.
      name: path of the leaf.
      folder: folder of the tree.

    Returns:
      The array, or the reader of the one that the leaf names.

    Raises:
      ValueError: it is none of these, or the array is not as the spec says.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
        return zarr_arrays.ArrayReader(
            folder, check_folder_name(leaf.removeprefix(PLACEHOLDER)), ocdbt=False
        )
    if is_spec(leaf):
        if leaf["driver"] != "zarr":
            raise ValueError(f"its driver is {leaf['driver']!r}, not zarr")
        # Before TensorStore 0.1.14 the path stood beside the store, as it still does for gcs.
        reader = zarr_arrays.ArrayReader(
            folder, check_folder_name(leaf["kvstore"].get("path") or leaf["path"]), False
        )
        shape = tuple(leaf.get("metadata", {}).get("shape", reader.shape))
        if shape != reader.shape:
            raise ValueError(f"its shape is {reader.shape} and should be {shape}")
        if reader.dtype == np.uint16:
            raise ValueError("it is bfloat16 kept as uint16 (T5X before 2021-06), not read here")
        return reader
    raise ValueError(f"it is {type(leaf).__name__}, neither an array nor the name of one")


def check_folder_name(path: str) -> str:
    """The name of a folder beside the tree; raises ValueError if it leads anywhere else."""
    name = path.rstrip("/")
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"its path {path!r} is not a folder beside the checkpoint")
    return name


def open_orbax(path: Path) -> dict[str, Any]:
    """The reader of every weight in the newest layout: orbax's tree in state/."""
    folder = path / T5X_STATE if (path / T5X_STATE).is_dir() else path
    try:
        metadata = bounded_files.read_json_object(folder / "_METADATA")
        keys = [parse_key(key) for key in metadata["tree_metadata"]]
        ocdbt = bool(metadata.get("use_ocdbt", (folder / "manifest.ocdbt").exists()))
        named = {tuple(map(str, key)): key for key in keys if key[0] in ("target", "params")}
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, IndexError) as error:
        raise SourceError(f"{folder} is not a T5X checkpoint: {describe_error(error)}") from error
    if not named:
        raise SourceError(f"{folder} has no weights: there is nothing under target in it")
    try:
        arrays = {"/".join(key[1:]): check_folder_name(".".join(key)) for key in named}
    except ValueError as error:
        raise SourceError(f"{folder}: {error}") from error
    return {name: zarr_arrays.ArrayReader(folder, array, ocdbt) for name, array in arrays.items()}


def parse_key(text: str) -> tuple:
    """The path of an array, of orbax's text of a tuple: "('target', 'decoder', ...)".

    Raises:
      ValueError: it is another text, or longer than any path.
    """
    if len(text) > MOST_KEY:
        raise ValueError(f"a path of {len(text):,} characters")
    key = ast.literal_eval(text)
    if not isinstance(key, tuple) or not all(isinstance(part, str | int) for part in key):
        raise ValueError(f"{text[:80]!r} is not a path")
    return key


class T5XWriter:
    """Writes weights as T5X does: an array in a folder of its own each, and the tree last."""

    def __init__(self, folder: Path, names: Mapping[str, tuple], step: int):
        """Writes nothing yet.

        Args:
          folder: the checkpoint.
          names: shape and dtype of every tensor.
          step: training step that the tree says.
        """
        self.folder, self.names, self.step = folder, names, step
        self.writers: dict[str, zarr_arrays.ArrayWriter] = {}

    def write(
        self, name: str, values: np.ndarray, position: zarr_arrays.LayerPosition = None
    ) -> None:
        """Writes a tensor, or one layer of a stack.

        Args:
          name: name of the tensor.
          values: its values, or those of the layer.
          position: axis of the layers, and the layer; None for all of the tensor.
        """
        shape, dtype = self.names[name]
        if name not in self.writers:
            self.writers[name] = zarr_arrays.ArrayWriter(
                self.folder,
                stored_name(name),
                shape,
                dtype,
                stacked=None if position is None else position[0],
                compressor=GZIP,
            )
        self.writers[name].write(values, None if position is None else position[1])

    def finish(self) -> None:
        """Writes the tree."""
        specs = {name: tensorstore_spec(name, writer) for name, writer in self.writers.items()}
        state = {"step": np.int32(self.step), "param_states": {}}
        optimizer = {"state": state, "target": nest_tree(specs, "/")}
        content = serialization.msgpack_serialize({"version": VERSION, "optimizer": optimizer})
        (self.folder / T5X_TREE).write_bytes(content)


def stored_name(name: str) -> str:
    """The folder of an array."""
    return f"target.{name.replace('/', '.')}"


def tensorstore_spec(name: str, writer: zarr_arrays.ArrayWriter) -> dict[str, Any]:
    """The tree's spec of an array, with a relative path, so that the checkpoint can be moved."""
    return {
        "driver": "zarr",
        "dtype": np.dtype(writer.dtype).name,
        "kvstore": {"driver": "file", "path": f"{stored_name(name)}/"},
        "metadata": {
            "chunks": list(writer.chunks),
            "compressor": GZIP,
            "shape": list(writer.shape),
        },
    }
