# SPDX-License-Identifier: Apache-2.0
"""Writing of token folders: one flat array for each feature, the offsets of its examples, and text.

A folder is filled under another name, brought to the disk and moved into place, so that a reader
sees all of it or nothing, and two processes may write it at once.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5x_lite.data import content
from t5x_lite.data.corpora import TextExample
from t5x_lite.utils.atomic_files import sync_folder
from t5x_lite.utils.paths import explain_unwritable

META = "meta.json"
# Features of a split, and the vocabulary of each: 0 is that of the inputs, 1 that of the targets.
FEATURES = {"inputs": 0, "targets": 1, "negatives": 1}


class Chunk(NamedTuple):
    """Consecutive examples.

    Attributes:
      inputs: token ids of each; None for text alone.
      targets: token ids of each.
      rows: their text, if known.
      negatives: token ids of a hard negative of each; None without them.
    """

    inputs: list[np.ndarray] | None
    targets: list[np.ndarray]
    rows: list[TextExample] | None = None
    negatives: list[np.ndarray] | None = None


@dataclass(frozen=True)
class CacheEntry:
    """Identity of a folder of the cache, and the examples that fill it.

    Attributes:
      name: of task and split.
      identity: everything that determines the ids, as JSON.
      chunks: the examples.
      sizes: of the vocabularies (inputs, targets).
      eos: their ids of the end.
      counts: counts of the reader (broken lines), complete after the last chunk.
      keep_rows: true to keep the text too.
    """

    name: str
    identity: dict
    chunks: Iterable[Chunk]
    sizes: tuple[int, int]
    eos: tuple[int, int]
    counts: dict[str, int]
    keep_rows: bool


class FeatureWriter:
    """Appends ids to a file and remembers where each example ends."""

    def __init__(self, folder: Path, name: str, dtype: type[np.integer], eos: int):
        self.folder, self.name, self.dtype, self.eos = folder, name, np.dtype(dtype), eos
        self.file = open(folder / f"{name}.bin", "wb")
        self.lengths: list[np.ndarray] = []
        self.ends, self.digest = True, hashlib.sha256()

    def write(self, examples: list[np.ndarray]) -> None:
        lengths = np.array([len(example) for example in examples], np.int64)
        flat = np.concatenate(examples).astype(self.dtype)
        last = np.cumsum(lengths) - 1
        self.ends &= bool((lengths > 0).all() and (flat[last] == self.eos).all())
        self.lengths.append(lengths)
        self.digest.update(lengths.tobytes() + flat.tobytes())
        self.file.write(flat.tobytes())

    def close(self) -> dict:
        self.file.close()
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        offsets = np.cumsum(lengths)
        np.save(self.folder / f"{self.name}_offsets.npy", offsets)
        return {
            "dtype": self.dtype.name,
            "tokens": int(offsets[-1]),
            "eos": self.eos,
            "ends": self.ends,
            "digest": self.digest.hexdigest(),
        }


class RowWriter:
    """Appends rows of text as JSON lines."""

    def __init__(self, folder: Path):
        self.folder, self.offsets = folder, [0]
        self.file = open(folder / "rows.jsonl", "wb")

    def write(self, rows: list[TextExample]) -> None:
        for row in rows:
            line = json.dumps([row.inputs, row.targets, row.references]).encode() + b"\n"
            self.file.write(line)
            self.offsets.append(self.offsets[-1] + len(line))

    def close(self) -> None:
        self.file.close()
        np.save(self.folder / "rows_offsets.npy", np.array(self.offsets, np.int64))


def check_root(root: Path) -> None:
    """Raises ValueError if the folder of the cache cannot be made; makes nothing itself."""
    reason = "" if root.is_dir() else explain_unwritable(root)
    if reason:
        raise ValueError(
            f"Cannot keep tokens under Data.cache_dir ({root}): {reason}. Name another folder, or "
            "set Data.stream = True"
        )


def write_folder(root: Path, folder: Path, entry: CacheEntry) -> None:
    """Fills a temporary folder and moves it into place, unless another process was faster.

    Args:
      root: folder of the cache.
      folder: final folder of the entry.
      entry: identity and examples.

    Raises:
      ValueError: the cache cannot be written.
    """
    check_root(root)
    partial = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        partial.chmod(0o755)  # mkdtemp keeps others out, but a cache may be shared
        write_chunks(partial, entry)
        sync_folder(partial)
        os.rename(partial, folder)
    except OSError as error:
        if not folder.exists():
            raise ValueError(
                f"Cannot keep tokens under Data.cache_dir ({root}): {error}. Free space there, "
                "name another folder, or set Data.stream = True"
            ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_chunks(folder: Path, entry: CacheEntry) -> None:
    """Writes every chunk and, last, meta.json."""
    writers: dict[str, FeatureWriter] = {}
    rows = RowWriter(folder) if entry.keep_rows else None
    examples = 0
    for chunk in entry.chunks:
        for name, position in FEATURES.items():
            ids: list[np.ndarray] | None = getattr(chunk, name)
            if ids is None:
                continue
            if name not in writers:
                dtype: type[np.integer] = np.uint16 if entry.sizes[position] <= 2**16 else np.int32
                writers[name] = FeatureWriter(folder, name, dtype, entry.eos[position])
            writers[name].write(ids)
        if rows is not None and chunk.rows is not None:
            rows.write(chunk.rows)
        examples += len(chunk.targets)
    if rows is not None:
        rows.close()
    if examples == 0:
        raise ValueError(
            f"{entry.name} has no examples: is the file empty, or every line left out?"
        )
    meta = {
        "examples": examples,
        "features": {name: writer.close() for name, writer in writers.items()},
        "counts": entry.counts,
        "identity": entry.identity,
        "files": {
            Path(path).name: digest
            for path, digest in content.digest_files(sorted(folder.iterdir())).items()
        },
    }
    meta["checksum"] = checksum(meta)
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def checksum(meta: dict) -> str:
    """Digest of the metadata of a folder."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
