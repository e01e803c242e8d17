# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints on disk, read and written without T5X (t5x/checkpoints.py, version 3).

checkpoint_<step>/checkpoint is msgpack: a tree whose leaves are arrays, or say where one lies in a
folder beside it: a TensorStore spec (T5X's own writer) or "PLACEHOLDER://name" (orbax's first). The
newest T5X has no such file but orbax's tree in state/.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from t5x_lite.conversion import arrays
from t5x_lite.conversion.sources import SourceError, told

TREE = "checkpoint"
STATE = "state"
PLACEHOLDER = "PLACEHOLDER://"
# As T5X writes them.
GZIP = {"id": "gzip", "level": 1}
VERSION = 3
# Larger ones are of whole arrays inside; T5X writes those of a model beside it.
TREE_LIMIT = 2**33


def find(path: str | Path) -> Path:
    """The folder of a checkpoint: path, or the newest in the MODEL_DIR path, or a tree itself.

    Raises:
      SourceError: there is none.
    """
    path = Path(path)
    if path.is_file() or (path / TREE).is_file() or (path / STATE).is_dir():
        return path
    found = [p for p in path.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", p.name)]
    if found:
        return max(found, key=lambda each: int(each.name.rpartition("_")[2]))
    raise SourceError(
        f"{path} is no T5X checkpoint: it has neither a file checkpoint nor folders checkpoint_*"
    )


class Source:
    """The weights of a T5X checkpoint by path, "decoder/layers_0/mlp/wo/kernel".

    Raises:
      SourceError: there is no checkpoint, or it is broken or of an old version.
    """

    def __init__(self, path: str | Path):
        self.path = find(path)
        opened = spread(self.path) if self.path.is_file() or self.tree() else orbax(self.path)
        self.inline: dict[str, np.ndarray] = {}
        self.stored: dict[str, arrays.Reader] = {}
        for name, leaf in opened.items():
            if isinstance(leaf, arrays.Reader):
                self.stored[name] = leaf
            else:
                self.inline[name] = leaf
        self.names = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in opened.items()
        }

    def tree(self) -> bool:
        return (self.path / TREE).is_file() or (self.path / STATE / TREE).is_file()

    def read(self, name: str, at: arrays.At = None) -> np.ndarray:
        if name in self.inline:
            return self.inline[name][arrays.place(at)]
        return self.stored[name].read(at)


def spread(path: Path) -> dict[str, Any]:
    """Every weight of a msgpack tree: an array, or the reader of one beside it."""
    file = path if path.is_file() else path / TREE
    file = file if file.is_file() else path / STATE / TREE
    tree = restored(file)
    found = {}
    for name, leaf in leaves(target(tree, file)).items():
        try:
            found[name] = opened(leaf, name, file.parent)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{file}: {name} cannot be read: {told(error)}") from error
    return found


def restored(file: Path) -> dict:
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
        raise SourceError(f"{file} is no T5X checkpoint: {told(error)}") from error


def target(tree: dict, file: Path) -> dict:
    """The weights in a tree, without optimizer and step."""
    if tree.get("version", VERSION) not in (2, VERSION):
        raise SourceError(
            f"{file} is of version {tree['version']} of T5X checkpoints; 2 and 3 are read. T5X "
            "itself does not read older ones any more"
        )
    inner = tree.get("optimizer", tree.get("_optimizer", tree))
    weights = inner.get("target", inner.get("params")) if isinstance(inner, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise SourceError(f"{file} has no weights: there is no tree optimizer/target in it")
    return weights.get("params", weights) if set(weights) == {"params"} else weights


def is_spec(value: Any) -> bool:
    return isinstance(value, dict) and {"driver", "kvstore"} <= set(value)


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not is_spec(value):
            found |= leaves(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def opened(leaf: Any, name: str, folder: Path) -> Any:
    """A leaf of the tree as an array, or as the reader of the one it names."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
        return arrays.Reader(folder, inside(leaf.removeprefix(PLACEHOLDER)), ocdbt=False)
    if is_spec(leaf):
        if leaf["driver"] != "zarr":
            raise ValueError(f"its driver is {leaf['driver']!r}, not zarr")
        # Before TensorStore 0.1.14 the path stood beside the store, as it still does for gcs.
        reader = arrays.Reader(folder, inside(leaf["kvstore"].get("path") or leaf["path"]), False)
        said = tuple(leaf.get("metadata", {}).get("shape", reader.shape))
        if said != reader.shape:
            raise ValueError(f"its shape is {reader.shape} and should be {said}")
        if reader.dtype == np.uint16:
            raise ValueError("it is bfloat16 kept as uint16 (T5X before 2021-06), not read here")
        return reader
    raise ValueError(f"it is {type(leaf).__name__}, neither an array nor the place of one")


def inside(path: str) -> str:
    """A folder's name beside the tree; ValueError if it leads anywhere else."""
    name = path.rstrip("/")
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"its path {path!r} is no folder beside the checkpoint")
    return name


def orbax(path: Path) -> dict[str, Any]:
    """Every weight of the newest layout: orbax's tree in state/."""
    folder = path / STATE if (path / STATE).is_dir() else path
    try:
        about = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
        keys = [ast.literal_eval(key) for key in about["tree_metadata"]]
        ocdbt = bool(about.get("use_ocdbt", (folder / "manifest.ocdbt").exists()))
        named = {tuple(map(str, key)): key for key in keys if key[0] in ("target", "params")}
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, IndexError) as error:
        raise SourceError(f"{folder} is no T5X checkpoint: {told(error)}") from error
    if not named:
        raise SourceError(f"{folder} has no weights: there is nothing under target in it")
    try:
        places = {"/".join(key[1:]): inside(".".join(key)) for key in named}
    except ValueError as error:
        raise SourceError(f"{folder}: {error}") from error
    return {name: arrays.Reader(folder, place, ocdbt) for name, place in places.items()}


class Writer:
    """Writes weights as T5X does: an array in a folder of its own each, and the tree last."""

    def __init__(self, folder: Path, names: Mapping[str, tuple], step: int):
        self.folder, self.names, self.step = folder, names, step
        self.writers: dict[str, arrays.Writer] = {}

    def write(self, name: str, values: np.ndarray, at: arrays.At = None) -> None:
        shape, dtype = self.names[name]
        if name not in self.writers:
            about = shape, dtype, None if at is None else at[0]
            self.writers[name] = arrays.Writer(self.folder, stored_name(name), about, GZIP)
        self.writers[name].write(values, None if at is None else at[1])

    def finish(self) -> None:
        tree: dict[str, Any] = {}
        for name, writer in self.writers.items():
            *above, last = name.split("/")
            inner = tree
            for key in above:
                inner = inner.setdefault(key, {})
            inner[last] = spec(name, writer)
        state = {"step": np.int32(self.step), "param_states": {}}
        whole = {"version": VERSION, "optimizer": {"state": state, "target": tree}}
        (self.folder / TREE).write_bytes(serialization.msgpack_serialize(whole))


def stored_name(name: str) -> str:
    return f"target.{name.replace('/', '.')}"


def spec(name: str, writer: arrays.Writer) -> dict[str, Any]:
    """What the tree says of an array: relative, so that the folder can be moved."""
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
