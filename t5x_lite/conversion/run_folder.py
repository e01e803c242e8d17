# SPDX-License-Identifier: Apache-2.0
"""Run folders of ours as a source and as an output of conversions, layer by layer.

A converted checkpoint is laid out as orbax lays out one that training saved, with a file for each
layer, and with a note whose digests are summed up while it is written.
"""

import json
from pathlib import Path

import numpy as np

from t5x_lite import config, config_file
from t5x_lite.conversion import arrays, matching
from t5x_lite.conversion.sources import SourceError
from t5x_lite.conversion.weights import blocks, cast
from t5x_lite.training import archive, checkpoint, restore
from t5x_lite.training.archive import Damaged, Note

STEP = 0
MODULUS = 2**32


class Saved:
    """The weights of a checkpoint in a run folder: the newest, or that of `step`.

    Every weight's digest is compared when its last layer was read.

    Raises:
      ValueError: there is none, it is damaged, or it is not of the model of its config.
    """

    def __init__(self, folder: str | Path, step: int | None = None):
        self.run = restore.read_config(folder)
        there = checkpoint.steps(folder)
        if not there or step not in (None, *there):
            raise SourceError(f"{folder} has no checkpoint {step if there else ''}: {there}")
        self.step = max(there) if step is None else step
        self.folder = Path(folder) / checkpoint.FOLDER / str(self.step)
        self.note = archive.read_note(self.folder)
        self.leaves = matching.leaves(self.run.model)
        shapes = {key: leaf.shape for key, leaf in self.leaves.items()}
        described = {key.replace(".", "/"): a for key, a in self.note.arrays["params"].items()}
        if shapes != {key: tuple(a["shape"]) for key, a in described.items()}:
            raise SourceError(f"{self.folder} is not of the model in {folder}/config.gin")
        self.described = described
        self.names = {key: (shapes[key], np.dtype(described[key]["dtype"])) for key in self.leaves}
        self.readers: dict[str, arrays.Reader] = {}
        self.sums: dict[str, dict[int | None, int]] = {}

    def leave_out(self, part: str) -> None:
        """From now on the weights of this part are not among those that are read."""
        kept = [path for path in self.leaves if path.partition("/")[0] != part]
        self.leaves = {path: self.leaves[path] for path in kept}
        self.names = {path: self.names[path] for path in kept}

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        if path not in self.readers:
            params = self.folder / "params"
            ocdbt = (params / "manifest.ocdbt").exists()
            self.readers[path] = arrays.Reader(params, path.replace("/", "."), ocdbt)
        reader = self.readers[path]
        if (reader.shape, reader.dtype) != self.names[path]:
            raise Damaged(f"{reader.where} is not of the shape or dtype that was saved")
        values = reader.read(None if layer is None else (0, layer))
        self.compare(path, layer, values)
        return values

    def compare(self, path: str, layer: int | None, values: np.ndarray) -> None:
        """Damaged if all of a weight was read and is not what was saved."""
        sums = self.sums.setdefault(path, {})
        if layer in sums:
            return
        rows = (digests(block) for block in blocks(np.atleast_1d(values)))
        sums[layer] = total(dict(enumerate(np.concatenate(list(rows)).tolist())))
        if layer is not None and len(sums) < self.leaves[path].layers:
            return
        del self.readers[path]
        if total(sums) != self.described[path]["digest"]:
            raise Damaged(f"{self.folder}: the bits of {path} are not those that were saved")


def total(sums: dict[int | None, int]) -> int:
    """The digest of a weight from those of its layers (or its rows)."""
    if None in sums:
        return sums[None]
    return sum((2 * index + 1) * value for index, value in sums.items()) % MODULUS


class RunFolder:
    """Writes a run folder: config, weights and note. The vocabularies are written beside them."""

    def __init__(self, folder: Path, run: config.Run, names: dict[str, tuple], leaves: dict):
        self.params = folder / checkpoint.FOLDER / str(STEP) / "params"
        self.params.mkdir(parents=True)
        self.folder, self.run, self.names, self.leaves = folder, run, names, leaves
        self.sums: dict[str, dict[int | None, int]] = {path: {} for path in names}
        self.writers: dict[str, arrays.Writer] = {}

    def write(self, path: str, layer: int | None, values: np.ndarray) -> None:
        shape, dtype = self.names[path]
        if path not in self.writers:
            stacked = None if self.leaves[path].layers is None else 0
            about = shape, dtype, stacked
            self.writers[path] = arrays.Writer(self.params, path.replace("/", "."), about, None)
        rows: dict[int | None, int] = {}

        def seen(first_row: int, block: np.ndarray) -> None:
            for offset, value in enumerate(digests(block)):
                rows[first_row + offset] = int(value)

        self.writers[path].write(cast(values, dtype, path), layer, seen)
        self.sums[path][layer] = total(rows)

    def finish(self) -> None:
        """Writes what makes the arrays a checkpoint, the config last."""
        stored = {path.replace("/", "."): about for path, about in self.names.items()}
        (self.params / "_METADATA").write_text(json.dumps(metadata(stored)))
        note = Note(
            step=STEP,
            config=config_file.text(self.run),
            arrays={
                "params": {
                    path.replace("/", "."): {
                        "shape": list(shape),
                        "dtype": np.dtype(dtype).name,
                        "digest": total(self.sums[path]),
                    }
                    for path, (shape, dtype) in self.names.items()
                }
            },
        )
        about = self.params.parent / "note"
        about.mkdir()
        (about / "metadata").write_text(json.dumps(archive.note_text(note)))
        (self.folder / "config.gin").write_text(note.config, encoding="utf-8")


def digests(rows: np.ndarray) -> np.ndarray:
    """`archive.digest` of every row."""
    bits = rows.view(np.dtype(f"u{rows.dtype.itemsize}")).reshape(len(rows), -1)
    odds = np.ones(1, np.uint32)
    for size in rows.shape[1:]:
        odds = (odds[:, None] * (2 * np.arange(size, dtype=np.uint32) + 1)).reshape(-1)
    # Products of uint16 and uint32 are uint32, and wrap as they should.
    return np.einsum("rn,n->r", bits, odds)


def metadata(stored: dict[str, tuple]) -> dict:
    """What orbax reads first: the tree of arrays, each of them in a folder of its own."""
    entry = lambda name, shape: {
        "key_metadata": [{"key": name, "key_type": 2}],
        "value_metadata": {
            "value_type": "jax.Array",
            "skip_deserialize": False,
            "write_shape": list(shape),
        },
    }
    return {
        "tree_metadata": {str((name,)): entry(name, shape) for name, (shape, _) in stored.items()},
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def model_only(folder: str | Path, cfg: config.Model) -> config.Run:
    """A run that has a model and nothing to train it with."""
    return config.Run(model_dir=str(folder), model=cfg)
